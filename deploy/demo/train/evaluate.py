"""Exact match of a checkpoint on held-out combinations, by category, all through transformers as it is.

    python evaluate.py --model ../model --count 1000 --out accuracy.json
    python evaluate.py --model ../model --count 100 --only clips,stills

Every sample goes through the chat template and the processor. A greedy answer is exactly the caption if and only if,
given the caption so far, each next token of it has the highest logit; so one forward pass over prompt and caption
decides, and `--generate` runs the much slower `generate` instead. The combinations are the held-out ones of scene.py;
half of the short wordings and all of the long ones are from lists that training never sees.
"""

import argparse
import hashlib
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from batches import sample_indices
from prompts import Prompt, sample_prompt
from render import render, spoil, times_of
from scene import clip_caption, images_caption, sample_count, sample_scene, still_caption

FULL, SHARE = ("clips", "stills"), 0.2  # these run at the full count, the other categories at this share of it
CATEGORIES = ("clips", "stills", "one_or_two_clips", "one_or_two_stills", "three_clips", "three_stills", "empty_clips",
              "empty_stills", "long_prompt_stills", "long_prompt_clips", "over_16_frames", "two_images", "three_images",
              "other_sizes", "spoiled", "unnested", "mp4")
MP4_COUNT = 50


@dataclass
class Sample:
    """One request: RGB uint8 arrays ([n, h, w, 3] for a clip, [1, h, w, 3] for a still) and what should come back."""

    media: list
    video: bool
    prompt: Prompt
    caption: str
    fps: float = 2.0
    indices: list | None = None
    sampled: bool = True  # frames are as the model should get them; else the processor takes two a second
    nested: bool = True


def make_sample(category, number, seed=2026, mp4=None):
    """The `number`-th sample of a category; the same every time. `mp4` is where to keep the file of an MP4 sample."""
    rng = np.random.default_rng([seed, CATEGORIES.index(category), number])
    count = sample_count(rng)
    if category.startswith("one_or_two"):
        count = int(rng.integers(1, 3))
    elif category.startswith(("three_clips", "three_stills")):
        count = 3
    elif category.startswith("empty"):
        count = 0
    still = category.endswith(("stills", "images"))
    if category in ("other_sizes", "spoiled"):
        still = bool(rng.integers(2))
    width = height = 96
    if category == "other_sizes":
        width, height = (int(rng.integers(80, 240)) for _ in range(2))
        if max(width, height) > 2 * min(width, height):
            width = height = max(width, height)
    elif rng.random() < 0.3:
        width, height = ((128, 96), (96, 128), (128, 128), (160, 96), (192, 192), (320, 180))[rng.integers(6)]
    long = category.startswith("long_prompt")
    wordings = "held_out" if long or rng.random() < 0.5 else "train"
    spoiled = category == "spoiled"

    def shoot(scene, times):
        frames = render(scene, times, width, height, rng)
        return spoil(frames, rng) if spoiled else frames

    if category.endswith("images"):
        number_of = 3 if category == "three_images" else 2
        counts = [sample_count(rng, (0.08, 0.42, 0.34, 0.16)) for _ in range(number_of)]
        scenes = [sample_scene(rng, c, True, width / height, "held_out") for c in counts]
        prompt = sample_prompt(rng, "images", long, wordings)
        return Sample([shoot(s, times_of(1)) for s in scenes], False, prompt, images_caption(scenes))
    scene = sample_scene(rng, count, still, width / height, "held_out")
    prompt = sample_prompt(rng, "still" if still else "clip", long, wordings)
    if still:
        return Sample([shoot(scene, times_of(1))], False, prompt, still_caption(scene))
    frames = int(rng.integers(17, 33)) if category == "over_16_frames" else int(rng.integers(2, 17))
    if category == "mp4":
        from make_media import through_mp4

        fps = float((8, 10, 12)[rng.integers(3)])
        seconds = rng.uniform(2.5, 9)
        with tempfile.TemporaryDirectory() as folder:
            size = ((160, 96), (192, 192), (320, 180), (128, 128), (256, 144), (96, 96))[rng.integers(6)]
            scene = sample_scene(rng, count, False, size[0] / size[1], "held_out")
            shot = render(scene, times_of(int(seconds * fps)), *size, rng)
            shot = through_mp4(shot, fps, mp4 or Path(folder) / "clip.mp4", crf=int(rng.integers(20, 29)))
        return Sample([shot], True, prompt, clip_caption(scene), fps, sampled=False)
    indices, fps = sample_indices(rng, frames)
    return Sample([shoot(scene, times_of(frames))], True, prompt, clip_caption(scene), fps,
                  [int(i) for i in indices], nested=category != "unnested")


