"""Checks and times the attention and linear kernels on the device: attention.py KERNELS_FOLDER OUT [part...].

Parts: the checks paged_decode, skinny_linear, paged_prefill, segment_attention, paged_prefill_sm90,
segment_attention_sm90; the timings decode, linear, prefill,
prefill_sm90, segment. All of them if none is named."""
import json
import os
import sys
import time
import traceback

import torch

import decode
import device
import linear
import prefill

VARIANTS = {
    "paged_decode": ("paged_decode", []),
    "paged_prefill": ("paged_prefill", []),
    "paged_prefill_sm90": ("paged_prefill_sm90", []),
    "segment_attention": ("segment_attention", []),
    "skinny_linear": ("skinny_linear", []),
    "skinny_linear_depth4": ("skinny_linear", ["-DSKINNY_DEPTH=4"]),
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
    hopper = {name: module for name, module in modules.items() if name.startswith("paged_prefill_sm90")}
    linears = {name: module for name, module in modules.items() if name.startswith("skinny_linear")}
    decodes, generic, segments = modules.get("paged_decode"), modules.get("paged_prefill"), modules.get("segment_attention")
    checks = {
        "paged_decode": lambda: decode.check_decode(decodes),
        "skinny_linear": lambda: max(linear.check_linear(module) for module in linears.values()),
        "paged_prefill": lambda: prefill.check_prefill(generic, False),
        "segment_attention": lambda: prefill.check_segment(segments),
        "paged_prefill_sm90": lambda: max(prefill.check_prefill(module, True, turns) for module in hopper.values() for turns in (False, True)),
        "segment_attention_sm90": lambda: prefill.check_segment(segments, hopper["paged_prefill_sm90"]),
    }
    timings = {
        "decode": lambda: decode.time_decode(decodes, copy) + [decode.time_mixed(decodes, copy)],
        "linear": lambda: [{**row, "variant": name} for name, module in linears.items() for row in linear.time_all(module, copy)],
        "prefill": lambda: prefill.time_prefill(generic, False),
        "prefill_sm90": lambda: [{**row, "variant": name} for name, module in hopper.items() for turns in (False, True)
                                 for row in prefill.time_prefill(module, True, turns)],
        "segment": lambda: prefill.time_segment(segments) + prefill.time_segment(segments, hopper.get("paged_prefill_sm90")),
    }
    parts = parts or [*checks, *timings]
    for name, check in checks.items():
        if name in parts:
            try:
                row = {"check": name, "error_over_plain": check(), "s": time.time() - begin}
                report["rows"].append(row)
                show(row)
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
