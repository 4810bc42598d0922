"""Checks and times the linears of few rows on the device: linear.py KERNELS_FOLDER OUT [seconds].

Kernels: skinny_linear (each thread streams its own weights) and skinny_linear_sm90 (the copy engine streams them, "stream"), each in
several builds. Every build is checked against float64 first; only what passes is timed: single shapes and the linears of 12 layers of
Qwen3-4B (VL-2B) in one captured graph of overlapping launches. Each family runs in a process of its own that writes OUT/linear.jsonl
line by line; where it dies or hangs, it starts again without the build it was at."""
import ctypes
import json
import os
import subprocess
import sys
import time
import traceback

import torch

import device
from device import median_us, multiprocessors, worst

SHAPES = {"qkv4b": (6144, 2560), "o4b": (2560, 4096), "gate_up4b": (19456, 2560), "down4b": (2560, 9728), "lm_head4b": (151936, 2560),
          "qkv2b": (4096, 2048), "o2b": (2048, 2048), "gate_up2b": (12288, 2048), "down2b": (2048, 6144)}
LAYERS = {"4b": ("qkv4b", "o4b", "gate_up4b", "down4b"), "2b": ("qkv2b", "o2b", "gate_up2b", "down2b")}
ODD = ((48, 72), (37, 64), (2, 8), (130, 24), (2560, 2560), (1000, 9728), (6144, 2048), (20000, 520))

# Name: (file, flags, promotion of cuTensorMapEncodeTiled: 2 is 128 bytes, 3 is 256).
BUILDS = {
    "stream": {
        "stream": ("skinny_linear_sm90", [], 2),
        "stream_256": ("skinny_linear_sm90", [], 3),
        "stream_late": ("skinny_linear_sm90", ["-DSTREAM_LATE=1"], 2),
        "stream_ahead4": ("skinny_linear_sm90", ["-DSTREAM_AHEAD=4"], 2),
        "stream_ahead8": ("skinny_linear_sm90", ["-DSTREAM_AHEAD=8"], 2),
        "stream_three": ("skinny_linear_sm90", ["-DSTREAM_RING_KB=74"], 2),
        "stream_late_ahead4": ("skinny_linear_sm90", ["-DSTREAM_LATE=1", "-DSTREAM_AHEAD=4"], 2),
    },
    "skinny": {f"skinny_depth{depth}": ("skinny_linear", [f"-DSKINNY_DEPTH={depth}"], 0) for depth in (1, 2, 4)},
}
MAPS = {}


def tensor_map(matrix, rows, promotion):
    """A map of a bf16 matrix in boxes of `rows` x 64, rows of 128 bytes swizzled, zeros outside."""
    key = (matrix.data_ptr(), tuple(matrix.shape), rows, promotion)
    if key not in MAPS:
        space = ctypes.create_string_buffer(128 + 128)
        at = (ctypes.addressof(space) + 127) // 128 * 128
        height, width = matrix.shape
        device.check(device.CUDA.cuTensorMapEncodeTiled(
            ctypes.c_void_p(at), 9, 2, ctypes.c_void_p(matrix.data_ptr()), (ctypes.c_uint64 * 2)(width, height), (ctypes.c_uint64 * 1)(2 * width),
            (ctypes.c_uint32 * 2)(64, rows), (ctypes.c_uint32 * 2)(1, 1), 0, 3, promotion, 0), f"a map of {height} x {width}")
        MAPS[key] = (space, (ctypes.c_uint64 * 16).from_address(at))
    return MAPS[key][1]


