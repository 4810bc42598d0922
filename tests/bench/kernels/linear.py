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

# Name: (file, flags). More builds may stand here to be compared.
BUILDS = {
    "stream": {"stream": ("skinny_linear_sm90", [])},
    "skinny": {"skinny": ("skinny_linear", [])},
}
MAPS = {}
AHEAD, AHEAD_BYTES = 2, 3 << 20  # DISTANCE and BYTES of kernels/src/cuda/ahead.rs.


def tensor_map(matrix, rows):
    """A map of a bf16 matrix in boxes of `rows` x 64, rows of 128 bytes swizzled, zeros outside."""
    key = (matrix.data_ptr(), tuple(matrix.shape), rows)
    if key not in MAPS:
        space = ctypes.create_string_buffer(128 + 128)
        at = (ctypes.addressof(space) + 127) // 128 * 128
        height, width = matrix.shape
        device.check(device.CUDA.cuTensorMapEncodeTiled(
            ctypes.c_void_p(at), 9, 2, ctypes.c_void_p(matrix.data_ptr()), (ctypes.c_uint64 * 2)(width, height), (ctypes.c_uint64 * 1)(2 * width),
            (ctypes.c_uint32 * 2)(64, rows), (ctypes.c_uint32 * 2)(1, 1), 0, 3, 2, 0), f"a map of {height} x {width}")
        MAPS[key] = (space, (ctypes.c_uint64 * 16).from_address(at))
    return MAPS[key][1]


