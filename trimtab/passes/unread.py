"""What nothing reads any more, once layers are gone: inputs of a denoiser, and whatever made only them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Container

from trimtab.passes.calls import map_calls, step_calls
from trimtab.program import Call, Program, needed

logger = logging.getLogger(__name__)


def drop_unread(program: Program) -> Program:
    """A program without the conditions that its steps' graphs do not read, and without what runs for those alone.

    A U-Net without its last cross-attention does not read the text, so that no text is encoded and the bundle holds no
    encoder. What a task asks of the user stays: a prompt is taken as before, and makes no difference.

    Exact. A second run changes nothing.

    Args:
        program: Its steps' graphs are edited.
    """
    unread: dict[str, set[str]] = {}
    for name, given in conditions(program).items():
        graph = program.segments[name].model.graph
        unused = {str(v.name) for v in graph.inputs if not v.uses() and not v.is_graph_output()}
        unread[name] = given & unused
        graph.inputs[:] = [value for value in graph.inputs if value.name not in unread[name]]
    read = map_calls(
        program.tasks, lambda calls: tuple(_without(call, unread[call.segment]) for call in calls)
    )
    tasks, running = {}, list(program.epilogue)
    for key, task in read.items():
        schedules, later = {}, list(program.epilogue)
        for name, schedule in task.schedules.items():
            steps = [call for step in schedule.steps for call in step.calls]
            first = needed(schedule.prologue, [*steps, *program.epilogue])
            schedules[name] = dataclasses.replace(schedule, prologue=first)
            later += [*first, *steps]
        prologue = needed(task.prologue, later)
        tasks[key] = dataclasses.replace(task, schedules=schedules, prologue=prologue)
        running += [*prologue, *later]
    called = {call.segment for call in running}
    if idle := [name for name in program.segments if name not in called]:
        logger.warning(
            "%s left out: nothing that is left reads what comes of it, so that what it is given makes no difference",
            " and ".join(idle),
        )
    segments = {name: segment for name, segment in program.segments.items() if name in called}
    return dataclasses.replace(program, segments=segments, tasks=tasks)


def conditions(program: Program) -> dict[str, set[str]]:
    """Segments that steps call -> those of their inputs that are computed before the steps, such as a text's."""
    found: dict[str, set[str]] = {call.segment: set() for call in step_calls(program)}
    for task in program.tasks.values():
        for schedule in task.schedules.values():
            first = (*task.prologue, *schedule.prologue)
            made = {tensor for call in first for tensor in call.outputs.values()}
            for call in (call for step in schedule.steps for call in step.calls):
                found[call.segment].update(name for name, tensor in call.inputs.items() if tensor in made)
    return found


def _without(call: Call, inputs: Container[str]) -> Call:
    kept = {name: tensor for name, tensor in call.inputs.items() if name not in inputs}
    return dataclasses.replace(call, inputs=kept) if len(kept) < len(call.inputs) else call
