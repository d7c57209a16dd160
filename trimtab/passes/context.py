"""What the conditions alone decide, computed once before the first step.

The keys and values that the picture attends to come of the text: 13% of SDXL's weights and 12% of PixArt's make the
same numbers in every step.

    before the steps   Call("denoiser.context", {"encoder_hidden_states": ...}, {v: "context_0"})
    every step         Call("denoiser", inputs | {v: "context_0"}, outputs)
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping

import onnx_ir as ir

from trimtab.errors import PassError
from trimtab.passes.calls import denoisers, map_calls
from trimtab.passes.known_products import LEAST_SHARE, KnownProducts
from trimtab.program import Call, PassEntry, Program, Schedule, Segment, Task

logger = logging.getLogger(__name__)

CONTEXT = "HoistContext"
"""What the pass is called in reports."""


def hoist_context(program: Program) -> Program:
    """Moves products of weights with conditions out of the loop, with all that only they need.

    Exact: the same operators run on the same numbers.

    A denoiser is left as it is where such products hold less than `LEAST_SHARE` of its weights (Stable Diffusion 1.5:
    2%).

    Args:
        program: Not cut yet (`trimtab.passes.partition`). Its graphs stay as they are.

    Returns:
        A program with a segment ``NAME.context`` for a denoiser ``NAME``, whose calls read its results.
    """
    entries: list[PassEntry] = []
    segments = dict(program.segments)
    tasks = dict(program.tasks)
    tensors = 0
    for name in denoisers(program):
        segment = f"{name}.context"
        try:
            known = KnownProducts.of(program, name)
            share = known.share(known.fixed)
            if share < LEAST_SHARE:
                raise PassError(f"what reads conditions alone holds {share:.1%} of its weights")
            part = known.segment(segment, known.fixed)
        except PassError as reason:
            logger.info("%s: its conditions are read in every step: %s", name, reason)
            entries.append(PassEntry(CONTEXT, name, 0, 1))
            continue
        names = {str(v.name): f"context_{tensors + index}" for index, v in enumerate(part.graph.outputs)}
        tensors += len(names)
        segments[segment] = Segment(segment, part)
        tasks = {key: _called_first(task, name, part, names) for key, task in tasks.items()}
        tasks = map_calls(tasks, functools.partial(_reading, name, names))
        entries.append(PassEntry(CONTEXT, name, len(names), 0))
    return dataclasses.replace(program, segments=segments, tasks=tasks, passes=(*program.passes, *entries))


def _called_first(task: Task, name: str, part: ir.Model, names: Mapping[str, str]) -> Task:
    """A task whose schedules call a segment before the steps, with what the steps' calls of a denoiser are given."""

    def called(schedule: Schedule) -> Schedule:
        calls = [call for step in schedule.steps for call in step.calls if call.segment == name]
        if not calls:
            return schedule
        given = {str(value.name): calls[0].inputs[str(value.name)] for value in part.graph.inputs}
        first = Call(part.graph.name or "", given, names)
        return dataclasses.replace(schedule, prologue=(*schedule.prologue, first))

    return dataclasses.replace(task, schedules={key: called(s) for key, s in task.schedules.items()})


def _reading(name: str, names: Mapping[str, str], calls: tuple[Call, ...]) -> tuple[Call, ...]:
    """The calls of a step, of which those of a denoiser read what was computed."""
    return tuple(
        dataclasses.replace(call, inputs={**call.inputs, **names}) if call.segment == name else call
        for call in calls
    )
