"""Training batches: all samples of one batch share the frame size and the number of frames, so nothing is padded
but the text on the right.

`Mix` holds how often each kind of sample comes up; a batch is described by numpy arrays, ready for `Forward`.
"""

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from layout import TEMPORAL, UNIT
from prompts import sample_prompt
from render import render, spoil, times_of
from scene import clip_caption, images_caption, sample_count, sample_scene, still_caption

# kind: clip, still, or images (several stills in one request)
DEFAULT_WEIGHTS = {"clip": 0.40, "long_clip": 0.04, "still": 0.19, "long_still": 0.08, "images": 0.29}
COUNTS = (0.04, 0.18, 0.33, 0.45)
# (height, width) in units of 32 pixels and how often
SIZES = (((3, 3), 0.50), ((2, 2), 0.05), ((3, 4), 0.10), ((4, 3), 0.07), ((4, 4), 0.08), ((3, 5), 0.06), ((5, 3), 0.03),
         ((2, 3), 0.02), ((3, 6), 0.05), ((6, 6), 0.04))
ANY_SIZE = 0.3  # so often any other size up to 192 x 320
MAX_CLIP_PIXELS, MAX_STILL_PIXELS = 524288, 36864  # the processors' budgets, over all frames of a clip
RATES = (1, 2, 2, 2, 4, 5, 8, 10, 12, 15, 24, 25, 30)


def resize(frames, height, width):
    """The processor's bicubic resize of uint8 frames [n, h, w, 3]."""
    if frames.shape[1:3] == (height, width):
        return frames
    x = torch.from_numpy(frames).permute(0, 3, 1, 2)
    x = transforms.resize(x, [height, width], InterpolationMode.BICUBIC, antialias=True)
    return x.permute(0, 2, 3, 1).contiguous().numpy()


def sample_indices(rng, count):
    """Frame indices and source rate of a clip of `count` frames: every frame, or two a second of a faster source."""
    fps = float(RATES[rng.integers(len(RATES))])
    if rng.random() < 0.5 and fps > 2 and count >= 4:
        total = max(int(round((count + rng.uniform(0, 0.99)) * fps / 2)), count)
        return np.round(np.linspace(0, total - 1, count)).astype(int), fps
    return np.arange(count), fps


