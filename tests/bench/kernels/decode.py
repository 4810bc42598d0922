"""paged_decode: checks and timings."""
import math

import torch

import fa3
from device import median_us, multiprocessors, worst
from pages import Pages

FA3_TBS = {(1, 8192): 1.145, (1, 131072): 3.657, (8, 4096): 2.584, (32, 1024): 2.518, (32, 8192): 4.163, (128, 1024): 3.526,
           (128, 4096): 4.320, (256, 1024): 3.796}


def shared_bytes(sequences):
    return 3 * 4 * 64 * 128 + 11264 + 8 * (sequences + 1)


class Decode:
    def __init__(self, module, pages, blocks=None):
        self.module, self.pages = module, pages
        self.blocks = blocks or 2 * multiprocessors()
        self.partial = torch.full((2 * self.blocks, pages.group, pages.dim + 2), float("nan"), device="cuda")
        self.arrived = torch.zeros(len(pages.contexts) * pages.kv_heads, device="cuda", dtype=torch.int32)
        self.stride = torch.tensor([pages.stride], device="cuda", dtype=torch.int32)

    def __call__(self, out, overlap=False):
        p = self.pages
        kernel = f"paged_decode_d{p.dim}_g{8 if p.group <= 8 else 16}"
        self.module.launch(kernel, (self.blocks,), 128, shared_bytes(len(p.contexts)), p.q, p.keys, p.values, p.table, p.context,
                           p.query_start, out, self.partial, self.arrived, self.stride, len(p.contexts), p.kv_heads, p.group, p.shift,
                           p.dim**-0.5, overlap=overlap)


def check_decode(module):
    """Returns the largest ratio of errors."""
    largest = 0.0
    for dim, group, kv_heads, block_tokens in ((128, 4, 2, 16), (128, 1, 3, 8), (128, 7, 1, 32), (128, 8, 2, 64), (128, 16, 1, 16), (64, 4, 2, 16),
                                               (64, 2, 8, 8), (64, 12, 1, 16), (128, 2, 5, 16)):  # 5: no blocks of its own for a head.
        contexts = [1, 15, 16, 17, 40, 63, 64, 65, 251, 0, 4097, 1031, 5]
        rows = [1] * len(contexts)
        rows[4] = 3  # Not this kernel's: its output stays as it was.
        pages = Pages(contexts, rows, kv_heads, group, dim, block_tokens)
        decode = Decode(module, pages)
        for _ in range(3):  # The counters must come back to zero.
            out = pages.poisoned()
            decode(out)
        torch.cuda.synchronize()
        for i, context in enumerate(contexts):
            own = out[pages.starts[i]:pages.starts[i + 1]]
            if rows[i] != 1:
                assert (own == pages.poisoned()[:rows[i]]).all(), "wrote another kernel's rows"
            elif context == 0:
                assert (own == 0).all(), "an empty sequence gives zeros"
            else:
                ratio, error = worst(own, pages.attend(i, torch.bfloat16), pages.attend(i, torch.float64))
                largest = max(largest, ratio)
                if not ratio <= 2.0:
                    print(f"decode d{dim} group {group} heads {kv_heads} page {block_tokens} context {context}: error {error:.2e}, {ratio:.2f}x plain")
        assert (decode.arrived == 0).all(), "counters left"
    return largest


def sets_of(batch, context):
    """Pages of as many batches as it takes to read none from the L2, and their bytes."""
    size = batch * context * 8 * 128 * 4
    return [Pages([context] * batch, [1] * batch, 8, 4, 128, poison=False) for _ in range(max(1, min(8, math.ceil((400 << 20) / size))))], size


def row_of(kernel, batch, context, us, size, copy):
    rate = size / us * 1e6
    return {"kernel": kernel, "batch": batch, "context": context, "us": us, "TB_s": rate / 1e12, "of_copy": rate / copy,
            "of_fa3_h200": rate / 1e12 / FA3_TBS.get((batch, context), float("nan"))}


def time_decode(module, copy, cases=None):
    for batch, context in cases or list(FA3_TBS) + [(512, 1024), (48, 2048)]:
        all_pages, size = sets_of(batch, context)
        calls = []
        for pages in all_pages:
            decode, out = Decode(module, pages), pages.poisoned()
            calls.append(lambda decode=decode, out=out: decode(out))
        us = median_us(calls, rounds=7, chain=max(1, 8 // len(calls)))
        yield row_of("paged_decode", batch, context, us, size, copy)
        del all_pages, calls
        torch.cuda.empty_cache()


def time_fa3(copy):
    for batch, context in FA3_TBS:
        all_pages, size = sets_of(batch, context)
        calls = [fa3.call(pages) for pages in all_pages]
        yield row_of("fa3", batch, context, median_us(calls, rounds=7, chain=max(1, 8 // len(calls))), size, copy)
        del all_pages, calls
        torch.cuda.empty_cache()


def time_mixed(module, copy):
    """Lengths from 1 to 8,192, as a running batch has them."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    contexts = (torch.rand(64, generator=generator) ** 2 * 8191).int().add(1).tolist()
    pages = Pages(contexts, [1] * 64, 8, 4, 128, poison=False)
    decode, out = Decode(module, pages), pages.poisoned()
    us = median_us([lambda: decode(out)] , rounds=5, chain=4)
    rate = sum(contexts) * 8 * 128 * 4 / us * 1e6
    return {"kernel": "paged_decode", "batch": "64 mixed", "context": sum(contexts) // 64, "us": us, "TB_s": rate / 1e12, "of_copy": rate / copy}
