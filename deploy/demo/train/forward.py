"""A training forward pass for batches of equal frame size, over the parameters of the transformers model.

transformers runs the vision tower's attention frame by frame; here every frame of the batch is one row of a batched
attention, which is several times faster for small frames. `python forward.py MODEL_DIR` checks that both agree.
"""

import torch
import torch.nn.functional as F

from layout import MERGE, PATCH, TEMPORAL


def patches_of(frames):
    """uint8 [b, n, h, w, 3] (n even) to float patches [b * n / 2, (h / 16) * (w / 16), 1536] in 2 x 2 block order."""
    b, n, h, w, _ = frames.shape
    t, by, bx = n // TEMPORAL, h // PATCH // MERGE, w // PATCH // MERGE
    x = frames.view(b * t, TEMPORAL, by, MERGE, PATCH, bx, MERGE, PATCH, 3)
    x = x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(b * t, by * bx * MERGE * MERGE, -1)
    return x.float().sub_(127.5).div_(127.5)


def _rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _attend(q, k, v, causal=False):
    """Attention; on a CPU in plain matrix products, whose bfloat16 backward is several times faster than the fused."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -1e4, dtype=scores.dtype).triu(1)
    return torch.softmax(scores, dim=-1, dtype=scores.dtype) @ v


class Forward(torch.nn.Module):
    """Shares its parameters with `model`; returns logits at the asked-for places only."""

    def __init__(self, model):
        super().__init__()
        self.vision, self.text = model.model.visual, model.model.language_model
        vision, text = model.config.vision_config, model.config.text_config
        self.heads = vision.num_heads
        self.side = int(vision.num_position_embeddings**0.5)
        self.deepstack = list(vision.deepstack_visual_indexes)
        self.text_heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.head_dim = text.head_dim
        dim = vision.hidden_size // vision.num_heads // 2
        self.register_buffer("vision_freq", 1.0 / (10000.0 ** (torch.arange(0, dim, 2).float() / dim)), False)
        half = torch.arange(self.head_dim // 2)
        theta = text.rope_parameters["rope_theta"]
        self.register_buffer("text_freq", 1.0 / (theta ** (half.float() * 2 / self.head_dim)), False)
        section = text.rope_parameters["mrope_section"]
        axis = torch.zeros_like(half)
        for k in (1, 2):
            axis[(half % 3 == k) & (half < 3 * section[k])] = k
        self.register_buffer("axis", axis, False)

    def _grid(self, gh, gw, device):
        """Row and column of each patch in block order."""
        order = torch.arange(gh * gw, device=device).view(gh // MERGE, MERGE, gw // MERGE, MERGE)
        order = order.permute(0, 2, 1, 3).flatten()
        return order // gw, order % gw

    def _positions(self, gh, gw, device):
        rows, columns = self._grid(gh, gw, device)
        y = rows * ((self.side - 1) / max(gh - 1, 1))
        x = columns * ((self.side - 1) / max(gw - 1, 1))
        y0, x0 = y.long(), x.long()
        y1, x1 = (y0 + 1).clamp(max=self.side - 1), (x0 + 1).clamp(max=self.side - 1)
        dy, dx = (y - y0)[:, None], (x - x0)[:, None]
        e = lambda r, c: F.embedding(r * self.side + c, self.vision.pos_embed.weight)  # noqa: E731
        position = e(y0, x0) * (1 - dy) * (1 - dx) + e(y0, x1) * (1 - dy) * dx
        position = position + e(y1, x0) * dy * (1 - dx) + e(y1, x1) * dy * dx
        angle = torch.cat((rows[:, None] * self.vision_freq, columns[:, None] * self.vision_freq), dim=-1)
        return position, angle.cos(), angle.sin()

    def _merge(self, merger, x):
        width = x.shape[-1] * MERGE * MERGE
        if merger.use_postshuffle_norm:
            x = merger.norm(x.reshape(-1, width))
        else:
            x = merger.norm(x).reshape(-1, width)
        return merger.linear_fc2(F.gelu(merger.linear_fc1(x)))

    def see(self, frames):
        """Visual tokens [rows, hidden] of uint8 frames [b, n, h, w, 3], and the deepstack features."""
        gh, gw = frames.shape[2] // PATCH, frames.shape[3] // PATCH
        embed = self.vision.patch_embed.proj
        x = F.linear(patches_of(frames), embed.weight.flatten(1), embed.bias)
        position, cos, sin = self._positions(gh, gw, x.device)
        x = x + position.to(x.dtype)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        n, length, width = x.shape
        deep = []
        for i, block in enumerate(self.vision.blocks):
            qkv = block.attn.qkv(block.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            a = _attend(_rotate(qkv[0], cos, sin), _rotate(qkv[1], cos, sin), qkv[2])
            x = x + block.attn.proj(a.transpose(1, 2).reshape(n, length, width))
            hidden = F.gelu(block.mlp.linear_fc1(block.norm2(x)), approximate="tanh")
            x = x + block.mlp.linear_fc2(hidden)
            if i in self.deepstack:
                deep.append(self._merge(self.vision.deepstack_merger_list[len(deep)], x))
        return self._merge(self.vision.merger, x), deep

    def forward(self, frames, ids, positions, visual, wanted):
        """Logits [rows, vocabulary] at `wanted`.

        ids [b, s]; positions [b, 3, s]; `visual` and `wanted` are flat indices into b * s: where the visual tokens go,
        in order, and after which tokens a prediction is asked for. Right padding needs no mask.
        """
        tokens, deep = self.see(frames)
        b, s = ids.shape
        x = self.text.embed_tokens(ids).to(tokens.dtype).flatten(0, 1)
        x = x.index_copy(0, visual, tokens).view(b, s, -1)
        angle = positions.float()[:, self.axis].transpose(1, 2) * self.text_freq
        cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
        for i, layer in enumerate(self.text.layers):
            attn = layer.self_attn
            h = self._norm(layer.input_layernorm, x)
            q = self._norm(attn.q_norm, attn.q_proj(h).view(b, s, self.text_heads, -1)).transpose(1, 2)
            k = self._norm(attn.k_norm, attn.k_proj(h).view(b, s, self.kv_heads, -1)).transpose(1, 2)
            v = attn.v_proj(h).view(b, s, self.kv_heads, -1).transpose(1, 2)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            groups = self.text_heads // self.kv_heads
            k, v = (z.repeat_interleave(groups, dim=1) for z in (k, v))
            a = _attend(q, k, v, causal=True).transpose(1, 2).reshape(b, s, -1)
            if i + 1 == len(self.text.layers):  # from here on each token is on its own
                a, x = a.flatten(0, 1)[wanted], x.flatten(0, 1)[wanted]
            x = x + attn.o_proj(a)
            h = self._norm(layer.post_attention_layernorm, x)
            x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
            if i < len(deep):
                x = x.flatten(0, 1).index_add(0, visual, deep[i].to(x.dtype)).view(b, s, -1)
        return F.linear(self._norm(self.text.norm, x), self.text.embed_tokens.weight)

    @staticmethod
    def _norm(norm, x):
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.variance_epsilon)
        return x * scale.to(x.dtype) * norm.weight.to(x.dtype)


def _compare(folder):
    from transformers import Qwen3VLForConditionalGeneration

    from batches import Mix, to_tensors
    from layout import Layout

    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ours = Forward(model)
    batches = Mix(Layout(folder), seed=3).batches()
    for _ in range(6):
        batch = next(batches)
        t = to_tensors(batch, "cpu")
        frames = t["frames"]
        b, n, h, w, _ = frames.shape
        kind = "video" if batch["video"] else "image"
        per_row = n // TEMPORAL if batch["video"] else 1
        grids = torch.tensor([[per_row, h // PATCH, w // PATCH]] * (b * n // TEMPORAL // per_row))
        feed = {"pixel_values" + ("_videos" if batch["video"] else ""): patches_of(frames).flatten(0, 1)}
        with torch.no_grad():
            mine = ours(**t)
            theirs = model(input_ids=t["ids"], attention_mask=torch.ones_like(t["ids"]), position_ids=t["positions"]
                           .transpose(0, 1), **feed, **{kind + "_grid_thw": grids}).logits.flatten(0, 1)[t["wanted"]]
        difference = float((mine - theirs).abs().max())
        print(kind, tuple(frames.shape), tuple(t["ids"].shape), "largest difference", difference)


if __name__ == "__main__":
    import sys

    _compare(sys.argv[1])
