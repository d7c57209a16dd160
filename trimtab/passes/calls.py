"""The calls that a program's steps make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from trimtab.program import DENOISER, Call, Program, Schedule, Step, Task, loop_of


def step_calls(program: Program) -> Iterable[Call]:
    """All calls of all steps."""
    return (call for _, call in calls_in_steps(program))


def calls_in_steps(program: Program) -> Iterable[tuple[Step, Call]]:
    """All calls of all steps, each with its step."""
    for task in program.tasks.values():
        for schedule in task.schedules.values():
            for step in schedule.steps:
                yield from ((step, call) for call in step.calls)


def denoisers(program: Program) -> list[str]:
    """The denoisers that steps call; what only blends with a picture is none."""
    called = dict.fromkeys(call.segment for call in step_calls(program))
    return [name for name in called if name.startswith(DENOISER)]


def whole_loops(tasks: Iterable[Task]) -> dict[str, Schedule]:
    """Name of a loop -> the longest of all schedules that are parts of it.

    A part ends with it, and begins as many evaluations later as it is shorter: with a scheduler that evaluates twice in
    a step, its name counts those.
    """
    found: dict[str, Schedule] = {}
    for task in tasks:
        for name, schedule in task.schedules.items():
            loop = loop_of(name)
            if loop not in found or len(found[loop].steps) < len(schedule.steps):
                found[loop] = schedule
    return found


def map_calls(
    tasks: Mapping[str, Task], change: Callable[[tuple[Call, ...]], tuple[Call, ...]]
) -> dict[str, Task]:
    """Tasks with the calls of every step changed."""
    return map_steps(tasks, lambda step: dataclasses.replace(step, calls=change(step.calls)))


def map_steps(tasks: Mapping[str, Task], change: Callable[[Step], Step]) -> dict[str, Task]:
    """Tasks with every step changed."""
    return {
        name: dataclasses.replace(
            task,
            schedules={
                key: dataclasses.replace(schedule, steps=tuple(map(change, schedule.steps)))
                for key, schedule in task.schedules.items()
            },
        )
        for name, task in tasks.items()
    }
