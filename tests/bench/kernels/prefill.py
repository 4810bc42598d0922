"""paged_prefill, its Hopper form, and segment_attention: checks and timings."""
import torch

from device import median_us, multiprocessors, worst
from pages import Pages, prefill_tiles

FA3_TFLOPS = {(16, 1024): 393.8, (4, 4096): 505.0, (1, 16384): 572.6}


class Prefill:
    def __init__(self, module, pages, hopper=False, turns=False):
        self.module, self.pages, self.hopper, self.turns = module, pages, hopper, turns
        self.tiles = prefill_tiles(pages, 128 if hopper else 64)

    def __call__(self, out):
        p = self.pages
        arguments = (p.q, p.keys, p.values, p.table, p.context, p.query_start, self.tiles, out, p.stride, p.kv_heads, p.group, p.shift, p.dim**-0.5)
        grid = (p.kv_heads, len(self.tiles))
        if self.turns:
            blocks = min(multiprocessors(), p.kv_heads * len(self.tiles))
            self.module.launch(f"paged_prefill_sm90_all_d{p.dim}", (blocks,), 384, 768 * p.dim * 2 + 2048, *arguments, len(self.tiles))
        elif self.hopper:
            self.module.launch(f"paged_prefill_sm90_d{p.dim}", grid, 384, 640 * p.dim * 2 + 2048, *arguments)
        else:
            self.module.launch(f"paged_prefill_d{p.dim}", grid, 128, 320 * (p.dim + 8) * 2, *arguments)


def check_prefill(module, hopper, turns=False):
    largest = 0.0
    for dim, group, kv_heads, block_tokens in ((128, 4, 2, 16), (128, 1, 2, 8), (128, 7, 1, 32), (128, 8, 2, 64), (64, 4, 2, 16), (64, 16, 1, 8)):
        rows = [1, 3, 17, 64, 131, 300, 1, 2, 16, 9]
        contexts = [1, 3, 17, 80, 131, 4097, 1031, 15, 401, 0]
        rows[-1] = 1
        pages = Pages(contexts, rows, kv_heads, group, dim, block_tokens)
        out = pages.poisoned()
        Prefill(module, pages, hopper, turns)(out)
        torch.cuda.synchronize()
        for i, context in enumerate(contexts):
            own = out[pages.starts[i]:pages.starts[i + 1]]
            if context == 0:
                assert (own == 0).all(), "a row that sees nothing gives zeros"
                continue
            ratio, error = worst(own, pages.attend(i, torch.bfloat16), pages.attend(i, torch.float64))
            largest = max(largest, ratio)
            if not ratio <= 2.0:
                print(f"prefill hopper={hopper} turns={turns} d{dim} group {group} page {block_tokens} rows {rows[i]} context {context}: error {error:.2e}, {ratio:.2f}x plain")
    return largest


def time_prefill(module, hopper, turns=False, cases=None):
    rows = []
    for batch, length in cases or FA3_TFLOPS:
        pages = Pages([length] * batch, [length] * batch, 8, 4, 128, poison=False)
        prefill, out = Prefill(module, pages, hopper, turns), pages.poisoned()
        us = median_us([lambda: prefill(out)], rounds=5)
        rate = 4 * batch * length * length * 32 * 128 / 2 / us * 1e6
        rows.append({"kernel": "paged_prefill_sm90_all" if turns else "paged_prefill_sm90" if hopper else "paged_prefill", "batch": batch, "length": length, "us": us, "TFLOP_s": rate / 1e12,
                     "of_fa3_h200": rate / 1e12 / FA3_TFLOPS[batch, length]})
    return rows


class Segment:
    def __init__(self, module, lengths, heads, dim, hopper=None):
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
        self.tiles = torch.tensor([(i, first) for _, i, first in tiles], device="cuda", dtype=torch.int32)
        self.rotated = torch.full((n, 2, heads, dim), float("nan"), device="cuda", dtype=torch.bfloat16)
        self.out = torch.full((n, heads, dim), 12345.0, device="cuda", dtype=torch.bfloat16)

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
    for dim, heads in ((64, 3),) if hopper else ((64, 3), (72, 2), (80, 2)):
        segment = Segment(module, [1, 15, 64, 65, 251, 1000, 16, 128, 129], heads, dim, hopper)
        segment()
        torch.cuda.synchronize()
        for i, length in enumerate(segment.lengths):
            own = segment.out[segment.starts[i]:segment.starts[i + 1]]
            ratio, error = worst(own, segment.attend(i, torch.bfloat16), segment.attend(i, torch.float64))
            largest = max(largest, ratio)
            if not ratio <= 2.0:
                print(f"segment d{dim} length {length}: error {error:.2e}, {ratio:.2f}x plain")
    return largest


def time_segment(module, hopper=None):
    rows = []
    for count, length in ((64, 920), (16, 3600)):
        segment = Segment(module, [length] * count, 16, 64, hopper)
        us = median_us([segment], rounds=5)
        rows.append({"kernel": f"segment_rope + segment_attention{'_sm90' if hopper else ''}", "batch": count, "length": length, "us": us,
                     "TFLOP_s": 4 * 64 * 16 * count * length**2 / us / 1e6})
    return rows
