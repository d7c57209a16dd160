"""What stands in for a user's wishes where a bundle is measured, compared or calibrated, and nobody asks for any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from trimtab.program import Task
from trimtab.runtime.images import Pixels


def stand_ins(task: Task, size: tuple[int, int]) -> dict[str, Any]:
    """Any text and class, `picture` where one is given, and a mask by which all of it is drawn anew, in all steps.

    Args:
        task: What is measured. Its own strength may leave none of few steps.
        size: (width, height) in pixels.

    Returns:
        ``prompt``, ``label``, ``image``, ``mask``, ``control`` and ``strength`` as
        `trimtab.runtime.load.Pipeline.prepare` takes them, as far as the task has them.
    """
    kinds = {spec.source.get("kind") for spec in task.inputs}
    width, height = size
    made: dict[str, tuple[str, Callable[[], Any]]] = {
        "tokens": ("prompt", lambda: "a picture"),
        "label": ("label", lambda: 0),
        "image": ("image", lambda: picture(size)),
        "mask": ("mask", lambda: np.ones((height, width, 1), np.float32)),
        "control": ("control", lambda: picture(size)),
    }
    needed = {name: make() for kind, (name, make) in made.items() if kind in kinds}
    return needed if task.strength is None else needed | {"strength": 1.0}


def picture(size: tuple[int, int]) -> Pixels:
    """Noise with the spectrum of photographs: amplitude falls with frequency (Field 1987, J. Opt. Soc. Am. A 4).

    What an encoder makes of a plain colour says little about the numbers that it will meet.

    Args:
        size: (width, height) in pixels.

    Returns:
        (height, width, 3) float32 in 0..1, around 0.5; the same for the same size.
    """
    width, height = size
    white = np.random.RandomState(0).standard_normal((height, width, 3))
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequencies[0, 0] = np.inf
    spectrum = np.fft.rfft2(white, axes=(0, 1)) / frequencies[..., None]
    pink = np.fft.irfft2(spectrum, s=(height, width), axes=(0, 1))
    scaled = 0.5 + 0.25 * pink / max(pink.std(), np.finfo(np.float64).tiny)
    pixels: Pixels = np.clip(scaled, 0, 1).astype(np.float32)
    return pixels
