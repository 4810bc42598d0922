"""Token layout of a request, as the chat template and Qwen3VLProcessor of transformers 5.17 lay it out.

`evaluate.py` goes through the real processor; this is the fast equivalent that training uses
(`python layout.py MODEL_DIR` compares the two).
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

PATCH, MERGE, TEMPORAL = 16, 2, 2
UNIT = PATCH * MERGE


class Layout:
    """Builds prompt ids and positions with the tokenizer and the special ids of one model folder."""

    def __init__(self, folder):
        folder = Path(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "config.json").read_text())
        self.image, self.video = config["image_token_id"], config["video_token_id"]
        self.start, self.end = config["vision_start_token_id"], config["vision_end_token_id"]
        self.stop = self.tokenizer.token_to_id("<|im_end|>")
        self.ids = lru_cache(maxsize=20000)(lambda text: self.tokenizer.encode(text, add_special_tokens=False).ids)

    def timestamps(self, indices, fps):
        """Seconds of each temporal patch: the mean of its two frames' times, an odd last frame counted twice."""
        indices = list(indices) + [indices[-1]] * (len(indices) % 2)
        return [(a + b) / 2 / fps for a, b in zip(indices[::2], indices[1::2])]

    def clip(self, seconds, tokens_per_frame, nested=True):
        """Ids of one video. Nested as in 5.17: the template's own markers stay around the per-frame ones."""
        ids = []
        for t in seconds:
            ids += self.ids(f"<{t:.1f} seconds>") + [self.start] + [self.video] * tokens_per_frame + [self.end]
        return [self.start] + ids + [self.end] if nested else ids

    def still(self, tokens):
        return [self.start] + [self.image] * tokens + [self.end]

    def request(self, prompt, media):
        """Ids of a whole request up to and including the assistant's opening; `media` are ids of its media."""
        ids = self.ids(f"<|im_start|>system\n{prompt.system}<|im_end|>\n") if prompt.system is not None else []
        ids = ids + self.ids("<|im_start|>user\n") + (self.ids(prompt.before) if prompt.before else [])
        for m in media:
            ids = ids + m
        return ids + self.ids(prompt.after + "<|im_end|>\n<|im_start|>assistant\n")

    def positions(self, ids, grid_h, grid_w):
        """Positions [3, n] (time, row, column) for ids whose visual runs are all grid_h x grid_w merged tokens."""
        out = np.empty((3, len(ids)), np.int64)
        per, cursor, i = grid_h * grid_w, 0, 0
        rows, columns = np.divmod(np.arange(per), grid_w)
        while i < len(ids):
            if ids[i] in (self.image, self.video):
                out[:, i:i + per] = cursor + np.stack([np.zeros(per, np.int64), rows, columns])
                cursor, i = cursor + max(grid_h, grid_w), i + per
            else:
                out[:, i] = cursor
                cursor, i = cursor + 1, i + 1
        return out


def _compare(folder):
    """Checks ids and positions against the processor and the model of transformers."""
    import torch
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    from evaluate import Sample, encode
    from prompts import Prompt
    from scene import still_caption

    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder)
    layout, rng = Layout(folder), np.random.default_rng(0)
    for n, w, h, prompt in ((8, 96, 96, Prompt(None, "", "Describe.")), (5, 128, 96, Prompt("Be brief.", "What?", ""))):
        frames = rng.integers(0, 255, (n, h, w, 3), dtype=np.uint8)
        indices = np.arange(n) * 5
        batch = encode(processor, Sample([frames], True, prompt, still_caption([]), 10.0, list(indices)))
        seconds = layout.timestamps(list(indices), 10.0)
        ids = layout.request(prompt, [layout.clip(seconds, w * h // UNIT**2)])
        assert ids == batch["input_ids"][0].tolist()
        types = {k: batch[k] for k in ("mm_token_type_ids",) if k in batch}
        theirs, _ = model.model.get_rope_index(batch["input_ids"], video_grid_thw=batch["video_grid_thw"], **types)
        assert torch.equal(theirs[:, 0], torch.from_numpy(layout.positions(ids, h // UNIT, w // UNIT)))
    print("layout agrees with transformers")


if __name__ == "__main__":
    import sys

    _compare(sys.argv[1])
