"""Paged keys and values with random tables, references in float64, and plain bf16 attention to compare errors with."""
import copy

import torch


class Pages:
    """Sequences of `contexts` tokens, of which the last `rows` are queries, over shuffled pages. What no sequence holds is NaN."""

    def __init__(self, contexts, rows, kv_heads, group, dim, block_tokens=16, poison=True):
        self.contexts, self.rows, self.kv_heads, self.group, self.dim = contexts, rows, kv_heads, group, dim
        self.block_tokens, self.shift = block_tokens, block_tokens.bit_length() - 1
        counts = [(context + block_tokens - 1) // block_tokens for context in contexts]
        blocks = sum(counts) + 3
        shape = (blocks, block_tokens, kv_heads, dim)
        self.keys = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        self.values = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        order = torch.randperm(blocks, device="cuda", dtype=torch.int32)
        self.stride = max(max(counts), 1) + 1
        self.table = torch.full((len(contexts), self.stride), 2**30, device="cuda", dtype=torch.int32)  # Unmapped: a fault.
        at = 0
        for i, count in enumerate(counts):
            self.table[i, :count] = order[at:at + count]
            if poison and contexts[i] % block_tokens:
                for pool in (self.keys, self.values):
                    pool[order[at + count - 1].long(), contexts[i] % block_tokens:] = float("nan")
            at += count
        starts = [0]
        for count in rows:
            starts.append(starts[-1] + count)
        self.starts = starts
        self.query_start = torch.tensor(starts, device="cuda", dtype=torch.int32)
        self.context = torch.tensor(contexts, device="cuda", dtype=torch.int32)
        self.q = torch.randn(starts[-1], kv_heads * group * dim, device="cuda", dtype=torch.bfloat16)

    def poisoned(self):
        return torch.full_like(self.q, 12345.0)

    def guarded(self):
        """The poisoned output with four rows around it, and the output in it."""
        whole = torch.full((self.q.shape[0] + 8, self.q.shape[1]), 12345.0, device="cuda", dtype=torch.bfloat16)
        return whole, whole[4:-4]

    def check_guard(self, whole):
        assert (whole[:4] == 12345.0).all() and (whole[-4:] == 12345.0).all(), "wrote outside of the output"

    def only(self, i):
        """Sequence i alone, over the same pools."""
        alone = copy.copy(self)
        alone.contexts, alone.rows, alone.starts = self.contexts[i:i + 1], self.rows[i:i + 1], [0, self.rows[i]]
        alone.table, alone.context = self.table[i:i + 1].contiguous(), self.context[i:i + 1].contiguous()
        alone.query_start = torch.tensor(alone.starts, device="cuda", dtype=torch.int32)
        alone.q = self.q[self.starts[i]:self.starts[i + 1]].contiguous()
        return alone

    def attend(self, i, dtype):
        """Sequence i in float64, or plainly in bf16: scores, probabilities and output each rounded."""
        context, rows = self.contexts[i], self.rows[i]
        pages = self.table[i, :(context + self.block_tokens - 1) // self.block_tokens].long()
        take = lambda pool: pool[pages].reshape(-1, self.kv_heads, self.dim)[:context].to(dtype).repeat_interleave(self.group, 1).transpose(0, 1)
        q = self.q[self.starts[i]:self.starts[i + 1]].view(rows, -1, self.dim).transpose(0, 1).to(dtype)
        scores = q @ take(self.keys).transpose(1, 2) * self.dim**-0.5
        hidden = torch.arange(context, device="cuda")[None] > torch.arange(rows, device="cuda")[:, None] + context - rows
        scores = scores.masked_fill(hidden, float("-inf"))
        p = scores.softmax(-1) if dtype == torch.float64 else scores.float().softmax(-1).to(dtype)
        return (p @ take(self.values)).transpose(0, 1).reshape(rows, -1)


# Tokens of keys and values of neighbouring tiles, in order "local": as kernels/src/cuda/tiles.rs.
WINDOW_TOKENS = 8192


def prefill_tiles(pages, tile_rows, skip_single=False, order="lpt", padding=0):
    """The host's work list, (sequence, first packed row), and `padding` tiles of no sequence. Order "lpt": longest first. "local": so
    within windows of sequences that the L2 holds."""
    windows, tokens = [[]], 0
    for i, rows in enumerate(pages.rows):
        if skip_single and rows == 1:
            continue
        if order == "local" and windows[-1] and tokens + pages.contexts[i] > WINDOW_TOKENS:
            windows.append([])
            tokens = 0
        tokens += pages.contexts[i]
        for first in range(0, rows * pages.group, tile_rows):
            seen = pages.contexts[i] - rows + min(rows, (first + tile_rows - 1) // pages.group + 1)
            windows[-1].append((-(-(-seen // 128)) if order == "local" else -seen, i, first))
    tiles = [(-1, 0)] * padding + [(i, first) for window in windows for _, i, first in sorted(window)]
    return torch.tensor(tiles, device="cuda", dtype=torch.int32)
