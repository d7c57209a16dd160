"""Scenes to pixels: anti-aliased by supersampling, vectorised over all objects of one shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from shapes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, Scene

SIDE = 64
BOX = SIDE // 2  # an object never leaves the quadrant, or the central box, that it lies in
_SAMPLES = 3  # per axis and pixel
# Of the box of each position: (row, column).
_CORNERS = np.array([(0, 0), (0, BOX), (BOX, 0), (BOX, BOX), (BOX // 2, BOX // 2)])
_RADIUS = {"small": 8.0, "large": 13.0}
_COLOUR_JITTER = 6.0  # of 255; far less than the distance between two colours
_CENTER_JITTER = 1.2  # pixels
_RADIUS_JITTER = 0.05
_ANGLE_JITTER = np.deg2rad(6.0)


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points of a shape's own frame lie in it: center (0, 0), reach 1, v points down."""
    if shape == "circle":
        return u * u + v * v <= 0.9**2
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.78
    if shape == "triangle":  # equilateral, tip up: below both flanks and above the base
        return (v <= 0.6) & (np.sqrt(3.0) * np.abs(u) - v <= 1.0)
    if shape == "cross":
        u, v = np.abs(u), np.abs(v)
        return (np.minimum(u, v) <= 0.28) & (np.maximum(u, v) <= 0.95)
    # Star: fold the plane to one half of one of its five points, where its outline is a single segment from
    # the tip (radius 1, angle 0) to the notch (radius 0.45, angle 36 degrees).
    turn = 2.0 * np.pi / 5.0
    angle = np.abs((np.arctan2(u, -v) + turn / 2.0) % turn - turn / 2.0)
    radius = np.hypot(u, v)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    notch_x, notch_y = 0.45 * np.cos(turn / 2.0), 0.45 * np.sin(turn / 2.0)
    return (x - 1.0) * notch_y - y * (notch_x - 1.0) <= 0.0


def draw(scenes: Sequence[Scene], seed: int) -> np.ndarray:
    """Draw complete scenes, each with a little jitter in place, size, angle and colour.

    Args:
        scenes: Scenes in which nothing is None.
        seed: Of the jitter. The same scenes and seed give the same pixels.

    Returns:
        (N, 64, 64, 3) float32 in 0..1.
    """
    rng = np.random.default_rng(seed)
    grounds = np.array([BACKGROUNDS[scene.background or ""] for scene in scenes], np.float32)
    grounds += rng.uniform(-_COLOUR_JITTER, _COLOUR_JITTER, grounds.shape)
    pictures = np.broadcast_to(grounds[:, None, None], (len(scenes), SIDE, SIDE, 3)).copy()

    owner = np.array([n for n, scene in enumerate(scenes) for _ in scene.things])
    things = [thing for scene in scenes for thing in scene.things]
    colour = np.array([COLOURS[thing.colour or ""] for thing in things], np.float32)
    colour += rng.uniform(-_COLOUR_JITTER, _COLOUR_JITTER, colour.shape)
    radius = np.array([_RADIUS[thing.size or ""] for thing in things])
    radius *= rng.uniform(1.0 - _RADIUS_JITTER, 1.0 + _RADIUS_JITTER, radius.shape)
    center = BOX / 2 + rng.uniform(-_CENTER_JITTER, _CENTER_JITTER, (len(things), 2))
    angle = rng.uniform(-_ANGLE_JITTER, _ANGLE_JITTER, len(things))
    corner = _CORNERS[[POSITIONS.index(thing.position or "") for thing in things]]

    ticks = ((np.arange(BOX * _SAMPLES) + 0.5) / _SAMPLES).astype(np.float32)
    for shape in SHAPES:
        of_shape = np.array([n for n, thing in enumerate(things) if thing.shape == shape], int)
        down = (ticks[None, :, None] - center[of_shape, 0, None, None]) / radius[of_shape, None, None]
        right = (ticks[None, None, :] - center[of_shape, 1, None, None]) / radius[of_shape, None, None]
        cos, sin = np.cos(angle[of_shape])[:, None, None], np.sin(angle[of_shape])[:, None, None]
        inside = _inside(shape, right * cos + down * sin, down * cos - right * sin)
        cover = inside.reshape(-1, BOX, _SAMPLES, BOX, _SAMPLES).mean((2, 4), dtype=np.float32)
        for n, mask in zip(of_shape, cover, strict=True):
            row, column = corner[n]
            box = pictures[owner[n], row : row + BOX, column : column + BOX]
            box += mask[..., None] * (colour[n] - box)
    return np.clip(pictures / 255.0, 0.0, 1.0)
