#!/usr/bin/env python3
"""What the vision path launches beside attention and linears, at the sizes of nine images of 1280x720: vision.py CUDA_FOLDER OUT.

Checks each kernel against torch first, then times it; OUT/vision.json grows as it goes. The scatters are timed with and without the
search for equal rows; `gelu_linear` asks cuBLASLt (through torch) what a GELU in the epilogue would save."""
import ctypes
import json
import sys

import torch

from device import Module, compile_all, median_us, worst

GRID, IMAGES, MERGE, SIDE, HIDDEN, INNER = (46, 80), 9, 2, 48, 1024, 4096
PATCHES = GRID[0] * GRID[1] * IMAGES
TOKENS, TEXT = PATCHES // MERGE**2, 2048
REPORT = {}


def random(*shape):
    return torch.randn(*shape, device="cuda").bfloat16()


def size(count):
    return (ctypes.c_uint64 * 1)(count)


def section(name, run, out):
    try:
        REPORT[name] = run()
    except Exception as error:  # One broken kernel must not lose the others.
        REPORT[name] = repr(error)
    print(name, REPORT[name], flush=True)
    with open(f"{out}/vision.json", "w") as file:
        json.dump(REPORT, file, indent=1)


def scatters(module):
    count = TOKENS + 200
    x, values = random(count, TEXT), random(TOKENS, TEXT)
    rows = torch.randperm(count, device="cuda")[:TOKENS].sort().values.int()
    row = {}
    for kernel, join in (("scatter_rows", lambda a, b: b), ("scatter_add_rows", lambda a, b: (a.float() + b.float()).bfloat16())):
        expected = x.clone()
        expected[rows.long()] = join(x[rows.long()], values)
        for distinct in (0, 1):
            out = x.clone()
            launch = lambda: module.launch(kernel, (TOKENS,), 128, 0, out, rows, values, TEXT, TOKENS, distinct)
            launch()
            torch.cuda.synchronize()
            row[f"{kernel}_{['searching', 'distinct'][distinct]}_right"] = bool(torch.equal(out, expected))
            row[f"{kernel}_{['searching', 'distinct'][distinct]}_us"] = median_us([launch], rounds=3)
    return row


def places():
    h, w = GRID
    index = torch.arange(h * w, device="cuda")
    block, inner = index // MERGE**2, index % MERGE**2
    return torch.stack([block // (w // MERGE) * MERGE + inner // MERGE, block % (w // MERGE) * MERGE + inner % MERGE]).repeat(1, IMAGES)


def grids(module):
    h, w = GRID
    start = torch.arange(IMAGES + 1, device="cuda", dtype=torch.int32) * (h * w)
    sizes = torch.tensor([GRID] * IMAGES, device="cuda", dtype=torch.int32)
    frequencies = (1e4 ** (-torch.arange(16, device="cuda") / 16)).float()
    cos, sin = (torch.full((PATCHES, 32), float("nan"), device="cuda") for _ in range(2))
    total = size(PATCHES * 32)
    angles = lambda: module.launch("patch_angles", (-(-PATCHES * 32 // 128),), 128, 0, start, sizes, frequencies, cos, sin, IMAGES, MERGE, 16, total)
    angles()
    row, column = places()
    angle = torch.cat([row[:, None].float() * frequencies, column[:, None].float() * frequencies], 1).double()
    report = {"angles_error": max((cos - angle.cos()).abs().max().item(), (sin - angle.sin()).abs().max().item()), "angles_us": median_us([angles])}
    table, out = random(SIDE * SIDE, HIDDEN), torch.full((PATCHES, HIDDEN), float("nan"), device="cuda", dtype=torch.bfloat16)
    blend = lambda: module.launch("interpolate_grids", (PATCHES,), 128, 0, table, start, sizes, out, IMAGES, MERGE, SIDE, HIDDEN)
    blend()
    y, x = row.double() * (SIDE - 1) / (h - 1), column.double() * (SIDE - 1) / (w - 1)
    at = lambda y, x: table.double()[y.long().clamp(max=SIDE - 1) * SIDE + x.long().clamp(max=SIDE - 1)]
    fy, fx = (y - y.floor())[:, None], (x - x.floor())[:, None]
    exact = at(y, x) * (1 - fy) * (1 - fx) + at(y, x + 1) * (1 - fy) * fx + at(y + 1, x) * fy * (1 - fx) + at(y + 1, x + 1) * fy * fx
    report["interpolation_over_plain"], _ = worst(out, exact.bfloat16(), exact)
    return report | {"interpolation_us": median_us([blend])}


def norms(norm, activation):
    a, b, w, bias = random(PATCHES, HIDDEN), random(PATCHES, HIDDEN), random(HIDDEN), random(HIDDEN)
    h, out, other = (torch.full_like(a, float("nan")) for _ in range(3))
    fused = lambda: norm.launch("add_layer_norm", (PATCHES,), 128, 0, a, b, w, bias, h, out, HIDDEN, 1e-6)
    fused()
    exact_sum = (a.float() + b.float()).bfloat16()
    exact = torch.nn.functional.layer_norm(exact_sum.double(), (HIDDEN,), w.double(), bias.double(), 1e-6)
    plain = torch.nn.functional.layer_norm(exact_sum, (HIDDEN,), w, bias, 1e-6)
    add = lambda: activation.launch("add", (-(-a.numel() // 2048),), 256, 0, a, b, other, size(a.numel()))
    alone = lambda: norm.launch("layer_norm", (PATCHES,), 128, 0, other, w, bias, out, HIDDEN, 1e-6)
    ratio, _ = worst(out, plain, exact)
    return {"sum_right": bool(torch.equal(h, exact_sum)), "over_plain": ratio, "fused_us": median_us([fused]), "add_us": median_us([add]),
            "layer_norm_us": median_us([alone])}


def gelus(activation):
    x, out = random(PATCHES, INNER) * 3, torch.full((PATCHES, INNER), float("nan"), device="cuda", dtype=torch.bfloat16)
    row = {}
    for erf, kind in ((0, "tanh"), (1, "none")):
        run = lambda: activation.launch("gelu", (-(-x.numel() // 2048),), 256, 0, x, out, size(x.numel()), erf)
        run()
        part = x[:4096].double()
        row[f"{kind}_over_plain"], _ = worst(out[:4096], torch.nn.functional.gelu(x[:4096], approximate=kind), torch.nn.functional.gelu(part, approximate=kind))
        row[f"{kind}_us"] = median_us([run])
    return row


def gelu_linear():
    x, w, bias = random(PATCHES, HIDDEN), random(INNER, HIDDEN) * HIDDEN**-0.5, random(INNER)
    apart = lambda: torch.nn.functional.linear(x, w, bias)
    fused = lambda: torch.ops.aten._addmm_activation(bias, x, w.t(), use_gelu=True)
    return {"linear_us": median_us([apart]), "linear_with_gelu_us": median_us([fused])}


def main():
    folder, out = sys.argv[1], sys.argv[2]
    REPORT["gpu"] = torch.cuda.get_device_name()
    paths = compile_all(folder, "/tmp", {stem: (stem, []) for stem in ("rows", "grid", "norm", "activation")})
    modules = {name: Module(path) for name, path in paths.items()}
    section("scatters", lambda: scatters(modules["rows"]), out)
    section("grids", lambda: grids(modules["grid"]), out)
    section("norms", lambda: norms(modules["norm"], modules["activation"]), out)
    section("gelus", lambda: gelus(modules["activation"]), out)
    section("gelu_linear", gelu_linear, out)


if __name__ == "__main__":
    main()
