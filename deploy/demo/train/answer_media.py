"""Writes into ../clips/expected.json what transformers answers on the shipped stills and single-scene clips: the truth that
implementations are compared with, beside the true caption that the model may miss.

    python answer_media.py
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluate import Sample, answer, load
from make_media import decode_mp4
from prompts import Prompt

CLIPS = Path(__file__).parent.parent / "clips"
PROMPTS = {True: "Describe the video.", False: "Describe the image."}  # what `millrace caption` asks


def ask(model, processor, media, video, fps=None):
    prompt = Prompt(system=None, before="", after=PROMPTS[video])
    return answer(model, processor, Sample([media], video, prompt, "", fps, sampled=False))


def main():
    model, processor = load(CLIPS.parent / "model", torch.float32)
    path = CLIPS / "expected.json"
    expected = json.loads(path.read_text())
    for clip in expected["clips"]:
        if len(clip["scenes"]) == 1:
            frames = decode_mp4(CLIPS / clip["file"], clip["width"], clip["height"])
            clip["scenes"][0]["answer"] = ask(model, processor, frames, True, clip["fps"])
    for still in expected["stills"]:
        pixels = np.asarray(Image.open(CLIPS / still["file"]).convert("RGB"))[None].copy()
        still["answer"] = ask(model, processor, pixels, False)
    path.write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
