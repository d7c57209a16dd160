"""The constants of a schedule in the memory of a device: one row for each step, copied into place before it.

What calls before the steps read is there for good.

Steps that call the same then read the same buffers: they are bound once, and share one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trimtab.errors import BundleError
from trimtab.manifest import Contents
from trimtab.program import Call, Step, TensorSpec
from trimtab.runtime.sessions.base import ALIGNMENT, Backend, Buffer

Key = tuple[str, str, tuple[int, ...]]
"""Tensor name, dtype and shape."""


class Constants:
    """All constants of some steps.

    Args:
        contents: The bundle's.
        steps: Of one schedule.
        backend: Whose memory they lie in.

    Attributes:
        place: What the calls read, as bytes.
        rows: One of these for each step, to be copied into ``place``.
    """

    def __init__(self, contents: Contents, steps: Sequence[Step], backend: Backend) -> None:
        self._offsets: dict[Key, int] = {}
        size = 0
        rows: list[dict[int, bytes]] = []
        for step in steps:
            row = {}
            for call in step.calls:
                for spec in contents.segments[call.segment].inputs:
                    if (name := call.inputs[spec.name]) not in step.constants:
                        continue
                    values = _values(spec, step.constants[name])
                    key = (name, spec.dtype, values.shape)
                    if key not in self._offsets:
                        self._offsets[key] = size
                        size += -(-values.nbytes // ALIGNMENT) * ALIGNMENT
                    row[self._offsets[key]] = values.tobytes()
            rows.append(row)
        size = max(size, ALIGNMENT)
        table = np.zeros((len(rows), size), np.uint8)
        for line, row in zip(table, rows, strict=True):
            for offset, data in row.items():
                line[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        on_device = backend.new(table.shape, "uint8")
        on_device[...] = table
        self.rows: tuple[Buffer, ...] = tuple(on_device[index] for index in range(len(rows)))
        self.place = backend.new((size,), "uint8")

    def buffer(self, name: str, spec: TensorSpec, values: tuple[float, ...]) -> Buffer:
        """Where a graph input reads a constant of the step."""
        array = _values(spec, values)
        offset = self._offsets[name, spec.dtype, array.shape]
        part: Buffer = self.place[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)
        return part


def once(
    contents: Contents, prologue: Sequence[Call], constants: Mapping[str, tuple[float, ...]], backend: Backend
) -> dict[str, Buffer]:
    """What calls before the steps read of a schedule's own constants, in the memory of the device.

    Args:
        contents: The bundle's.
        prologue: The calls.
        constants: The schedule's.
        backend: Whose memory they lie in.
    """
    found: dict[str, Buffer] = {}
    for call in prologue:
        for spec in contents.segments[call.segment].inputs:
            name = call.inputs[spec.name]
            if name in constants and name not in found:
                values = _values(spec, constants[name])
                found[name] = backend.new(values.shape, spec.dtype)
                found[name][...] = values
    return found


def _values(spec: TensorSpec, values: tuple[float, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    try:
        array = np.array(values, spec.dtype)
    except OverflowError:
        raise BundleError(
            f"the constant for {spec.name} is {max(values, key=abs):g}, which is no {spec.dtype}: compile again"
        ) from None
    return array.reshape(()) if not spec.shape and len(values) == 1 else array