def stream(module, x, w, bias, y, overlap=False, gated=False, cluster=1, ahead=(None, 0)):
    (m, _), (n, k) = x.shape, w.shape
    columns = 8 if m <= 8 else 16
    kernel = f"stream_{'swiglu' if gated else 'linear'}_c{columns}"
    tiles = -(-(n // 2 if gated else n) // 64)
    maps = tensor_map(x, columns), tensor_map(w, 64)
    module.launch(kernel, (tiles * cluster,), 128, (110 << 10) + 128, *maps, bias, y, m, n, k, *ahead,
                  overlap=overlap, cluster=cluster)


def skinny(module, x, w, bias, y, overlap=False, gated=False, blocks=1, ahead=None):
    (m, k), n = x.shape, w.shape[0]
    batch, r = 1 if m <= 8 else 2, 2 if gated else blocks
    kernel = f"skinny_swiglu_b{batch}" if gated else f"skinny_linear_r{blocks}_b{batch}"
    grid = min(-(-n // (32 if gated else 16 * blocks)), 2 * multiprocessors())
    module.launch(kernel, (grid,), 256, 98304 + 8192 * min(r * batch, 2), x, w, bias, y, m, n, k, overlap=overlap)


def forms(family, gated):
    """What there is to choose from: the blocks that share a tile; the blocks of rows in a tile."""
    return (1, 2, 4, 8) if family is stream else (2,) if gated else (1, 2)


def random_values(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def check(family, module):
    """Largest error over that of a plain bf16 implementation; raises where something is wrong."""
    largest, wrong = 0.0, []
    for n, k in ODD:
        w, bias, x = random_values(n, k), random_values(n), random_values(16, k)
        exact, plain = x.double() @ w.double().T, torch.nn.functional.linear(x, w)
        gate, up = plain.float().chunk(2, -1) if n % 2 == 0 else (None, None)
        for gated, biased, form in [(g, b, f) for g in (False, True) for b in (False, True) for f in forms(family, g)]:
            if gated and (n % 2 or biased):
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
                family(module, x[:m], w, bias if biased else None, y, False, gated, form)
                torch.cuda.synchronize()
                first = y[:16].clone() if first is None else first
                ratio, error = worst(y[:m], whole_plain[:m], reference[:m])
                where = f"{m} x {n} x {k} gated {gated} bias {biased} form {form}"
                few = y[:m].numel() < 256  # Of so few values either side's error is chance.
                if not (error < 0.02 if few else ratio <= 2.0):
                    wrong.append(f"{where}: error {error:.2e}, {ratio:.2f}x plain")
                elif not (y[m] == 12345.0).all():
                    wrong.append(f"{where}: wrote past the last row")
                elif not (y[:m] == first[:m]).all():
                    wrong.append(f"{where}: rows depend on their number")
                largest = max(largest, 0.0 if few else ratio)
    wrong += check_overlap(family, module)
    if wrong:
        raise AssertionError(f"{len(wrong)} wrong, first: " + "; ".join(wrong[:6]))
    return largest


def check_overlap(family, module):
    """Twelve linears that feed each other through two buffers: overlapping launches give the bits of launches one by one."""
    size, wrong = 2048, []
    weights = [random_values(size, size) * size**-0.5 for _ in range(12)]
    for m in (1, 16):
        x = random_values(m, size)
        for form in forms(family, False):
            buffers = [torch.empty_like(x), torch.empty_like(x)]

            def run(overlap):
                for buffer in buffers:
                    buffer.fill_(float("nan"))
                for i, w in enumerate(weights):
                    family(module, buffers[i % 2] if i else x, w, None, buffers[(i + 1) % 2], overlap, False, form)
                torch.cuda.synchronize()
                return buffers[0].clone()

            alone = run(False)
            if not all(torch.equal(run(True), alone) for _ in range(10)):
                wrong.append(f"{m} rows, form {form}: other values where launches overlap")
    return wrong


def time_shapes(family, builds, copy, put):
    """The best form of each shape; the whole table goes to the report."""
    best = {}
    for name, (n, k) in SHAPES.items():
        weights = [random_values(n, k) for _ in range(max(2, -(-(300 << 20) // (n * k * 2))))]
        for build, module in builds.items():
            for m in (1, 8, 16):
                x, y = random_values(m, k), torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
                for gated in (False, True) if name.startswith("gate_up") else (False,):
                    row = {}
                    for form in forms(family, gated):
                        try:
                            calls = [lambda w=w: family(module, x, w, None, y, True, gated, form) for w in weights]
                            row[form] = 2 * n * k / median_us(calls, rounds=3) * 1e6 / copy
                        except RuntimeError as error:
                            row[form] = 0.0
                            put({"failed": f"{build} {name} {form}: {error}"})
                            torch.cuda.synchronize()
                    top = max(row, key=row.get)
                    best[build, name, m, gated] = top
                    put({"build": build, "shape": name + ("_gated" if gated else ""), "rows": m, "best": top, "share": row[top], "all": row})
        if family is stream:
            for m in (1, 16):
                x = random_values(m, k)
                us = median_us([lambda w=w: torch.nn.functional.linear(x, w) for w in weights], rounds=3)
                put({"build": "cublas", "shape": name, "rows": m, "share": 2 * n * k / us * 1e6 / copy})
        del weights
        MAPS.clear()
    return best


class Chain:
    """The linears of 12 layers in order (gate_up gated where `gated`), in forms given by shape. With `small`, the kernels of few bytes
    that a decode step has between them stand there: a norm before qkv and gate_up, two more for rope and attention."""

    def __init__(self, model, norm, copy):
        self.names, self.norm, self.copy = LAYERS[model], norm, copy
        self.layers = [[(name, random_values(*SHAPES[name])) for name in self.names] for _ in range(12)]
        self.bytes = sum(w.numel() * 2 for layer in self.layers for _, w in layer)
        self.inputs = {(m, k): random_values(m, k) for m in range(1, 17) for k in {SHAPES[name][1] for name in self.names}}
        self.y = torch.empty(16, max(SHAPES[name][0] for name in self.names), device="cuda", dtype=torch.bfloat16)
        width = SHAPES[self.names[0]][1]
        self.rows, self.scale = [random_values(16, width) for _ in range(4)], random_values(width)

    def steady(self, m):
        a, b, c, d = self.rows
        width = a.shape[1]
        self.norm.launch("add_rms_norm", (m,), -(-width // 256) * 32, 0, a, b, self.scale, c, d, width, 1e-6, overlap=True)

    def share(self, m, call, gated=True, small=False, rounds=5):
        """Share of copy bandwidth; `call(name, x, w, y, gated, ahead)` launches one linear, `ahead` being what it should ask ahead."""
        calls = []
        weights = [w for layer in self.layers for _, w in layer]
        later = iter(weights[AHEAD:] + weights[:AHEAD])
        for layer in self.layers:
            for name, w in layer:
                if small:
                    calls += [lambda: self.steady(m)] * (2 if name.startswith("o") else 0 if name.startswith("down") else 1)
                x, glu = self.inputs[m, w.shape[1]], gated and name.startswith("gate_up")
                behind = next(later)
                ahead = (behind, min(AHEAD_BYTES, behind.numel() * 2))
                calls.append(lambda name=name, x=x, w=w, glu=glu, ahead=ahead: call(name, x, w, self.y, glu, ahead))
        return self.bytes / (median_us(calls, rounds=rounds) * len(calls)) * 1e6 / self.copy


def search(chain, family, module, form):
    """The form of each shape that serves the chains of 1, 8 and 16 rows best together; two passes, a shape at a time."""
    def call(name, x, w, y, glu, ahead):
        family(module, x, w, None, y, True, glu, form[name], ahead)

    def worth():
        return sum(chain.share(m, call, small=small, rounds=3) for m, small in ((1, False), (16, False), (1, True), (16, True)))

    best = worth()
    for name in chain.names * 2:
        for other in forms(family, name.startswith("gate_up")):
            before = form[name]
            if other == before:
                continue
            form[name] = other
            now = worth()
            if now > best * 1.002:
                best = now
            else:
                form[name] = before
    return call


def time_chains(family, builds, best, norm, copy, put):
    for model, names in LAYERS.items():
        chain = Chain(model, norm, copy)
        for build, module in builds.items():
            form = {name: best[build, name, 16, name.startswith("gate_up")] for name in names}
            call = search(chain, family, module, form)
            for m in (1, 2, 4, 8, 12, 16):
                for small in (False, True):
                    put({"build": build, "chain": model, "rows": m, "form": "small" if small else "", "forms": dict(form),
                         "share": chain.share(m, call, small=small)})
        if family is stream:
            for m in (1, 2, 4, 8, 12, 16):
                share = chain.share(m, lambda name, x, w, y, glu, ahead: torch.nn.functional.linear(x, w), gated=False, rounds=3)
                put({"build": "cublas", "chain": model, "rows": m, "share": share})
        del chain
        MAPS.clear()


def run_family(name, paths, norm, out):
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
        module = device.Module(path)
        try:
            put({"check": build, "error_over_plain": check(family, module)})
            builds[build] = module
        except (AssertionError, RuntimeError) as error:
            put({"check": build, "failed": str(error)[:600]})
            torch.cuda.synchronize()  # Dies here if the context is lost.
    put({"at": "timing"})
    if builds:
        best = time_shapes(family, builds, copy, put)
        time_chains(family, builds, best, device.Module(norm), copy, put)
    put({"at": "end"})


def main():
    folder, out, limit = sys.argv[1], sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 150.0
    begin = time.time()
    wanted = {build: value for family in BUILDS.values() for build, value in family.items()}
    compiled = device.compile_all(folder, out, {**wanted, "norm": ("norm", [])})
    print(f"compiled {len(compiled)} in {time.time() - begin:.0f} s", flush=True)
    for name in BUILDS:
        left = [build for build in BUILDS[name] if build in compiled]
        while left and time.time() - begin < limit:
            command = [sys.executable, __file__, "--family", name, out, compiled["norm"], *[f"{build}={compiled[build]}" for build in left]]
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
            for form in ("", "small"):
                own = [row for row in chains if (row["build"], row["chain"], row.get("form", "")) == (build, model, form)]
                cells = [max((row["share"] for row in own if row["rows"] == m), default=0.0) for m in counts]
                if own and "forms" in own[0] and form == "":
                    print(f"{build} {model}:", own[0]["forms"])
                if own:
                    print(f"12 layers of {model} {build:>20} {form:5}", *[f"M{m} {cell:.3f}" for m, cell in zip(counts, cells)])
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
            run_family(sys.argv[2], dict(pair.split("=", 1) for pair in sys.argv[5:]), sys.argv[4], sys.argv[3])
        except Exception:
            traceback.print_exc()
            sys.exit(1)
    else:
        main()
