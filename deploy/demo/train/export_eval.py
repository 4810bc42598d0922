"""Writes held-out requests with the answers of transformers, for implementations that have no renderer.

    python export_eval.py --out /work/tmp/train            # clips_200/, stills_100/ and mp4_50/
    python export_eval.py --small ../eval                  # a few small ones, gzip-compressed, to be committed

Each folder has `index.json`: {"model_sha256", "transformers", "samples": [...]}, one object a sample:

    id, category   "000", one of the categories of evaluate.py
    kind           "video" or "image"
    file           raw RGB, 8 bits a channel, row by row, frame by frame, medium after medium; name.rgb or name.rgb.gz
    media          [{"width", "height", "frames"}] in the order of the file; stills have one frame each
    fps            rate of the source; frame i of a video is shown at frame_indices[i] / fps seconds
    frame_indices  null for stills. The frames are already sampled: the processor runs with do_sample_frames=False
    mp4            mp4_50 only: the H.264 file, and source_frames, how many it has. Its frames at frame_indices (two a
                   second, as the video processor samples) as decoded by ffmpeg are in `file`
    system, before, after   texts: system prompt or null, user text before and after the media ("" is none)
    prompt         the rendered chat template (with the markers, before the media tokens are put in)
    input_ids      what the processor makes of it
    text           greedy answer of transformers in the folder's own dtype (bfloat16) on a CPU
    text_f32       the same, computed in float32
    caption        the true caption
"""

import argparse
import gzip
import hashlib
import json
from pathlib import Path

import torch
import transformers

from evaluate import MP4_COUNT, answer, encode, load, make_sample, messages_of

PLANS = {"clips_200": {"clips": 180, "over_16_frames": 20},
         "stills_100": {"stills": 40, "long_prompt_stills": 20, "two_images": 20, "three_images": 10, "other_sizes": 10}}
SMALL_PLAN = {"clips": 4, "stills": 3, "long_prompt_stills": 1, "over_16_frames": 1, "two_images": 2, "empty_clips": 1}
SMALL_BYTES = 800_000  # committed samples are no larger than this before compression


class Exporter:
    """Holds the model in both precisions and writes samples into one folder."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.model, self.processor = load(folder)
        self.precise, _ = load(folder, torch.float32)

    def write(self, out, samples, compress=False):
        """Writes (category, sample, mp4 name or None) and the index; returns how many captions were right."""
        out.mkdir(parents=True, exist_ok=True)
        rows = [self._one(out, f"{i:03}", *item, compress) for i, item in enumerate(samples)]
        weights = hashlib.sha256((self.folder / "model.safetensors").read_bytes()).hexdigest()
        index = {"model_sha256": weights, "transformers": transformers.__version__, "samples": rows}
        (out / "index.json").write_text(json.dumps(index, indent=None if not compress else 1) + "\n")
        right = sum(row["text"] == row["caption"] for row in rows)
        same = sum(row["text"] == row["text_f32"] for row in rows)
        print(f"{out}: {len(rows)} samples, {right} right, {same} the same in float32")

    def _one(self, out, name, category, sample, mp4, compress):
        extra = {}
        if mp4:
            extra = {"mp4": mp4, "source_frames": len(sample.media[0])}
            sample.indices = self._sampled_indices(sample)
            sample.media = [sample.media[0][sample.indices]]
            sample.sampled = True
        data = b"".join(m.tobytes() for m in sample.media)
        file = f"{name}.rgb.gz" if compress else f"{name}.rgb"
        (out / file).write_bytes(gzip.compress(data, 9, mtime=0) if compress else data)
        template = self.processor.apply_chat_template(messages_of(sample), add_generation_prompt=True, tokenize=False)
        return {
            "id": name, "category": category, "kind": "video" if sample.video else "image", "file": file,
            "media": [{"width": m.shape[2], "height": m.shape[1], "frames": m.shape[0]} for m in sample.media],
            "fps": sample.fps if sample.video else None,
            "frame_indices": [int(i) for i in sample.indices] if sample.video else None, **extra,
            "system": sample.prompt.system, "before": sample.prompt.before, "after": sample.prompt.after,
            "prompt": template, "input_ids": encode(self.processor, sample)["input_ids"][0].tolist(),
            "text": answer(self.model, self.processor, sample),
            "text_f32": answer(self.precise, self.processor, sample), "caption": sample.caption,
        }

    def _sampled_indices(self, sample):
        from transformers.video_utils import VideoMetadata

        meta = VideoMetadata(total_num_frames=len(sample.media[0]), fps=sample.fps)
        indices = self.processor.video_processor.sample_frames(metadata=meta, fps=self.processor.video_processor.fps)
        return [int(i) for i in indices]


def small_samples():
    """The first samples of each category that are small enough to commit."""
    for category, count in SMALL_PLAN.items():
        number = 0
        while count:
            sample = make_sample(category, number)
            number += 1
            if sum(m.nbytes for m in sample.media) <= SMALL_BYTES:
                count -= 1
                yield category, sample, None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent.parent / "model"))
    parser.add_argument("--out", default=None, help="write clips_200/, stills_100/ and mp4_50/ here")
    parser.add_argument("--small", default=None, help="write the small set here")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    exporter = Exporter(args.model)
    if args.small:
        exporter.write(Path(args.small), small_samples(), compress=True)
    if args.out:
        out = Path(args.out)
        for name, plan in PLANS.items():
            exporter.write(out / name, ((c, make_sample(c, n), None) for c, k in plan.items() for n in range(k)))
        mp4 = out / "mp4_50"
        mp4.mkdir(parents=True, exist_ok=True)
        exporter.write(mp4, (("mp4", make_sample("mp4", n, mp4=mp4 / f"{n:03}.mp4"), f"{n:03}.mp4")
                             for n in range(MP4_COUNT)))


if __name__ == "__main__":
    main()
