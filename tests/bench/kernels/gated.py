#!/usr/bin/env python3
"""gated_linear_sm90 against torch's linear (cuBLAS) with a pass of SwiGLU behind it: gated.py CUDA_FOLDER OUT.

Checks odd sizes against float64 first, then times the shapes of Qwen3-4B and Qwen3-VL-2B; OUT/gated.json grows as it goes."""
import ctypes
import json
import sys

import torch

from device import CUDA, Module, check, compile_all, median_us, multiprocessors, worst

SHARED = 230_528
VARIANTS = {f"lag{lag}_pairs{pairs}": [f"-DGATED_LAG={lag}", f"-DGATED_GROUP_PAIRS={pairs}"] for lag, pairs in ((0, 8), (1, 8), (2, 8), (3, 8), (2, 6))}
SHAPES = {"4b": (2560, 9728), "2b": (2048, 6144)}
ROWS = (256, 512, 1024, 2048, 4096, 8192)


class Map:
    """A tensor map of a row-major bf16 matrix, in boxes of rows x columns, swizzled by 128 bytes."""

    def __init__(self, x, rows, columns):
        self.memory = ctypes.create_string_buffer(256)
        self.address = (ctypes.addressof(self.memory) + 127) & ~127
        u64, u32 = ctypes.c_uint64, ctypes.c_uint32
        sizes, strides = (u64 * 2)(x.shape[1], x.shape[0]), (u64 * 1)(x.shape[1] * 2)
        boxes, steps = (u32 * 2)(columns, rows), (u32 * 2)(1, 1)
        check(CUDA.cuTensorMapEncodeTiled(ctypes.c_void_p(self.address), 9, 2, ctypes.c_void_p(x.data_ptr()), sizes, strides, boxes, steps,
                                          0, 3, 3, 0), "cuTensorMapEncodeTiled")


class Gated:
    def __init__(self, module, x, w, y):
        self.function = module.function("gated_linear_sm90")
        check(CUDA.cuFuncSetAttribute(self.function, 8, SHARED), "shared memory")
        self.keep = (x, w, y)
        self.maps = [Map(x, 128, 64), Map(w, 128, 64), Map(y, 64, 64)]
        (m, k), n = x.shape, y.shape[1]
        self.sizes = [ctypes.c_int(size) for size in (m, n, k)]
        tiles = -(-m // 256) * (n // 128)
        self.blocks = min(2 * tiles, multiprocessors() & ~1)
        self.pointers = (ctypes.c_void_p * 6)(*[own.address for own in self.maps], *[ctypes.addressof(size) for size in self.sizes])

    def __call__(self):
        stream = torch.cuda.current_stream().cuda_stream
        check(CUDA.cuLaunchKernel(self.function, self.blocks, 1, 1, 384, 1, 1, SHARED, ctypes.c_void_p(stream), self.pointers, None), "gated_linear_sm90")


def gate(both, dtype=torch.bfloat16):
    n = both.shape[1] // 2
    return torch.nn.functional.silu(both[:, :n]) * both[:, n:]


def case(m, k, n):
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    w = (torch.randn(2 * n, k, device="cuda") * k**-0.5).bfloat16()
    return x, w, torch.full((m + 1, n), float("nan"), device="cuda", dtype=torch.bfloat16)


def check_all(module):
    largest = 0.0
    for m, k, n in ((1, 64, 128), (127, 8, 128), (256, 72, 256), (257, 200, 384), (1024, 2560, 128), (1000, 640, 1280), (8192, 2048, 256), (4096, 9728, 128)):
        x, w, y = case(m, k, n)
        Gated(module, x, w, y[:m])()
        torch.cuda.synchronize()
        assert y[m].isnan().all(), "rows behind the end are left alone"
        both = (x.double() @ w.double().T).bfloat16()
        reference = gate(both.double())
        ratio, error = worst(y[:m], gate((x @ w.T)), reference)
        largest = max(largest, ratio)
        if not ratio <= 2.0:
            print(f"gated {m} x {k} x {n}: error {error:.2e}, {ratio:.2f}x plain", flush=True)
    return largest


def main():
    folder, out = sys.argv[1], sys.argv[2]
    report = {"gpu": torch.cuda.get_device_name(), "checks": {}, "rows": []}
    paths = compile_all(folder, "/tmp", {name: ("gated_linear_sm90", flags) for name, flags in VARIANTS.items()})
    modules = {}
    for name, path in paths.items():
        try:
            modules[name] = Module(path)
            report["checks"][name] = check_all(modules[name])
            print(f"{name}: largest error {report['checks'][name]:.2f} of plain's", flush=True)
        except Exception as error:  # One broken variant must not lose the others.
            report["checks"][name] = repr(error)
            print(name, error, flush=True)
    for shape, (k, n) in SHAPES.items():
        for m in ROWS:
            x, w, y = case(m, k, n)
            row = {"shape": shape, "rows": m}
            flops = 4 * m * k * n
            us = median_us([lambda: gate(torch.nn.functional.linear(x, w))], rounds=5, chain=3)
            row["torch_us"], row["linear_us"] = us, median_us([lambda: torch.nn.functional.linear(x, w)], rounds=5, chain=3)
            row["linear_TFLOP_s"] = flops / row["linear_us"] / 1e6
            for name, module in modules.items():
                row[name + "_us"] = median_us([Gated(module, x, w, y[:m])], rounds=5, chain=3)
                row[name + "_TFLOP_s"] = flops / row[name + "_us"] / 1e6
            report["rows"].append(row)
            print({key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
            with open(f"{out}/gated.json", "w") as file:
                json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