class Mix:
    """An endless stream of batches. `tokens` bounds the tokens of one batch and `rows` its samples."""

    def __init__(self, layout, seed, tokens=2400, rows=64, weights=None, counts=COUNTS):
        self.layout, self.tokens, self.rows, self.counts = layout, tokens, rows, counts
        self.rng = np.random.default_rng(seed)
        self.weights = dict(weights or DEFAULT_WEIGHTS)

    def batches(self):
        kinds = list(self.weights)
        p = np.array([self.weights[k] for k in kinds], float)
        while True:
            yield self.batch(kinds[self.rng.choice(len(kinds), p=p / p.sum())])

    def batch(self, kind):
        rng = self.rng
        gh, gw = SIZES[rng.choice(len(SIZES), p=[w for _, w in SIZES])][0]
        if rng.random() < ANY_SIZE:
            gh = int(rng.integers(2, 7))
            gw = int(rng.integers(max(2, gh // 2), min(10, 2 * gh) + 1))
        media, frames = 1, 2
        if kind == "images":
            media = 3 if rng.random() < 0.45 else 2
        elif kind == "clip":
            frames = int(rng.choice((2, 3, 4, 5, 6, 7, 8, 10, 12, 16),
                                    p=(0.12, 0.07, 0.14, 0.06, 0.12, 0.06, 0.20, 0.10, 0.08, 0.05)))
        elif kind == "long_clip":
            frames = int(rng.integers(16, 33))
        even = frames + frames % 2
        most = MAX_CLIP_PIXELS // even if kind.endswith("clip") else MAX_STILL_PIXELS
        while gh * gw * UNIT * UNIT > most:
            gh, gw = (gh - 1, gw) if gh >= gw else (gh, gw - 1)
        long_text = kind == "long_still" or rng.random() < 0.12
        # a row has its visual tokens, timestamps, about 40 tokens of text and those of the extra sentences
        extra = int(3 + 25 * rng.random() ** 2) if long_text else 0
        per_row = media * (even // TEMPORAL) * (gh * gw + 8) + 40 + 18 * extra
        size = int(np.clip(self.tokens // per_row, 2, self.rows))
        rows = [self._row(kind, media, frames, gh, gw, extra) for _ in range(size)]
        return self._assemble(rows, gh, gw, kind.endswith("clip"))

    def _frames(self, scene, times, gh, gw):
        """Frames of one scene as the model gets them; some come from another frame size or a codec."""
        rng, height, width = self.rng, gh * UNIT, gw * UNIT
        if rng.random() < 0.3:
            scale = np.exp(rng.uniform(np.log(0.7), np.log(1.8)))
            width = max(int(width * scale * rng.uniform(0.88, 1.14)), 40)
            height = max(int(height * scale * rng.uniform(0.88, 1.14)), 40)
        out = render(scene(width / height), times, width, height, rng)
        if rng.random() < 0.3:
            out = spoil(out, rng)
        return resize(out, gh * UNIT, gw * UNIT)

    def _row(self, kind, media, frames, gh, gw, extra):
        rng, still = self.rng, not kind.endswith("clip")
        scenes, pixels = [], []
        for _ in range(media):
            count = sample_count(rng, self.counts if media == 1 else (0.06, 0.30, 0.42, 0.22))

            def scene(aspect, count=count):
                scenes.append(sample_scene(rng, count, still, aspect))
                return scenes[-1]

            pixels.append(self._frames(scene, times_of(1 if still else frames), gh, gw))
            if still:
                pixels[-1] = pixels[-1].repeat(TEMPORAL, axis=0)
            elif frames % 2:
                pixels[-1] = np.concatenate([pixels[-1], pixels[-1][-1:]])
        layout, per = self.layout, gh * gw
        if kind == "images":
            caption, parts = images_caption(scenes), [layout.still(per)] * media
        elif still:
            caption, parts = still_caption(scenes[0]), [layout.still(per)]
        else:
            seconds = layout.timestamps(*sample_indices(rng, frames))
            caption, parts = clip_caption(scenes[0]), [layout.clip(seconds, per, nested=rng.random() < 0.75)]
        family = "images" if kind == "images" else "still" if still else "clip"
        prompt = layout.request(sample_prompt(rng, family, extra > 0, sentences_range=(extra, extra + 2)), parts)
        answer = layout.ids(caption) + [layout.stop]
        return np.concatenate(pixels), prompt, answer

    def _assemble(self, rows, gh, gw, video):
        layout = self.layout
        length = max(len(prompt) + len(answer) - 1 for _, prompt, answer in rows)
        ids = np.full((len(rows), length), layout.stop, np.int64)
        positions = np.zeros((len(rows), 3, length), np.int64)
        wanted, targets = [], []
        for i, (_, prompt, answer) in enumerate(rows):
            row = prompt + answer[:-1]
            ids[i, :len(row)] = row
            positions[i, :, :len(row)] = layout.positions(row, gh, gw)
            wanted.append(i * length + len(prompt) - 1 + np.arange(len(answer)))
            targets += answer
        visual = np.flatnonzero(ids == (layout.video if video else layout.image))
        return {"frames": np.stack([pixels for pixels, _, _ in rows]), "ids": ids, "positions": positions,
                "visual": visual, "wanted": np.concatenate(wanted), "targets": np.array(targets), "video": video}


def to_tensors(batch, device):
    """The arguments of `Forward` on a device; a batch holds arrays or, out of a loader, tensors."""
    keys = ("frames", "ids", "positions", "visual", "wanted")
    return {k: torch.as_tensor(batch[k]).to(device, non_blocking=True) for k in keys}
