"""Makes the clips and stills of deploy/demo/clips and their true captions (expected.json); also the H.264 round trip
that the other scripts use.

    python make_media.py --out ../clips

Needs ffmpeg with libx264. All scenes are held-out combinations.
"""

import argparse
import json
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from render import render, times_of
from scene import clip_caption, sample_scene, still_caption

FFMPEG = "ffmpeg"


def encode_mp4(frames, fps, path, crf=23):
    """Writes uint8 frames [n, h, w, 3] as H.264 in MP4, 4:2:0, BT.601 limited range, playable from the start."""
    height, width = frames.shape[1:3]
    command = [FFMPEG, "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}",
               "-r", f"{fps:g}", "-i", "-", "-c:v", "libx264", "-preset", "medium", "-crf", str(crf), "-pix_fmt",
               "yuv420p", "-threads", "1", "-movflags", "+faststart", "-fflags", "+bitexact", str(path)]
    subprocess.run(command, input=frames.tobytes(), check=True)


def decode_mp4(path, width, height):
    """All frames of a file as uint8 [n, height, width, 3]."""
    command = [FFMPEG, "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    data = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return np.frombuffer(data, np.uint8).reshape(-1, height, width, 3).copy()


def through_mp4(frames, fps, path, crf=23):
    """The frames as they come back from H.264."""
    encode_mp4(frames, fps, path, crf)
    back = decode_mp4(path, frames.shape[2], frames.shape[1])
    assert back.shape == frames.shape
    return back


# name, width, height, fps, and (objects, seconds) of each scene, cut one after the other
CLIPS = (
    ("one-shape", 160, 96, 10, ((1, 4.0),)),
    ("two-shapes", 192, 192, 8, ((2, 6.0),)),
    ("three-shapes", 320, 180, 10, ((3, 8.0),)),
    ("nothing", 128, 96, 8, ((0, 3.0),)),
    ("three-scenes", 192, 128, 10, ((1, 4.0), (2, 4.0), (2, 4.0))),
)
STILLS = (("one-shape.png", 96, 96, 1), ("two-shapes.jpg", 192, 128, 2), ("three-shapes.png", 160, 160, 3),
          ("one-shape.jpg", 320, 240, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(Path(__file__).parent.parent / "clips"))
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    out, rng = Path(args.out), np.random.default_rng(args.seed)
    out.mkdir(parents=True, exist_ok=True)
    clips, stills = [], []
    for name, width, height, fps, parts in CLIPS:
        frames, scenes, start = [], [], 0.0
        for objects, seconds in parts:
            scene = sample_scene(rng, objects, False, width / height, "held_out")
            frames.append(render(scene, times_of(int(seconds * fps)), width, height, rng))
            scenes.append({"start_secs": start, "end_secs": start + seconds, "caption": clip_caption(scene)})
            start += seconds
        frames = np.concatenate(frames)
        encode_mp4(frames, fps, out / f"{name}.mp4")
        clips.append({"file": f"{name}.mp4", "width": width, "height": height, "fps": fps, "frames": len(frames),
                      "scenes": scenes})
    for name, width, height, objects in STILLS:
        scene = sample_scene(rng, objects, True, width / height, "held_out")
        image = Image.fromarray(render(scene, times_of(1), width, height, rng)[0])
        image.save(out / name, **({"quality": 90} if name.endswith("jpg") else {"optimize": True}))
        stills.append({"file": name, "width": width, "height": height, "caption": still_caption(scene)})
    (out / "expected.json").write_text(json.dumps({"clips": clips, "stills": stills}, indent=1) + "\n")


if __name__ == "__main__":
    main()
