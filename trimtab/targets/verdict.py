"""Whether a device has room, and what would fit where it has none."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from trimtab.errors import TargetError
from trimtab.manifest import OPERATORS_DOMAIN, Contents
from trimtab.program import DENOISER, Program
from trimtab.targets.device import Device
from trimtab.targets.estimate import Plan, plan, room

logger = logging.getLogger(__name__)

VQ_BITS = 2.25
"""A weight that --vq 2 packs: 2 bits of code, and its share of the codebooks and of what stays dense."""


def check_room(
    program: Program,
    contents: Contents,
    groups: Mapping[str, Iterable[Device]],
    sizes: Iterable[tuple[int, int]],
) -> None:
    """Refuses targets that have no room for the largest picture, before anything is built for them.

    A target with room for one stage at a time is not refused: a warning says so.

    Args:
        program: Graphs in fp32.
        contents: What the bundle will say of it.
        groups: Precision -> targets. Those whose memory is unknown, as the CPU's, are not looked at.
        sizes: (width, height) in pixels.

    Raises:
        TargetError: No room.
    """
    size = max(sizes, key=math.prod)
    for precision, devices in groups.items():
        plans: dict[tuple[str, bool], Plan] = {}
        for device in devices:
            if device.memory_bytes is None:
                continue
            like = (device.backend, device.sm is not None)
            if like not in plans:
                plans[like] = plan(program, contents, device, precision=precision, size=size)
            its = replace(plans[like], device=device.name, room_bytes=room(device))
            if not its.fits(low_memory=True):
                raise refuse(its, program, contents, device, low_memory=True)
            if not its.fits():
                logger.warning("%s", refuse(its, program, contents, device))


def refuse(
    given: Plan,
    program: Program,
    contents: Contents,
    device: Device,
    *,
    low_memory: bool = False,
) -> TargetError:
    """Why there is no room, in one line: what is needed, what takes most, and what would fit.

    Args:
        given: A plan that does not fit.
        program: What it was made of.
        contents: What it was made of.
        device: The target.
        low_memory: Whether ``--low-memory`` was reckoned with.
    """
    needed = given.low_memory_bytes if low_memory else given.peak_bytes
    most = ", ".join(f"{name} {_size(size)}" for name, size in given.largest())
    ways = list(_ways(given, program, contents, device, low_memory))
    return TargetError(
        f"{device.name} has {_size(given.room_bytes or 0)} for a bundle and {given.size[0]}x{given.size[1]} in "
        f"{given.precision} needs {_size(needed)} (most of it: {most}): "
        + (f"it would fit with {' or '.join(ways)}" if ways else "choose a device with more memory")
    )


def _ways(
    given: Plan, program: Program, contents: Contents, device: Device, low_memory: bool
) -> Iterable[str]:
    if not low_memory and given.fits(low_memory=True):
        yield "--low-memory"
    if given.precision == "fp32":
        half = next((p for p in ("fp16", "bf16") if p in device.precisions and device.sm), None)
        if half and plan(program, contents, device, precision=half, size=given.size).fits(low_memory):
            yield f"--precision {half}"
    if device.backend != "onnxruntime" and _packed(given, program, low_memory):
        yield "--vq 2"
    if smaller := _smaller(given, program, contents, device, low_memory):
        yield f"--size {smaller[0]}x{smaller[1]}"


def _packed(given: Plan, program: Program, low_memory: bool) -> bool:
    """Whether it fits once the denoiser's weights are 2-bit codes, and they are not yet."""
    if any(node.domain == OPERATORS_DOMAIN for s in program.segments.values() for node in s.model.graph):
        return False
    bits = 32 if given.precision == "fp32" else 16
    saved = sum(
        int(segment.weight_bytes * (1 - VQ_BITS / bits))
        for segment in given.segments
        if segment.name.startswith(DENOISER)
    )
    needed = given.low_memory_bytes if low_memory else given.peak_bytes
    return given.room_bytes is not None and needed - saved <= given.room_bytes


def _smaller(
    given: Plan, program: Program, contents: Contents, device: Device, low_memory: bool
) -> tuple[int, int] | None:
    """The largest of 3/4, 1/2 and 1/4 of the size that fits."""
    if contents.fixed_size is not None:
        return None
    unit = contents.size_multiple
    for part in (0.75, 0.5, 0.25):
        width, height = (max(unit, int(part * side) // unit * unit) for side in given.size)
        if (width, height) == given.size:
            continue
        smaller = plan(program, contents, device, precision=given.precision, size=(width, height))
        if smaller.fits(low_memory):
            return width, height
    return None


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e10 else f"{count / 1e9:.1f} GB"
