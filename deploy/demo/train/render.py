"""Draws scenes into uint8 RGB frames, and spoils them the way a camera or a codec would.

All drawing is by signed distance with a one-pixel soft edge, on whole clips at once.
"""

import numpy as np

RGB = {
    "red": (228, 30, 30), "green": (30, 170, 50), "blue": (40, 60, 235), "yellow": (240, 225, 30),
    "orange": (245, 135, 20), "purple": (140, 40, 180), "cyan": (30, 210, 220), "white": (240, 240, 240),
}
_STAR_OUTER, _STAR_INNER = 1.0, 0.42


def _distance(shape, x, y, r):
    """Signed distance in pixels (negative inside) of points (x, y), y downwards, from a shape of radius r."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - r * 0.96
    if shape == "ring":
        return np.abs(np.sqrt(x * x + y * y) - r * 0.77) - r * 0.21
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - r * 0.88
    if shape == "triangle":
        side = (np.abs(x) * 1.8 - (y + r) * 0.98) / np.hypot(1.8, 0.98)
        return np.maximum(side, y - r * 0.8)
    if shape == "cross":
        ax, ay, arm, half = np.abs(x), np.abs(y), r * 0.97, r * 0.32
        return np.minimum(np.maximum(ax - half, ay - arm), np.maximum(ay - half, ax - arm))
    if shape == "star":
        rho = np.sqrt(x * x + y * y)
        turn = np.abs(np.mod(np.arctan2(x, -y) + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)
        px, py = rho * np.cos(turn), rho * np.sin(turn)
        ex, ey = _STAR_INNER * np.cos(np.pi / 5) - _STAR_OUTER, _STAR_INNER * np.sin(np.pi / 5)
        return (ey * (px - r) - ex * py) / np.hypot(ex, ey)
    raise ValueError(f"unknown shape {shape}")


def render(scene, times, width, height, rng=None):
    """Frames [n, height, width, 3] uint8 of `scene` at `times` (0 = first frame, 1 = last).

    With `rng` the background and the colours vary a little; without, they are plain.
    """
    times = np.asarray(times, np.float32)
    side = min(width, height)
    background = np.array([16.0, 16.0, 20.0], np.float32)
    if rng is not None:
        background = np.clip(rng.uniform(0, 44) + rng.uniform(-8, 8, 3), 0, 255).astype(np.float32)
    frames = np.empty((len(times), height, width, 3), np.float32)
    frames[:] = background
    for s in scene:
        colour = np.array(RGB[s.colour], np.float32)
        if rng is not None:
            colour = np.clip(colour * rng.uniform(0.9, 1.06) + rng.uniform(-12, 12, 3), 0, 255).astype(np.float32)
        cx, cy = (s.x0 + (s.x1 - s.x0) * times) * width, (s.y0 + (s.y1 - s.y0) * times) * height
        r = (s.r0 + (s.r1 - s.r0) * times) * side
        if s.motion == "stays still":  # every frame is the same
            cx, cy, r = cx[:1], cy[:1], r[:1]
        x_lo, x_hi = max(int((cx - r).min()) - 2, 0), min(int((cx + r).max()) + 3, width)
        y_lo, y_hi = max(int((cy - r).min()) - 2, 0), min(int((cy + r).max()) + 3, height)
        x = np.arange(x_lo, x_hi, dtype=np.float32)[None, None, :] + 0.5 - cx[:, None, None]
        y = np.arange(y_lo, y_hi, dtype=np.float32)[None, :, None] + 0.5 - cy[:, None, None]
        cover = np.clip(0.5 - _distance(s.shape, x, y, r[:, None, None]), 0, 1)[..., None]
        window = frames[:, y_lo:y_hi, x_lo:x_hi]
        window += cover * (colour - window)
    return np.round(frames).astype(np.uint8)


def times_of(count):
    """The moments of `count` frames spread evenly over a clip."""
    return np.linspace(0, 1, count) if count > 1 else np.zeros(1)


_DCT = np.array([[np.cos((2 * x + 1) * u * np.pi / 16) * (0.5 if u else 0.5 / np.sqrt(2)) for x in range(8)]
                 for u in range(8)], np.float32)
_STEP = (1 + 0.35 * (np.arange(8)[:, None] + np.arange(8)[None, :])).astype(np.float32)


def _quantise(plane, step):
    """Coarsens a plane [n, h, w] in 8 x 8 cosine blocks, as a video codec does; edges that do not fill one are kept."""
    n, h, w = plane.shape[0], plane.shape[1] // 8 * 8, plane.shape[2] // 8 * 8
    if not h or not w:
        return plane
    blocks = plane[:, :h, :w].reshape(n, h // 8, 8, w // 8, 8).transpose(0, 1, 3, 2, 4)
    coefficients = _DCT @ blocks @ _DCT.T
    coefficients = np.round(coefficients / (step * _STEP)) * (step * _STEP)
    plane[:, :h, :w] = (_DCT.T @ coefficients @ _DCT).transpose(0, 1, 3, 2, 4).reshape(n, h, w)
    return plane


def spoil(frames, rng):
    """Chroma at half resolution, coarse cosine blocks, a little blur, noise and a change of level."""
    f = frames.astype(np.float32)
    n, h, w, _ = f.shape
    if rng.random() < 0.35:  # 1-2-1 blur
        f[:, 1:-1] = f[:, 1:-1] * 0.5 + (f[:, :-2] + f[:, 2:]) * 0.25
        f[:, :, 1:-1] = f[:, :, 1:-1] * 0.5 + (f[:, :, :-2] + f[:, :, 2:]) * 0.25
    if rng.random() < 0.4:
        f += rng.normal(0, rng.uniform(1, 6), f.shape).astype(np.float32)
    if h % 2 == 0 and w % 2 == 0:
        y = f @ np.array([0.299, 0.587, 0.114], np.float32)
        half = f.reshape(n, h // 2, 2, w // 2, 2, 3).mean((2, 4))
        half_y = half @ np.array([0.299, 0.587, 0.114], np.float32)
        cb, cr = (half[..., 2] - half_y) * 0.564, (half[..., 0] - half_y) * 0.713
        step = np.exp(rng.uniform(np.log(1), np.log(14)))
        y, cb, cr = _quantise(y, step), _quantise(cb, step), _quantise(cr, step)
        cb, cr = (c.repeat(2, axis=1).repeat(2, axis=2) for c in (cb, cr))
        f = np.stack([y + 1.403 * cr, y - 0.344 * cb - 0.714 * cr, y + 1.773 * cb], axis=-1)
    f = f * rng.uniform(0.93, 1.05) + rng.uniform(-4, 6)
    return np.clip(np.round(f), 0, 255).astype(np.uint8)
