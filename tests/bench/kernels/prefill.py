"""paged_prefill, its Hopper form, and segment_attention: checks and timings."""
import torch

import fa3
from device import median_us, multiprocessors, worst
from pages import Pages, prefill_tiles

FA3_TFLOPS = {(16, 1024): 393.8, (4, 4096): 505.0, (1, 16384): 572.6}


class Prefill:
    def __init__(self, module, pages, hopper=False, order="lpt", padding=0):
        self.module, self.pages, self.hopper = module, pages, hopper
        self.tiles = prefill_tiles(pages, 128 if hopper else 64, order=order, padding=padding)

    def __call__(self, out):
        p = self.pages
        arguments = (p.q, p.keys, p.values, p.table, p.context, p.query_start, self.tiles, out, p.stride, p.kv_heads, p.group, p.shift, p.dim**-0.5)
        grid = (p.kv_heads, len(self.tiles))
        if self.hopper:
            blocks = min(multiprocessors(), p.kv_heads * len(self.tiles))
            self.module.launch(f"paged_prefill_sm90_d{p.dim}", (blocks,), 384, 768 * p.dim * 2 + 2048, *arguments, len(self.tiles))
        else:
            self.module.launch(f"paged_prefill_d{p.dim}", grid, 128, 320 * (p.dim + 8) * 2, *arguments)


# Head, group, kv heads, tokens of a page.
SHAPES = ((128, 4, 2, 16), (128, 1, 2, 8), (128, 2, 3, 16), (128, 7, 1, 32), (128, 8, 2, 64), (64, 4, 2, 16), (64, 16, 1, 8), (64, 1, 5, 128))
# Query rows and context of a sequence: odd lengths, ends of tiles, chunks behind others, single rows, and one row that sees nothing.
EXTENTS = ((1, 1), (3, 3), (17, 17), (64, 80), (131, 131), (300, 4097), (1, 1031), (2, 15), (16, 401), (1, 0), (2, 2), (63, 63), (65, 65), (127, 127),
           (128, 128), (129, 129), (300, 300), (33, 161), (128, 256), (129, 385), (31, 1024), (640, 640))


