"""A decoder that is run tile by tile, so that it takes the memory of one tile however large the picture is.

Tiles overlap and are blended where they do, as in diffusers' ``tiled_decode``. It differs in one thing: all tiles are
of one size, as an engine may have been built for that alone, so that they are spread evenly and the last one is not
cut off. The picture is not exactly that of the whole decoder: norms and attention see a tile and not the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from trimtab.errors import InputError
from trimtab.manifest import SegmentEntry
from trimtab.runtime.arguments import is_whole
from trimtab.runtime.sessions.base import Backend, Buffer, Run, Session
from trimtab.shapes import bind, shape

OVERLAP = 4
"""Neighbours share one part in so many of a tile at least: diffusers' ``tile_overlap_factor`` of 0.25."""


def windows(whole: int, tile: int, factor: int) -> list[tuple[int, npt.NDArray[np.float32]]]:
    """Where tiles lie along one axis, and how much each counts there.

    Args:
        whole: Latents along the axis.
        tile: Latents of a tile, `OVERLAP` to ``whole``.
        factor: Pixels to a latent.

    Returns:
        For each tile its first latent, and the weights of its ``tile * factor`` pixels. They fall linearly to 0 over
        what it shares with a neighbour, and those of all tiles add up to 1 at every pixel.
    """
    shared = tile // OVERLAP
    count = 1 if tile == whole else -(-(whole - shared) // (tile - shared))
    first = [round(k * (whole - tile) / (count - 1)) if k else 0 for k in range(count)]
    place = np.arange(tile * factor)
    total = np.zeros(whole * factor)
    ramps = []
    for k, start in enumerate(first):
        ramp = np.ones(tile * factor)
        if k > 0:
            ramp = np.minimum(ramp, place / ((first[k - 1] + tile - start) * factor))
        if k + 1 < count:
            ramp = np.minimum(ramp, (len(place) - place) / ((start + tile - first[k + 1]) * factor))
        total[start * factor :][: len(place)] += ramp
        ramps.append(ramp)
    return [
        (start, (ramp / total[start * factor :][: len(place)]).astype(np.float32))
        for start, ramp in zip(first, ramps, strict=True)
    ]


def bind_tiled(
    segment: SegmentEntry,
    inputs: Mapping[str, Buffer],
    outputs: Mapping[str, Buffer],
    side: int,
    session: Callable[[str, Mapping[str, Buffer]], Session],
    backend: Backend,
) -> Run:
    """Binds a decoder to its buffers, to be run on tiles of them; on the whole where it is no larger than a tile.

    Args:
        segment: Reads latents (batch, channels, h, w), and writes a picture (batch, h * factor, w * factor, colors).
        inputs: Graph input -> the whole latents.
        outputs: Graph output -> the whole picture.
        side: Of a tile, in pixels.
        session: Gives the loaded engine of a segment for what it will read.
        backend: Whose engines they are.

    Raises:
        InputError: No tile can have this side, or no tile can be cut for this segment.
    """
    factor = _factor(segment, inputs, outputs)
    if not is_whole(side) or side % factor or side < OVERLAP * factor:
        raise InputError(
            f"tiles of {side!r:.60} pixels were asked for: use a multiple of {factor}, {OVERLAP * factor} or more"
        )
    (name, latents), (result, picture) = *inputs.items(), *outputs.items()
    batch, channels, *sizes = latents.shape
    height, width = (min(side // factor, size) for size in sizes)
    if [height, width] == sizes:
        return session(segment.name, inputs).bind(inputs, outputs)
    part = backend.new((batch, channels, height, width), latents.dtype.name)
    piece = backend.new((batch, height * factor, width * factor, picture.shape[3]), picture.dtype.name)
    decode = session(segment.name, {name: part}).bind({name: part}, {result: piece})
    rows, columns = windows(sizes[0], height, factor), windows(sizes[1], width, factor)

    def run() -> None:
        source = np.asarray(latents)
        whole = np.zeros(picture.shape, picture.dtype)
        for top, down in rows:
            for left, across in columns:
                part[...] = source[:, :, top : top + height, left : left + width]
                decode()
                y, x = top * factor, left * factor
                weights = (down[:, None] * across)[:, :, None]
                whole[:, y : y + len(down), x : x + len(across)] += weights * np.asarray(piece)
        picture[...] = whole

    return run


def _factor(segment: SegmentEntry, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> int:
    """Pixels to a latent, along both sides and at any size."""
    latents, picture = next(iter(inputs.values())), next(iter(outputs.values()))
    four = len(inputs) == len(outputs) == 1 and latents.ndim == picture.ndim == 4
    if four and 0 < latents.shape[2] <= picture.shape[1]:
        factor = picture.shape[1] // latents.shape[2]
        symbols: dict[str, int] = {}
        small = (*latents.shape[:2], OVERLAP, OVERLAP)
        if bind(segment.inputs[0].shape, small, symbols) is None:
            sides = shape(segment.outputs[0].shape, symbols)[1:3]
            whole = tuple(size * factor for size in latents.shape[2:])
            if picture.shape[1:3] == whole and sides == (OVERLAP * factor,) * 2:
                return factor
    raise InputError(
        f"{segment.name} cannot be run on tiles, as it does not turn latents (batch, channels, h, w) of any size into "
        "a picture (batch, height, width, colors): ask without a tile"
    )
