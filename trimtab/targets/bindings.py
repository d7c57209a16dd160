"""The sizes that every segment is given when a picture of some size is drawn.

The runtime itself says it: a plan is made as for a picture, with sessions that only take note. So an engine of fixed
sizes fits what the runtime will bind to it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from trimtab.errors import TargetError
from trimtab.manifest import Contents
from trimtab.program import Call, Schedule, Step, Task
from trimtab.runtime.arguments import for_size, guidance_scale
from trimtab.runtime.executor import make_plan
from trimtab.runtime.inputs import Noise, Request, text_length
from trimtab.runtime.sessions import Buffer, Run, Session, open_backend

Shapes = Mapping[str, tuple[int, ...]]
"""Graph input -> its sizes."""


def segment_shapes(contents: Contents, size: tuple[int, int]) -> dict[str, tuple[Shapes, ...]]:
    """What every segment is bound to, for one picture with the guidance that the model has by default.

    Args:
        contents: Of a bundle; engines are not looked at.
        size: (width, height) in pixels.

    Returns:
        Segment -> the distinct shapes that it is called with; one for nearly all, and none for those that only
        pictures of other sizes call.

    Raises:
        InputError: A size that a schedule cannot take.
        TargetError: A segment that nothing calls.
    """
    found: dict[str, dict[Any, Shapes]] = {name: {} for name in contents.segments}
    for task in contents.tasks.values():
        longest = text_length(task.inputs, None)
        symbols = Request(1, _rows(task), size, Noise(()), tokens=longest).symbols
        seen = set()
        for schedule in _walked(task, size):
            short = _shortened(schedule)
            counts = sorted((name, len(values)) for name, values in short.constants.items())
            look = (*map(_look, short.prologue), *counts, None, *map(_step_look, short.steps))
            if look not in seen:
                seen.add(look)
                make_plan(
                    contents,
                    task,
                    short,
                    symbols,
                    functools.partial(_noting, found),
                    open_backend("onnxruntime"),
                )
    called = {
        call.segment
        for task in contents.tasks.values()
        for schedule in task.schedules.values()
        for step in schedule.steps
        for call in step.calls
    }
    if idle := [name for name, shapes in found.items() if not shapes and name not in called]:
        raise TargetError(f"nothing calls the segment {idle[0]}, so its sizes are unknown: remove it")
    return {name: tuple(shapes.values()) for name, shapes in found.items()}


def _walked(task: Task, size: tuple[int, int]) -> Iterable[Schedule]:
    """The schedules that pictures of a size walk."""
    for name in dict.fromkeys(re.sub(r"/\d+x$", "", name) for name in task.schedules):
        yield for_size(task, name, size)[1]


def _noting(found: Mapping[str, dict[Any, Shapes]], segment: str, inputs: Mapping[str, Buffer]) -> Session:
    return _Notes(found[segment])


class _Notes:
    """A session that notes what is bound to it."""

    def __init__(self, shapes: dict[Any, Shapes]) -> None:
        self._shapes = shapes

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Run:
        shapes = {name: array.shape for name, array in inputs.items()}
        self._shapes[tuple(sorted(shapes.items()))] = shapes
        return lambda: None

    def close(self) -> None:
        pass


def _rows(task: Task) -> int:
    return guidance_scale(task, {str(spec.source.get("kind")): spec for spec in task.inputs}, None)[1]


def _shortened(schedule: Schedule) -> Schedule:
    """The same loop with every step only once: what is bound depends on the calls and not on the numbers, but on how
    many there are."""
    steps: dict[Any, Step] = {}
    for step in schedule.steps:
        steps.setdefault((_step_look(step), step.draws), step)
    return dataclasses.replace(schedule, steps=tuple(steps.values()))


def _step_look(step: Step) -> Any:
    counts = sorted((name, len(values)) for name, values in step.constants.items())
    return (*map(_look, step.calls), *counts)


def _look(call: Call) -> Any:
    return (call.segment, *sorted(call.inputs.items()), *sorted(call.outputs.items()))
