"""Where numbers that are not finite come from. It is only asked once a picture has some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trimtab.runtime.executor import BoundCalls, Plan
from trimtab.runtime.inputs import Request
from trimtab.runtime.sessions.base import Buffer


@dataclass(frozen=True)
class NotFinite:
    """The first tensor that is not finite.

    Attributes:
        tensor: Its name in the graph, or of an input.
        segment: Which segment wrote it; None for an input.
        step: Counted from 1; None outside of the steps.
        steps: How many there are.
    """

    tensor: str
    segment: str | None
    step: int | None
    steps: int

    def __str__(self) -> str:
        if self.segment is None:
            return f"the input {self.tensor} has them already"
        where = f" at step {self.step} of {self.steps}" if self.step is not None else ""
        return f"{self.segment} gives them first{where}, in {self.tensor}"


def first_not_finite(plan: Plan, request: Request) -> NotFinite | None:
    """Runs a plan once more, from zeros, and looks at everything that is written. Zeros are what it leaves behind.

    Args:
        plan: What gave a picture that is not finite.
        request: The same, with its noise from the beginning.

    Returns:
        None where all is finite this time.
    """
    plan.clear()
    try:
        return _first(plan, request)
    finally:
        plan.clear()


def _first(plan: Plan, request: Request) -> NotFinite | None:
    count = len(plan.steps)
    plan.fill(request)
    if bad := _bad({spec.name: plan.buffers[spec.name] for spec in plan.inputs}):
        return NotFinite(bad, None, None, count)
    if found := _walk(plan.prologue, None, count):
        return found
    for index, step in enumerate(plan.steps):
        step.begin(request)
        if found := _walk(step.bound, index + 1, count):
            return found
    return _walk(plan.epilogue, None, count)


def _walk(bound: BoundCalls, step: int | None, steps: int) -> NotFinite | None:
    for call in bound.calls:
        call.run()
        if bad := _bad(call.outputs):
            return NotFinite(bad, call.segment, step, steps)
    return None


def _bad(buffers: Mapping[str, Buffer]) -> str | None:
    for name, buffer in buffers.items():
        if np.issubdtype(buffer.dtype, np.floating) and not np.isfinite(np.asarray(buffer)).all():
            return name
    return None
