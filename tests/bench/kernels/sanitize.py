"""Every specialised attention kernel once, small: what sanitize.sh runs under compute-sanitizer. Compares nothing but counts."""
import torch

from decode import Decode
from pages import Pages
from prefill import Prefill, Segment


def run(modules):
    extents = ((1, 1), (3, 3), (70, 300), (1, 65), (33, 33), (1, 0))
    for dim, group in ((128, 4), (64, 3)):
        pages = Pages([context for _, context in extents], [rows for rows, _ in extents], 2, group, dim)
        out = pages.poisoned()
        Prefill(modules["sm90"], pages, True, padding=1)(out)
        torch.cuda.synchronize()
        assert not (out == 12345.0).all(1).any(), "rows left"
        out = pages.poisoned()
        Prefill(modules["paged_prefill"], pages)(out)
    for hopper in (modules["sm90"], None):
        Segment(modules["segment_attention"], [1, 130, 0, 64], 2, 64, hopper, padded=True)()
        torch.cuda.synchronize()
    for dim, group in ((128, 4), (128, 16), (64, 4), (64, 16)):
        pages = Pages([1, 15, 64, 700, 0], [1] * 5, 2, group, dim)
        for name, blocks in (("paged_decode", 7), ("decode_by_head", 8)):  # Heads in turn, and with blocks of their own.
            decode = Decode(modules[name], pages, blocks=blocks)
            out = pages.poisoned()
            decode(out)
            torch.cuda.synchronize()
            assert not (out == 12345.0).all(1).any(), "rows left"
    print("sanitize: all ran", flush=True)