def stream(module, x, w, bias, y, overlap=False, gated=False, blocks=1, cluster=1, promotion=2):
    (m, _), (n, k) = x.shape, w.shape
    columns = 8 if m <= 8 else 16
    kernel = f"stream_swiglu_c{columns}" if gated else f"stream_linear_b{blocks}_c{columns}"
    tiles = -(-(n // 2) // 64) if gated else -(-n // (64 * blocks))
    maps = tensor_map(x, columns, promotion), tensor_map(w, 64, promotion)
    module.launch(kernel, (tiles * cluster,), 128, (module.ring_kb << 10) + 128, *maps, bias, y, m, n, k, overlap=overlap, cluster=cluster)


def skinny(module, x, w, bias, y, overlap=False, gated=False, blocks=1, cluster=1, promotion=0):
    (m, k), n = x.shape, w.shape[0]
    batch, r = 1 if m <= 8 else 2, 2 if gated else blocks
    kernel = f"skinny_swiglu_b{batch}" if gated else f"skinny_linear_r{blocks}_b{batch}"
    grid = min(-(-n // (32 if gated else 16 * blocks)), 2 * multiprocessors())
    module.launch(kernel, (grid,), 256, 98304 + 8192 * min(r * batch, 2), x, w, bias, y, m, n, k, overlap=overlap)


def forms(family):
    """(blocks, cluster) to choose from."""
    return [(b, c) for b in (1, 2) for c in (1, 2, 4, 8)] if family is stream else [(1, 1), (2, 1)]


def random_values(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def check(family, module, promotion):
    """Largest error over that of a plain bf16 implementation; raises where something is wrong."""
    largest, wrong = 0.0, []
    for n, k in ODD:
        w, bias, x = random_values(n, k), random_values(n), random_values(16, k)
        exact, plain = x.double() @ w.double().T, torch.nn.functional.linear(x, w)
        gate, up = plain.float().chunk(2, -1) if n % 2 == 0 else (None, None)
        for gated, biased, (blocks, cluster) in [(g, b, f) for g in (False, True) for b in (False, True) for f in forms(family)]:
            if gated and (n % 2 or biased or blocks == 1):
                continue
            if gated:
                whole_plain = ((gate / (1 + (-gate).exp())).to(torch.bfloat16).float() * up).to(torch.bfloat16)
                fine = exact.chunk(2, -1)
                reference = fine[0] * fine[0].sigmoid() * fine[1]
            else:
                whole_plain = torch.nn.functional.linear(x, w, bias) if biased else plain
                reference = exact + bias.double() if biased else exact
            first = None
            for m in (16, 1, 2, 5, 8, 9, 13):
                y = torch.full((m + 1, reference.shape[1]), 12345.0, device="cuda", dtype=torch.bfloat16)
                y[:m] = float("nan")
                family(module, x[:m], w, bias if biased else None, y, gated=gated, blocks=blocks, cluster=cluster, promotion=promotion)
                torch.cuda.synchronize()
                first = y[:16].clone() if first is None else first
                ratio, error = worst(y[:m], whole_plain[:m], reference[:m])
                where = f"{m} x {n} x {k} gated {gated} bias {biased} blocks {blocks} cluster {cluster}"
                few = y[:m].numel() < 256  # Of so few values either side's error is chance.
                if not (error < 0.02 if few else ratio <= 2.0):
                    wrong.append(f"{where}: error {error:.2e}, {ratio:.2f}x plain")
                elif not (y[m] == 12345.0).all():
                    wrong.append(f"{where}: wrote past the last row")
                elif not (y[:m] == first[:m]).all():
                    wrong.append(f"{where}: rows depend on their number")
                largest = max(largest, 0.0 if few else ratio)
    wrong += check_overlap(family, module, promotion)
    if wrong:
        raise AssertionError(f"{len(wrong)} wrong, first: " + "; ".join(wrong[:6]))
    return largest


def check_overlap(family, module, promotion):
    """Twelve linears that feed each other through two buffers: overlapping launches give the bits of launches one by one."""
    size, wrong = 2048, []
    weights = [random_values(size, size) * size**-0.5 for _ in range(12)]
    for m in (1, 16):
        x = random_values(m, size)
        for blocks, cluster in forms(family):
            buffers = [torch.empty_like(x), torch.empty_like(x)]

            def run(overlap):
                for buffer in buffers:
                    buffer.fill_(float("nan"))
                for i, w in enumerate(weights):
                    family(module, buffers[i % 2] if i else x, w, None, buffers[(i + 1) % 2], overlap, False, blocks, cluster, promotion)
                torch.cuda.synchronize()
                return buffers[0].clone()

            alone = run(False)
            if not all(torch.equal(run(True), alone) for _ in range(10)):
                wrong.append(f"{m} rows, blocks {blocks}, cluster {cluster}: other values where launches overlap")
    return wrong


def time_shapes(family, builds, copy, put):
    """The best form of each shape; the whole table goes to the report."""
    best = {}
    for name, (n, k) in SHAPES.items():
        weights = [random_values(n, k) for _ in range(max(2, -(-(300 << 20) // (n * k * 2))))]
        for build, (module, promotion) in builds.items():
            for m in (1, 8, 16):
                x, y = random_values(m, k), torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
                for gated in (False, True) if name.startswith("gate_up") else (False,):
                    row = {}
                    for blocks, cluster in forms(family):
                        if gated and blocks == 1:
                            continue
                        try:
                            calls = [lambda w=w: family(module, x, w, None, y, True, gated, blocks, cluster, promotion) for w in weights]
                            row[f"b{blocks}_c{cluster}"] = 2 * n * k / median_us(calls, rounds=3) * 1e6 / copy
                        except RuntimeError as error:
                            row[f"b{blocks}_c{cluster}"] = 0.0
                            put({"failed": f"{build} {name} b{blocks} c{cluster}: {error}"})
                            torch.cuda.synchronize()
                    top = max(row, key=row.get)
                    best[build, name, m, gated] = tuple(int(part[1:]) for part in top.split("_"))
                    put({"build": build, "shape": name + ("_gated" if gated else ""), "rows": m, "best": top, "share": row[top], "all": row})
        if family is stream:
            for m in (1, 16):
                x = random_values(m, k)
                us = median_us([lambda w=w: torch.nn.functional.linear(x, w) for w in weights], rounds=3)
                put({"build": "cublas", "shape": name, "rows": m, "share": 2 * n * k / us * 1e6 / copy})
        del weights
        MAPS.clear()
    return best


def time_chains(family, builds, best, copy, put):
    """The four linears of 12 layers in order, each in the form that was best for its shape at as many rows."""
    for model, names in LAYERS.items():
        layers = [[(name, random_values(*SHAPES[name])) for name in names] for _ in range(12)]
        nbytes = sum(w.numel() * 2 for layer in layers for _, w in layer)
        wide, tall = max(SHAPES[name][1] for name in names), max(SHAPES[name][0] for name in names)
        for m in (1, 2, 4, 8, 12, 16):
            inputs = {k: random_values(m, k) for k in {SHAPES[name][1] for name in names}}
            y = torch.empty(m, tall, device="cuda", dtype=torch.bfloat16)
            for build, (module, promotion) in builds.items():
                for gated in (False, True):
                    for by in (1, 16) if family is stream else (1 if m <= 4 else 8 if m <= 8 else 16,):
                        calls = []
                        for layer in layers:
                            for name, w in layer:
                                glu = gated and name.startswith("gate_up")
                                blocks, cluster = best[build, name, by, glu]
                                calls.append(lambda w=w, glu=glu, blocks=blocks, cluster=cluster: family(
                                    module, inputs[w.shape[1]], w, None, y, True, glu, blocks, cluster, promotion))
                        us = median_us(calls, rounds=5)
                        put({"build": build, "chain": model, "rows": m, "gated": gated, "forms_of": by, "share": nbytes / (us * len(calls)) * 1e6 / copy})
            if family is stream:
                calls = [lambda w=w: torch.nn.functional.linear(inputs[w.shape[1]], w) for layer in layers for _, w in layer]
                put({"build": "cublas", "chain": model, "rows": m, "share": nbytes / (median_us(calls, rounds=3) * len(calls)) * 1e6 / copy})
        del layers
        MAPS.clear()


def run_family(name, paths, out):
    family = {"stream": stream, "skinny": skinny}[name]
    file = open(os.path.join(out, "linear.jsonl"), "a")

    def put(row):
        file.write(json.dumps({"family": name, **row}) + "\n")
        file.flush()
        text = {key: value for key, value in row.items() if key != "all"}
        if "shape" not in row and "chain" not in row:
            print("  ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in text.items()), flush=True)

    copy = device.copy_bytes_per_s()
    put({"gpu": torch.cuda.get_device_name(), "copy_TB_s": copy / 1e12})
    builds = {}
    for build, path in paths.items():
        put({"at": build})
        module, (_, flags, promotion) = device.Module(path), BUILDS[name][build]
        module.ring_kb = int((["110"] + [flag.split("=")[1] for flag in flags if "RING_KB" in flag])[-1])
        try:
            put({"check": build, "error_over_plain": check(family, module, promotion)})
            builds[build] = (module, promotion)
        except (AssertionError, RuntimeError) as error:
            put({"check": build, "failed": str(error)[:600]})
            torch.cuda.synchronize()  # Dies here if the context is lost.
    put({"at": "timing"})
    if builds:
        best = time_shapes(family, builds, copy, put)
        time_chains(family, builds, best, copy, put)
    put({"at": "end"})


def main():
    folder, out, limit = sys.argv[1], sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 150.0
    begin = time.time()
    compiled = device.compile_all(folder, out, {build: value[:2] for family in BUILDS.values() for build, value in family.items()})
    print(f"compiled {len(compiled)} in {time.time() - begin:.0f} s", flush=True)
    for name in BUILDS:
        left = [build for build in BUILDS[name] if build in compiled]
        while left and time.time() - begin < limit:
            command = [sys.executable, __file__, "--family", name, out, *[f"{build}={compiled[build]}" for build in left]]
            before = len(lines(out))
            try:
                code = subprocess.run(command, timeout=max(10, limit - (time.time() - begin)), check=False).returncode
            except subprocess.TimeoutExpired:
                code = -1
            stops = [row["at"] for row in lines(out)[before:] if "at" in row]
            if code == 0 or not stops or stops[-1] not in left:
                break
            print(f"{name}: {stops[-1]} stopped with {code}; again without it", flush=True)
            left.remove(stops[-1])
        print(f"{name}: {time.time() - begin:.0f} s", flush=True)
    rows = lines(out)
    with open(os.path.join(out, "linear.json"), "w") as file:
        json.dump(rows, file, indent=0)
    tables(rows)
    for build in compiled.values():
        os.remove(build)
    os.remove(os.path.join(out, "linear.jsonl"))


def tables(rows):
    """Shares of copy bandwidth: chains by build and rows, then the best build and form of each shape."""
    chains = [row for row in rows if "chain" in row]
    for model in LAYERS:
        counts = sorted({row["rows"] for row in chains})
        for build in dict.fromkeys(row["build"] for row in chains):
            for gated in (False, True):
                own = [row for row in chains if (row["build"], row["chain"], row.get("gated", False)) == (build, model, gated)]
                cells = [max((row["share"] for row in own if row["rows"] == m), default=0.0) for m in counts]
                if own:
                    print(f"12 layers of {model} {build:>20}{' gated' if gated else '':6}", *[f"M{m} {cell:.3f}" for m, cell in zip(counts, cells)])
    shapes = [row for row in rows if "shape" in row]
    for shape in dict.fromkeys(row["shape"] for row in shapes):
        for m in (1, 8, 16):
            own = sorted((row for row in shapes if row["shape"] == shape and row["rows"] == m), key=lambda row: -row["share"])
            print(f"{shape:>16} M{m}", *[f"{row['build']} {row.get('best', '')} {row['share']:.3f};" for row in own[:3]])


def lines(out):
    path = os.path.join(out, "linear.jsonl")
    return [json.loads(line) for line in open(path)] if os.path.exists(path) else []


if __name__ == "__main__":
    if sys.argv[1] == "--family":
        try:
            run_family(sys.argv[2], dict(pair.split("=", 1) for pair in sys.argv[4:]), sys.argv[3])
        except Exception:
            traceback.print_exc()
            sys.exit(1)
    else:
        main()