def check_prefill(module, hopper):
    largest = 0.0
    for dim, group, kv_heads, block_tokens in SHAPES:
        pages = Pages([context for _, context in EXTENTS], [rows for rows, _ in EXTENTS], kv_heads, group, dim, block_tokens)
        whole, out = pages.guarded()
        Prefill(module, pages, hopper, ("lpt", "local")[group % 2], padding=3)(out)
        torch.cuda.synchronize()
        pages.check_guard(whole)
        for i, (rows, context) in enumerate(EXTENTS):
            own = out[pages.starts[i]:pages.starts[i + 1]]
            if context == 0:
                assert (own == 0).all(), "a row that sees nothing gives zeros"
                continue
            ratio, error = worst(own, pages.attend(i, torch.bfloat16), pages.attend(i, torch.float64))
            largest = max(largest, ratio)
            if not ratio <= 2.0:
                print(f"prefill hopper={hopper} d{dim} group {group} page {block_tokens} rows {rows} context {context}: error {error:.2e}, {ratio:.2f}x plain")
        for i in (5, 15, 19):  # Alone, bit for bit.
            alone = pages.only(i)
            single = alone.poisoned()
            Prefill(module, alone, hopper)(single)
            assert (single == out[pages.starts[i]:pages.starts[i + 1]]).all(), "a sequence alone differs from the same in a batch"
    # Scores whose highest lies far from the first step's, both ways: what the running base of the powers must follow.
    pages = Pages([1500, 700], [200, 700], 2, 4, 128)
    for far in (0.05, 30.0):
        pages.keys[torch.randperm(pages.keys.shape[0], device="cuda")[: pages.keys.shape[0] // 2]] *= far
    out = pages.poisoned()
    Prefill(module, pages, hopper)(out)
    for i in range(2):
        ratio, error = worst(out[pages.starts[i]:pages.starts[i + 1]], pages.attend(i, torch.bfloat16), pages.attend(i, torch.float64))
        largest = max(largest, ratio)
        if not ratio <= 2.0:
            print(f"prefill hopper={hopper} with keys of many sizes: error {error:.2e}, {ratio:.2f}x plain")
    return largest


def time_prefill(module, hopper, order="lpt", cases=None):
    for batch, length in cases or FA3_TFLOPS:
        pages = Pages([length] * batch, [length] * batch, 8, 4, 128, poison=False)
        prefill, out = Prefill(module, pages, hopper, order), pages.poisoned()
        us = median_us([lambda: prefill(out)], rounds=5)
        yield row_of("paged_prefill_sm90" if hopper else "paged_prefill", batch, length, us)


def row_of(kernel, batch, length, us):
    rate = 4 * batch * length * length * 32 * 128 / 2 / us * 1e6
    return {"kernel": kernel, "batch": batch, "length": length, "us": us, "TFLOP_s": rate / 1e12, "of_fa3_h200": rate / 1e12 / FA3_TFLOPS[batch, length]}


def time_fa3():
    for batch, length in FA3_TFLOPS:
        pages = Pages([length] * batch, [length] * batch, 8, 4, 128, poison=False)
        yield row_of("fa3", batch, length, median_us([fa3.call(pages)], rounds=5))


class Segment:
    def __init__(self, module, lengths, heads, dim, hopper=None, padded=False):
        self.module, self.hopper, self.lengths, self.heads, self.dim = module, hopper, lengths, heads, dim
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        self.starts, n = starts, starts[-1]
        self.qkv = torch.randn(n, 3, heads, dim, device="cuda", dtype=torch.bfloat16)
        angles = torch.rand(n, dim // 2, device="cuda") * 6.2
        self.cos, self.sin = angles.cos(), angles.sin()
        self.start = torch.tensor(starts, device="cuda", dtype=torch.int32)
        tiles = sorted((-length, i, first) for i, length in enumerate(lengths) for first in range(0, length, 128 if hopper else 64))
        self.rotated = torch.full((n, 2, heads, dim), float("nan"), device="cuda", dtype=torch.bfloat16)
        self.whole = torch.full((n + 8, heads, dim), 12345.0, device="cuda", dtype=torch.bfloat16)
        self.out = self.whole[4:-4]
        tiles = [(-1, 0)] * (3 if padded else 0) + [(i, first) for _, i, first in tiles]
        self.tiles = torch.tensor(tiles, device="cuda", dtype=torch.int32)

    def __call__(self):
        self.module.launch("segment_rope", (self.starts[-1],), 256, 0, self.qkv, self.cos, self.sin, self.rotated, self.heads, self.dim)
        arguments = (self.rotated, self.qkv, self.start, self.tiles, self.out, self.heads, self.dim**-0.5)
        if self.hopper:
            blocks = min(multiprocessors(), self.heads * len(self.tiles))
            self.hopper.launch("segment_attention_sm90_d64", (blocks,), 384, 100352, *arguments, len(self.tiles))
        else:
            shared = 320 * ((self.dim + 15) // 16 * 16 + 8) * 2
            self.module.launch(f"segment_attention_d{self.dim}", (self.heads, len(self.tiles)), 128, shared, *arguments)

    def attend(self, i, dtype):
        x = self.qkv[self.starts[i]:self.starts[i + 1]].double()
        c, s = (t[self.starts[i]:self.starts[i + 1], None].double() for t in (self.cos, self.sin))
        turn = lambda t: torch.cat((t[..., :self.dim // 2] * c - t[..., self.dim // 2:] * s, t[..., self.dim // 2:] * c + t[..., :self.dim // 2] * s), -1)
        q, k, v = (t.to(torch.bfloat16).to(dtype).transpose(0, 1) for t in (turn(x[:, 0]), turn(x[:, 1]), x[:, 2]))
        scores = q @ k.transpose(1, 2) * self.dim**-0.5
        p = scores.softmax(-1) if dtype == torch.float64 else scores.float().softmax(-1).to(dtype)
        return (p @ v).transpose(0, 1)


def check_segment(module, hopper=None):
    largest = 0.0
    for dim, heads in ((64, 3), (64, 16)) if hopper else ((64, 3), (72, 2), (80, 2)):
        segment = Segment(module, [1, 15, 64, 65, 251, 1000, 0, 16, 2, 63, 127, 128, 129, 300], heads, dim, hopper, padded=True)
        segment()
        torch.cuda.synchronize()
        assert (segment.whole[:4] == 12345.0).all() and (segment.whole[-4:] == 12345.0).all(), "wrote outside"
        for i, length in enumerate(segment.lengths):
            if length == 0:
                continue
            own = segment.out[segment.starts[i]:segment.starts[i + 1]]
            ratio, error = worst(own, segment.attend(i, torch.bfloat16), segment.attend(i, torch.float64))
            largest = max(largest, ratio)
            if not ratio <= 2.0:
                print(f"segment d{dim} length {length}: error {error:.2e}, {ratio:.2f}x plain")
    return largest


def time_segment(module, hopper=None):
    for count, length in ((64, 920), (16, 3600)):
        segment = Segment(module, [length] * count, 16, 64, hopper)
        us = median_us([segment], rounds=5)
        yield {"kernel": f"segment_rope + segment_attention{'_sm90' if hopper else ''}", "batch": count, "length": length, "us": us,
               "TFLOP_s": 4 * 64 * 16 * count * length**2 / us / 1e6}
