"""Several denoisers in one program, each for a range of the steps: a whole one first, then a pruned one.

In the manner of A-SDM's multi-UNet switching (https://arxiv.org/abs/2406.00210) and Hybrid-SD
(https://arxiv.org/abs/2408.06646, section 3.2): the sampler's state passes from one to the other as it is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence, Set

import onnx_ir as ir

from trimtab.errors import PassError
from trimtab.passes.calls import step_calls, whole_loops
from trimtab.passes.unread import conditions
from trimtab.program import DENOISER, Call, PassEntry, Program, Segment, Step, loop_of


def switch(program: Program, others: Mapping[str, Program], ranges: Sequence[tuple[str, float]]) -> Program:
    """Gives ranges of every schedule to other programs' denoisers.

    Exact: an evaluation computes what the denoiser's own program computes from the same state.

    Args:
        program: Whose denoiser is used where no range says otherwise; everything else is its own.
        others: Name -> a program exported from the same pipeline with another denoiser. Neither may be cut yet
            (`trimtab.passes.partition`).
        ranges: (name, share of the evaluations at which it takes over, 0 to 1), in rising order.

    Returns:
        A program with the further segments ``denoiser-NAME``.

    Raises:
        PassError: A name that is not among the others, shares that do not rise, a denoiser whose inputs or
            outputs differ or that was compiled for another sampler, or one that no step would call.
    """
    starts = [start for _, start in ranges]
    if any(not 0 <= start <= 1 for start in starts) or sorted(starts) != starts:
        raise PassError(f"the denoisers take over at {starts}: shares from 0 to 1 in rising order are needed")
    segments = dict(program.segments)
    loops = whole_loops(program.tasks.values())
    optional = conditions(program).get(DENOISER, set())
    entries = []
    for name in dict.fromkeys(name for name, _ in ranges):
        if name not in others or not re.fullmatch(r"[\w-]+", name):
            raise PassError(
                f"there is no denoiser {name!r} to switch to: given are {', '.join(others) or 'none'}"
            )
        model = others[name].segments[DENOISER].model
        if difference := _difference(program.segments[DENOISER].model, model, optional):
            raise PassError(f"the denoiser {name} cannot take over: {difference}")
        if others[name].slots != program.slots:
            raise PassError(
                f"the denoiser {name} was compiled for {others[name].slots} slots of the sampler and this "
                f"program has {program.slots}: compile both with the same scheduler, steps and tasks"
            )
        theirs = whole_loops(others[name].tasks.values())
        for loop, schedule in loops.items():
            if loop not in theirs or _constants(theirs[loop].steps) != _constants(schedule.steps):
                raise another_loop(name, loop)
        segments[f"{DENOISER}-{name}"] = Segment(f"{DENOISER}-{name}", model)
        entries.append(PassEntry("Switch", f"{DENOISER}-{name}", 1, 0))

    def chosen(position: int, total: int) -> str:
        """Whose evaluation this is."""
        taken = [name for name, start in ranges if position >= round(start * total)]
        return f"{DENOISER}-{taken[-1]}" if taken else DENOISER

    def given(step: Step, segment: str) -> Step:
        read = {str(value.name) for value in segments[segment].model.graph.inputs}
        calls = tuple(
            Call(segment, {k: v for k, v in call.inputs.items() if k in read}, call.outputs)
            if call.segment == DENOISER
            else call
            for call in step.calls
        )
        return dataclasses.replace(step, calls=calls)

    tasks = {}
    for task_name, task in program.tasks.items():
        schedules = {}
        for name, schedule in task.schedules.items():
            total = len(loops[loop_of(name)].steps)
            first = total - len(schedule.steps)
            steps = tuple(
                given(step, chosen(index, total)) for index, step in enumerate(schedule.steps, first)
            )
            schedules[name] = dataclasses.replace(schedule, steps=steps)
        tasks[task_name] = dataclasses.replace(task, schedules=schedules)
    result = dataclasses.replace(program, segments=segments, tasks=tasks, passes=(*program.passes, *entries))
    called = {call.segment for call in step_calls(result)}
    if idle := [name for name in segments if name.startswith(DENOISER) and name not in called]:
        raise PassError(
            f"no step would call {idle[0]}: the schedules {', '.join(loops)} are too short for switches at "
            f"{', '.join(f'{start:g}' for start in starts)}"
        )
    return result


def another_loop(name: str, loop: str) -> PassError:
    """The error for a denoiser that was compiled without one of the program's schedules."""
    return PassError(
        f"the denoiser {name} was compiled with another {loop}, or with none: compile both with the same scheduler, "
        "steps and tasks"
    )


def _constants(steps: Sequence[Step]) -> list[dict[str, list[str]]]:
    """What tells one sampler from another, to the digits of float32 that a bundle keeps."""
    return [
        {name: [f"{value:.9g}" for value in values] for name, values in step.constants.items()}
        for step in steps
    ]


def _difference(ours: ir.Model, theirs: ir.Model, optional: Set[str]) -> str | None:
    """What keeps one graph from being called in the place of another; symbols may have other names.

    Args:
        ours: The one.
        theirs: The other.
        optional: Inputs of ours that theirs may do without.
    """
    for what in ("inputs", "outputs"):
        first, second = ({str(v.name): v for v in getattr(m.graph, what)} for m in (ours, theirs))
        lacking = optional - second.keys() if what == "inputs" else set()
        if odd := sorted((first.keys() ^ second.keys()) - lacking):
            return f"{odd[0]} is among the {what} of only one of the two"
        for name in first.keys() - lacking:
            a, b = first[name], second[name]
            if a.dtype != b.dtype or not _fits(a, b):
                return f"{name} is {b.dtype} {b.shape} there and {a.dtype} {a.shape} here"
    return None


def _fits(first: ir.Value, second: ir.Value) -> bool:
    if first.shape is None or second.shape is None or first.shape.rank() != second.shape.rank():
        return False
    pairs = zip(first.shape, second.shape, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) or isinstance(b, int))
