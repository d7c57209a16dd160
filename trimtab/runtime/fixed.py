"""Engines that were built for fixed sizes: what they can be asked for, and how the rest is made of it.

The denoiser's engines tell, as it reads the state (slots, batch, channels, height, width) and one weight for each
guidance row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from trimtab.errors import BundleError, InputError
from trimtab.manifest import Contents, Engine
from trimtab.program import STATE
from trimtab.runtime.inputs import Noise, NoiseTape, Request
from trimtab.shapes import shape

MIX = "mix"
"""The denoiser's input with one weight for each guidance row."""


@dataclass(frozen=True)
class Fixed:
    """One combination of sizes that a target's engines were built for.

    Attributes:
        batch: Pictures at a time.
        rows: Guidance rows.
        latent: Height and width of the state, or what the model has in their place.
    """

    batch: int
    rows: int
    latent: tuple[int, ...]


def fixed_sizes(contents: Contents, target: str) -> tuple[Fixed, ...]:
    """What a target's engines were built for; nothing where their sizes are open."""
    engines: Iterable[Engine] = (
        e for s in contents.segments.values() for e in s.engines if e.target == target
    )
    found = {
        Fixed(e.shapes[STATE][1], e.shapes[MIX][0], e.shapes[STATE][3:]): None
        for e in engines
        if len(e.shapes.get(STATE, ())) > 1 and e.shapes.get(MIX)
    }
    return tuple(found)


def fit(request: Request, sizes: tuple[Fixed, ...], contents: Contents) -> list[Request]:
    """A request as requests that the engines can be given one after the other.

    An engine for two guidance rows draws without guidance too: the positive row has the weight 1 and the negative
    one 0. An engine for n pictures draws more in turn, and fewer by drawing the last one several times.

    Args:
        request: What is asked for.
        sizes: From `fixed_sizes`.
        contents: The bundle's.

    Returns:
        The pictures in order; what is drawn beyond ``request.batch`` is to be dropped. Their noise is that of the
        whole request, number for number.

    Raises:
        InputError: The engines were built for another size, or without guidance.
        BundleError: They were built for what is no size.
    """
    if not sizes:
        return [request]
    latent = _latent(request, contents)
    able = [size for size in sizes if latent is None or size.latent == latent]
    if not able:
        built = ", ".join(dict.fromkeys(_size(size.latent, contents) for size in sizes))
        raise InputError(
            f"{_pixels(request.size)} was asked for and the engines were built for {built}: ask for one of them, or "
            f"compile with --size {_pixels(request.size)}"
        )
    # Rows that are not needed cost time: they are the second choice.
    able = sorted((s for s in able if s.rows >= request.rows), key=lambda s: (s.rows, -s.batch))
    if not able:
        raise InputError(
            "guidance was asked for and the engines were built without: set it to 1, or compile with --guidance"
        )
    rows = able[0].rows
    batches = [size.batch for size in able if size.rows == rows]
    batch = next((b for b in batches if b <= request.batch), batches[-1])
    if rows != request.rows:
        request = replace(request, rows=rows, guidance=float(request.unguided))
    if batch == request.batch:
        return [request]
    tape = NoiseTape(request.noise, request.batch)
    parts = []
    for start in range(0, request.batch, batch):
        pictures = [min(start + k, request.batch - 1) for k in range(batch)]
        parts.append(
            replace(
                request,
                batch=batch,
                noise=tape.part(pictures),
                prompts=tuple(request.prompts[k] for k in pictures if request.prompts),
                negatives=None
                if request.negatives is None
                else tuple(request.negatives[k] for k in pictures),
                labels=tuple(request.labels[k] for k in pictures if request.labels),
            )
        )
    return parts


def _latent(request: Request, contents: Contents) -> tuple[int, ...] | None:
    """Height and width of the state for the size that is asked for, as far as the tasks' start noise tells."""
    for task in contents.tasks.values():
        for spec in task.inputs:
            if spec.name.startswith(f"{STATE}["):
                return shape(spec.shape, request.symbols)[2:]
    return None


def _size(latent: tuple[int, ...], contents: Contents) -> str:
    """The picture's size for a state of this (height, width): in the proportion of the native ones.

    Raises:
        BundleError: The state has no height and width, or none at the native size.
    """
    native = _latent(Request(1, 1, contents.size, Noise(())), contents)
    if native is None or not len(latent) == len(native) == 2 or not all(native):
        raise BundleError(f"a state of {latent} fits no size, and {native} is the native one: compile again")
    width, height = contents.size
    return _pixels((width * latent[1] // native[1], height * latent[0] // native[0]))


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
