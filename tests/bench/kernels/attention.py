"""Checks and times the attention kernels on the device: attention.py KERNELS_FOLDER OUT [part...].

Parts: the checks paged_decode, paged_prefill, segment_attention, paged_prefill_sm90; the timings decode, prefill,
prefill_sm90, segment. All of them if none is named."""
import json
import os
import sys
import time
import traceback

import torch

import decode
import device
import prefill

VARIANTS = {
    "paged_decode": ("paged_decode", []),
    "paged_prefill": ("paged_prefill", []),
    "paged_prefill_sm90": ("paged_prefill_sm90", []),
    "segment_attention": ("segment_attention", []),
}


def show(row):
    print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()), flush=True)


def main():
    names = [argument for argument in sys.argv[3:] if not argument.startswith("-")]
    folder, out, parts = sys.argv[1], sys.argv[2], names
    begin = time.time()
    variants = {name: value for name, value in VARIANTS.items() if os.path.exists(f"{folder}/{value[0]}.cu")}
    modules = {name: device.Module(path) for name, path in device.compile_all(folder, out, variants).items()}
    copy = device.copy_bytes_per_s()
    report = {"gpu": torch.cuda.get_device_name(), "copy_TB_s": copy / 1e12, "rows": []}
    print(f"{report['gpu']}: copy {copy / 1e12:.2f} TB/s; compiled {sorted(modules)}; {time.time() - begin:.0f} s", flush=True)
    hopper = modules.get("paged_prefill_sm90")
    checks = {
        "paged_decode": lambda: decode.check_decode(modules["paged_decode"]),
        "paged_prefill": lambda: prefill.check_prefill(modules["paged_prefill"], False),
        "segment_attention": lambda: prefill.check_segment(modules["segment_attention"]),
        "paged_prefill_sm90": lambda: prefill.check_prefill(hopper, True),
    }
    timings = {
        "decode": lambda: decode.time_decode(modules["paged_decode"], copy) + [decode.time_mixed(modules["paged_decode"], copy)],
        "prefill": lambda: prefill.time_prefill(modules["paged_prefill"], False),
        "prefill_sm90": lambda: prefill.time_prefill(hopper, True),
        "segment": lambda: prefill.time_segment(modules["segment_attention"]),
    }
    parts = parts or [*checks, *timings]
    for name, check in checks.items():
        if name in modules and name in parts:
            try:
                show({"check": name, "error_over_plain": check(), "s": time.time() - begin})
            except Exception:  # The other parts still run.
                traceback.print_exc()
    for name, timing in timings.items():
        if name in parts:
            try:
                for row in timing():
                    report["rows"].append(row)
                    show(row)
                print(f"{name}: {time.time() - begin:.0f} s", flush=True)
            except Exception:
                traceback.print_exc()
    with open(os.path.join(out, f"kernels-{parts[-1]}.json"), "w") as file:
        json.dump(report, file, indent=1)


main()
