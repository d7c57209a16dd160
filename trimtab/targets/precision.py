"""Which precision a device's engines have, and a program in it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

from trimtab.errors import InputError
from trimtab.passes.precision import convert
from trimtab.program import PassEntry, Program, Segment
from trimtab.targets.device import Device

logger = logging.getLogger(__name__)


def choose_precision(asked: str | None, device: Device) -> str:
    """The precision of a device's engines: what was asked for, or fp16 on a GPU and fp32 elsewhere.

    A CPU takes fp16 as well, to halve the weights on disk: ONNX Runtime casts them to float32 as it loads.

    Raises:
        InputError: The device's arithmetic does not have it.
    """
    gpu = device.sm is not None
    able = [name for name in device.precisions if name in ("fp32", "fp16", "bf16")]
    if not gpu and "fp16" not in able:
        able.append("fp16")
    if asked is None:
        return "fp16" if gpu and "fp16" in able else "fp32"
    if asked not in able:
        raise InputError(f"{device.name} has no {asked}: choose {' or '.join(able)} with --precision")
    return asked


def by_precision(devices: Iterable[Device], asked: str | None) -> dict[str, list[Device]]:
    """Devices by `choose_precision`, in the order in which precisions come up."""
    groups: dict[str, list[Device]] = {}
    for device in devices:
        groups.setdefault(choose_precision(asked, device), []).append(device)
    return groups


def in_precision(
    program: Program, precision: str, ranges: Mapping[str, Mapping[str, float]] | None
) -> Program:
    """A program whose graphs compute in another precision; graphs without products of matrices stay the same object.

    Every place that stays in float32 against the rule is logged as a warning.

    Args:
        program: Stays as it was.
        precision: "fp32", "fp16" or "bf16".
        ranges: Segment -> what `ConvertPrecision` takes; needed for fp16.
    """
    if precision == "fp32":
        return program
    segments, entries = {}, []
    for name, segment in program.segments.items():
        result = convert(segment.model, precision, None if ranges is None else ranges.get(name))
        if not result.modified:
            segments[name] = segment
            continue
        segments[name] = Segment(name, result.model)
        entries.append(
            PassEntry(f"ConvertPrecision {precision}", name, len(result.applied), len(result.refused))
        )
        for refusal in result.refused:
            logger.warning("%s: %s stays in fp32: %s", name, refusal.where, refusal.reason)
    return replace(program, segments=segments, passes=(*program.passes, *entries))
