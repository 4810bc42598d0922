"""Checks and times the attention kernels on the device: attention.py KERNELS_FOLDER OUT [seconds [part...]].

Builds every variant with nvcc at once, checks each against float64, times each, and FlashAttention-3 beside them on the same card where
$VLLM_SITE (a folder for sys.path) has vllm. Rows go to OUT/attention.json as they come. The parts run in a process of their own: where
one dies or hangs, the rest goes on without it. What runs under compute-sanitizer: `attention.py FOLDER OUT 0 sanitize`."""
import json
import os
import select
import subprocess
import sys
import time
import traceback

# Name: (file, flags).
VARIANTS = {
    "paged_decode": ("paged_decode", []),
    "decode_by_head": ("paged_decode", ["-DDECODE_BY_HEAD_TILES=0"]),
    "paged_prefill": ("paged_prefill", []),
    "segment_attention": ("segment_attention", []),
    "sm90": ("paged_prefill_sm90", []),
}
SANITIZED = ("paged_decode", "decode_by_head", "paged_prefill", "segment_attention", "sm90")
SILENCE_S = 40  # Without a line from the process at work, it is taken for hung.


def parts_of(modules, copy):
    """Name: function that yields rows. Imported late: only the process at work has a context."""
    import decode
    import prefill

    hopper = {name: module for name, module in modules.items() if VARIANTS[name][0] == "paged_prefill_sm90"}
    decodes = {name: module for name, module in modules.items() if VARIANTS[name][0] == "paged_decode"}
    parts = {}

    def add(name, run):
        parts[name] = run

    def checked(run):
        begin = time.time()
        return [{"error_over_plain": run(), "s": time.time() - begin}]

    segments = modules.get("segment_attention")
    add("time prefill fa3", lambda: prefill.time_fa3())
    for name, module in hopper.items():
        add(f"check prefill {name}", lambda module=module: checked(lambda: prefill.check_prefill(module, True)))
        add(f"time prefill {name}", lambda module=module: prefill.time_prefill(module, True, "local"))
    add("time prefill sm90, order lpt", lambda: prefill.time_prefill(hopper["sm90"], True, "lpt"))
    for name, module in decodes.items():
        add(f"check decode {name}", lambda module=module: checked(lambda: decode.check_decode(module)))
        add(f"time decode {name}", lambda module=module: decode.time_decode(module, copy))
    add("time decode fa3", lambda: decode.time_fa3(copy))
    add("time decode mixed", lambda: [decode.time_mixed(decodes["paged_decode"], copy)])
    for name, module in hopper.items():
        add(f"check segments {name}", lambda module=module: checked(lambda: prefill.check_segment(segments, module)))
        add(f"time segments {name}", lambda module=module: prefill.time_segment(segments, module))
    add("check prefill generic", lambda: checked(lambda: prefill.check_prefill(modules["paged_prefill"], False)))
    add("check segments generic", lambda: checked(lambda: prefill.check_segment(segments)))
    add("time prefill generic", lambda: prefill.time_prefill(modules["paged_prefill"], False))
    add("time segments generic", lambda: prefill.time_segment(segments))
    return parts


def work(cubins, wanted, skipped):
    """The process at work: a line of JSON for every part begun, every row, every failure."""
    import torch

    import device

    say = lambda **row: print("ROW " + json.dumps(row), flush=True)
    if wanted == ["sanitize"]:
        import sanitize

        sanitize.run({name: device.Module(path) for name, path in cubins.items()})
        return
    modules = {}
    for name, path in cubins.items():
        modules[name] = device.Module(path)
    copy = device.copy_bytes_per_s()
    say(part="copy", gpu=torch.cuda.get_device_name(), copy_TB_s=copy / 1e12)
    for part, run in parts_of(modules, copy).items():
        if part in skipped or (wanted and part not in wanted):
            continue
        say(begin=part)
        try:
            for row in run():
                say(part=part, **row)
        except Exception as error:  # The other parts still run, if the context does.
            traceback.print_exc()
            say(part=part, failed=str(error)[:500])
            torch.cuda.synchronize()
        torch.cuda.empty_cache()


def show(row, begin):
    cells = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items() if key != "part"]
    print(f"{time.time() - begin:5.0f} s  {row['part']}:  " + "  ".join(cells), flush=True)


def main():
    import device

    folder, out = sys.argv[1], sys.argv[2]
    limit, wanted = float(sys.argv[3]) if len(sys.argv) > 3 else 110.0, sys.argv[4:]
    begin = time.time()
    chosen = {name: VARIANTS[name] for name in SANITIZED} if wanted == ["sanitize"] else VARIANTS
    cubins = device.compile_all(folder, out, chosen)
    print(f"{len(cubins)} of {len(chosen)} variants compiled, {time.time() - begin:.0f} s", flush=True)
    if wanted == ["sanitize"]:
        work(cubins, wanted, [])
        return
    report = {"rows": []}

    def keep(row):
        report["rows"].append(row)
        show(row, begin)
        with open(os.path.join(out, "attention.json"), "w") as file:
            json.dump(report, file, indent=1)

    done, ended = [], False
    while not ended and time.time() - begin < limit:
        request = json.dumps([cubins, wanted, done])
        process = subprocess.Popen([sys.executable, "-u", __file__, "--work", request], stdout=subprocess.PIPE)
        at = None
        for line in lines_of(process.stdout.fileno(), lambda: min(SILENCE_S, limit - (time.time() - begin))):
            if not line.startswith("ROW "):
                print(line.rstrip(), flush=True)
                continue
            row = json.loads(line[4:])
            if "begin" in row:
                at = row["begin"]
                done.append(at)
            else:
                keep(row)
        if process.poll() is None:
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        ended = process.returncode == 0 or at is None
        if process.returncode != 0:
            keep({"part": at or "start", "failed": f"the process ended with {process.returncode}"})
    table(report["rows"])
    # Cubins are for this run only.
    for path in cubins.values():
        os.remove(path)


def lines_of(file, left):
    """Lines as they come, until the end of the file, or none for `left()` seconds."""
    text = b""
    while left() > 0 and select.select([file], [], [], left())[0]:
        more = os.read(file, 1 << 16)
        if not more:
            return
        *lines, text = (text + more).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)


def table(rows):
    """Prefill beside FlashAttention-3 of the same run, or of the stored run on an H200."""
    stored = {(16, 1024): 393.8, (4, 4096): 505.0, (1, 16384): 572.6}
    own = {(row["batch"], row["length"]): row["TFLOP_s"] for row in rows if row["part"] == "time prefill fa3" and "TFLOP_s" in row}
    fa3 = own or stored
    print(f"\nprefill TFLOP/s and share of FA3 ({'this run' if own else 'stored, H200'}):")
    for row in rows:
        if row["part"].startswith("time prefill") and "TFLOP_s" in row:
            base = fa3.get((row["batch"], row["length"]))
            print(f"  {row['part']:44} {row['batch']:3} x {row['length']:6} {row['TFLOP_s']:7.1f}" + (f" {row['TFLOP_s'] / base:6.3f}" if base else ""))
    print("worst error over plain bf16 (bar 2), by check:")
    for row in rows:
        if row["part"].startswith("check"):
            print(f"  {row['part']:44} {row.get('error_over_plain', row.get('failed'))}", flush=True)


if len(sys.argv) > 2 and sys.argv[1] == "--work":
    work(*json.loads(sys.argv[2]))
else:
    main()
