"""Scenes of moving shapes: how one is drawn at random, what its caption is, and which are held out.

A scene is a list of `Shape`s in caption order (left-most centre of the first frame first). Positions and radii are
fractions: `x` of the frame's width, `y` of its height, `r` of its shorter side, each given at the first and the last
frame and linear in between. The size word describes the first frame. Nothing here draws pixels (see render.py).
"""

import hashlib
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "white")
SIZES = ("small", "large")
MOTIONS = ("stays still", "moves left", "moves right", "moves up", "moves down", "grows", "shrinks")
RADIUS = {"small": (0.075, 0.095), "large": (0.140, 0.170)}
ORDINALS = ("first", "second", "third", "fourth")
EMPTY = "nothing is shown."
HELD_OUT_ONE_IN = 10
MIN_GAP_X = 0.09  # between first-frame centres, so that "left-most first" is never a close call


@dataclass(frozen=True)
class Shape:
    """One object: its words, and its place at the first (0) and last (1) frame."""

    size: str
    colour: str
    shape: str
    motion: str
    x0: float
    x1: float
    y0: float
    y1: float
    r0: float
    r1: float

    def noun(self):
        return f"a {self.size} {self.colour} {self.shape}"


def clip_caption(scene):
    """`a small red star moves left while a large blue ring grows.`"""
    return " while ".join(f"{s.noun()} {s.motion}" for s in scene) + "." if scene else EMPTY


def still_caption(scene):
    """The same without verbs: `a small red star and a large blue ring.`"""
    return " and ".join(s.noun() for s in scene) + "." if scene else EMPTY


def images_caption(scenes):
    """Several stills: `first: a small red star. second: nothing is shown.`"""
    return " ".join(f"{ORDINALS[i]}: {still_caption(s)}" for i, s in enumerate(scenes))


def held_out(scene, still):
    """Whether this combination (objects as a set, without their places) is kept out of training."""
    words = sorted(s.noun() if still else f"{s.noun()} {s.motion}" for s in scene)
    if not words:
        return False
    digest = hashlib.sha256(" | ".join(words).encode()).digest()
    return digest[0] % HELD_OUT_ONE_IN == 0


def _words(rng, still):
    motion = "stays still" if still else MOTIONS[rng.integers(len(MOTIONS))]
    return (SIZES[rng.integers(2)], COLOURS[rng.integers(len(COLOURS))], SHAPES[rng.integers(len(SHAPES))], motion)


def _place(rng, words, aspect):
    """A random place for one object that keeps it inside the frame throughout; `aspect` is width / height."""
    size, colour, shape, motion = words
    r0 = r1 = rng.uniform(*RADIUS[size])
    if motion == "grows":
        r1 = r0 * rng.uniform(1.5, 1.9)
    elif motion == "shrinks":
        r1 = r0 * rng.uniform(0.45, 0.62)
    reach = max(r0, r1) * 1.04
    mx, my = (reach / aspect, reach) if aspect >= 1 else (reach, reach * aspect)
    x0 = x1 = rng.uniform(mx, 1 - mx)
    y0 = y1 = rng.uniform(my, 1 - my)
    if motion in ("moves left", "moves right"):
        d = min(rng.uniform(0.24, 0.5), 0.98 - 2 * mx)
        a = rng.uniform(mx, 1 - mx - d)
        x0, x1 = (a, a + d) if motion == "moves right" else (a + d, a)
    elif motion in ("moves up", "moves down"):
        d = min(rng.uniform(0.24, 0.5), 0.98 - 2 * my)
        a = rng.uniform(my, 1 - my - d)
        y0, y1 = (a, a + d) if motion == "moves down" else (a + d, a)
    return Shape(size, colour, shape, motion, x0, x1, y0, y1, r0, r1)


_T = np.linspace(0, 1, 9)


def _apart(a, b, aspect):
    """Whether two objects stay clear of each other all the time."""
    if abs(a.x0 - b.x0) < MIN_GAP_X:
        return False
    w, h = (aspect, 1.0) if aspect >= 1 else (1.0, 1 / aspect)
    dx = (a.x0 - b.x0 + (a.x1 - a.x0 - b.x1 + b.x0) * _T) * w
    dy = (a.y0 - b.y0 + (a.y1 - a.y0 - b.y1 + b.y0) * _T) * h
    need = (a.r0 + b.r0 + (a.r1 - a.r0 + b.r1 - b.r0) * _T) * 1.05 + 0.015
    return bool(np.all(dx * dx + dy * dy > need * need))


def sample_scene(rng, count, still=False, aspect=1.0, split="train"):
    """A random scene of `count` objects. `split` is `train`, `held_out` or `any`."""
    while True:
        words = [_words(rng, still) for _ in range(count)]
        placed = []
        for _ in range(60):
            candidate = _place(rng, words[len(placed)], aspect) if len(placed) < count else None
            if candidate is None:
                break
            if all(_apart(candidate, other, aspect) for other in placed):
                placed.append(candidate)
        if len(placed) < count:
            continue
        scene = sorted(placed, key=lambda s: s.x0)
        if split == "any" or not scene or held_out(scene, still) == (split == "held_out"):
            return scene


def sample_count(rng, weights=(0.06, 0.28, 0.40, 0.26)):
    """How many objects: mostly one or two, sometimes none or three."""
    return int(rng.choice(len(weights), p=weights))