def messages_of(sample):
    """The chat messages of a sample, with placeholders for the media."""
    parts = [{"type": "text", "text": sample.prompt.before}] if sample.prompt.before else []
    parts += [{"type": "video" if sample.video else "image"} for _ in sample.media]
    parts += [{"type": "text", "text": sample.prompt.after}] if sample.prompt.after else []
    system = [{"role": "system", "content": sample.prompt.system}] if sample.prompt.system is not None else []
    return system + [{"role": "user", "content": parts}]


def encode(processor, sample):
    """The model's inputs, by the template and the processor."""
    text = processor.apply_chat_template(messages_of(sample), add_generation_prompt=True, tokenize=False)
    if not sample.video:
        return processor(text=[text], images=[torch.from_numpy(m[0]).permute(2, 0, 1) for m in sample.media],
                         return_tensors="pt")
    frames = sample.media[0]
    indices = sample.indices if sample.indices is not None else list(range(len(frames)))
    meta = {"fps": sample.fps, "total_num_frames": indices[-1] + 1, "frames_indices": list(indices)}
    return processor(text=[text], videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)], video_metadata=[meta],
                     do_sample_frames=not sample.sampled, return_tensors="pt")


def unnest(batch, config):
    """Takes away the outer pair of vision markers, as processors before 5.x did."""
    ids = batch["input_ids"][0].tolist()
    inner = [i for i, t in enumerate(ids) if t == config.vision_start_token_id]
    keep = [i for i in range(len(ids)) if i != inner[0]]
    last = max(i for i, t in enumerate(ids) if t == config.vision_end_token_id)
    keep.remove(last)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in batch:
            batch[key] = batch[key][:, keep]
    return batch


@torch.no_grad()
def answer(model, processor, sample):
    """Greedy text of one request."""
    batch = encode(processor, sample)
    if not sample.nested:
        batch = unnest(batch, model.config)
    batch = batch.to(model.device)
    ids = model.generate(**batch, do_sample=False, max_new_tokens=96)
    return processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1]:], skip_special_tokens=True)


@torch.no_grad()
def matches(model, processor, sample):
    """Whether the greedy answer would be the caption, by one forward pass."""
    batch = encode(processor, sample)
    if not sample.nested:
        batch = unnest(batch, model.config)
    caption = processor.tokenizer.encode(sample.caption, add_special_tokens=False)
    caption = torch.tensor([caption + [processor.tokenizer.convert_tokens_to_ids("<|im_end|>")]])
    given = caption[:, :-1]
    batch["input_ids"] = torch.cat((batch["input_ids"], given), dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = torch.cat((batch["mm_token_type_ids"], torch.zeros_like(given)), dim=1)
    logits = model(**batch.to(model.device), logits_to_keep=caption.shape[1]).logits
    return bool((logits.argmax(-1).cpu() == caption).all())


def load(folder, dtype="auto", device="cpu"):
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().to(device)
    return model, AutoProcessor.from_pretrained(folder)


def report(path, model, args, results):
    """Writes the results; those of other categories already there for the same weights and seed are kept."""
    import transformers

    digest = hashlib.sha256((Path(args.model) / "model.safetensors").read_bytes()).hexdigest()
    note = {"model_sha256": digest, "dtype": str(model.dtype), "device": args.device, "seed": args.seed,
            "torch": str(torch.__version__), "transformers": transformers.__version__}
    kept = {}
    if path.exists():
        before = json.loads(path.read_text())
        kept = before.pop("categories")
        kept = kept if before == note else {}
    together = {**kept, **results}
    note["categories"] = {c: together[c] for c in CATEGORIES if c in together}
    path.write_text(json.dumps(note, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent.parent / "model"))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--only", default=",".join(CATEGORIES))
    parser.add_argument("--dtype", default="auto", help="auto is what the folder says (bfloat16)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--show", type=int, default=3, help="mistakes to print per category")
    parser.add_argument("--generate", action="store_true")
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = load(args.model, args.dtype, args.device)
    results = {}
    for category in args.only.split(","):
        count = args.count if category in FULL else max(int(args.count * SHARE), min(args.count, MP4_COUNT))
        count = min(count, MP4_COUNT) if category == "mp4" else count
        begun, right, shown = time.monotonic(), 0, 0
        for number in range(count):
            sample = make_sample(category, number, args.seed)
            good = not args.generate and matches(model, processor, sample)
            text = sample.caption if good else None
            if args.generate or (not good and shown < args.show):
                text = answer(model, processor, sample)
                good = text == sample.caption
            right += good
            if not good and shown < args.show:
                shown += 1
                print(f"  {category} {number}: {sample.media[0].shape} {text!r} for {sample.caption!r}", flush=True)
        results[category] = {"count": count, "right": right, "percent": round(100 * right / count, 2)}
        seconds = time.monotonic() - begun
        print(f"{category}: {right}/{count} = {100 * right / count:.2f} %  ({seconds:.0f} s)", flush=True)
    if args.out:
        report(Path(args.out), model, args, results)


if __name__ == "__main__":
    main()
