"""Feature inheritance: steps that read a feature which an earlier step made, and do not run what makes it.

In the manner of A-SDM (https://arxiv.org/abs/2406.00210), of which only the abstract could be read: features at
block, layer or unit level, in several modes over the steps. DeepCache is the block level with every N-th step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from trimtab.errors import PassError
from trimtab.passes.calls import denoisers, whole_loops
from trimtab.passes.inherit_plan import InheritPlan
from trimtab.passes.partition import reach
from trimtab.passes.regions import check_region, default_region, find_region
from trimtab.passes.segments import local_nodes
from trimtab.program import DENOISER, Call, PassEntry, Program, Segment, Step, loop_of


def inherit(program: Program, plan: InheritPlan) -> Program:
    """Lets steps inherit, by a plan. `trimtab.passes.partition.partition` makes the result a program that can run.

    The first evaluation of every schedule runs in full, and so does the first after another denoiser or another
    phase has begun: it has no feature to read. A plan of every first step changes nothing.

    Args:
        program: With whole denoisers; their graphs may be rewritten (`find_region`).
        plan: Without ``speed``: a search has been made.

    Returns:
        A program whose calls keep and read values inside of the denoisers.

    Raises:
        PassError: A denoiser lacks a region that the plan names, or the plan has no choices for a schedule.
    """
    if plan.every == 1:
        return program
    if plan.speed is not None:
        raise PassError("the plan asks for a speed: look for its schedule first (trimtab.calibration.drift)")
    features = {name: _Features(program.segments[name], plan) for name in denoisers(program)}
    loops = whole_loops(program.tasks.values())
    tasks = {}
    for task_name, task in program.tasks.items():
        schedules = {}
        for name, schedule in task.schedules.items():
            evaluations = len(loops[loop_of(name)].steps)
            walk = _Walk(loop_of(name), evaluations, evaluations - len(schedule.steps), plan, features)
            steps = tuple(walk.step(index, step) for index, step in enumerate(schedule.steps))
            schedules[name] = dataclasses.replace(schedule, steps=steps)
        tasks[task_name] = dataclasses.replace(task, schedules=schedules)
    entries = [
        PassEntry("Inherit", name, sum(len(region.values) for region in f.regions), 0)
        for name, f in features.items()
    ]
    return dataclasses.replace(program, tasks=tasks, passes=(*program.passes, *entries))


def check_plan(program: Program, plan: InheritPlan) -> None:
    """Refuses a plan that is for other denoisers or schedules, before the work that comes in front of `inherit`.

    Args:
        program: With whole denoisers; stays as it is.
        plan: With or without ``speed``.

    Raises:
        PassError: A denoiser lacks a region, the plan has no choices for a schedule, or names evaluations beyond all.
    """
    if plan.every == 1:
        return
    for name, segment in program.segments.items():
        if name.startswith(DENOISER):
            for region in plan.skip or (default_region(segment.model),):
                check_region(segment.model, region)
    lengths = {name: len(loop.steps) for name, loop in whole_loops(program.tasks.values()).items()}
    for name, evaluations in lengths.items():
        _choices(plan, name, evaluations)
    if plan.full and max(plan.full) >= max(lengths.values()):
        raise PassError(
            f"evaluation {max(plan.full)} is to run in full, and the longest schedule has {max(lengths.values())}: "
            "count from 0"
        )


def _choices(plan: InheritPlan, loop: str, evaluations: int) -> tuple[str, ...]:
    """What a plan has for a loop of so many evaluations; empty without choices."""
    if plan.choices and loop not in plan.choices:
        raise PassError(
            f"the plan of inheritance has no choices for the schedule {loop}: it has {', '.join(plan.choices)}"
        )
    choices = plan.choices.get(loop, ())
    if plan.choices and len(choices) != evaluations:
        raise PassError(
            f"the plan of inheritance has {len(choices)} choices for {loop}, which has {evaluations} evaluations"
        )
    return choices


Swaps = frozenset[tuple[str, str]]
"""Inner values that a call replaces by others: (value, what stands for it)."""


class _Features:
    """What can be inherited inside of one denoiser."""

    def __init__(self, segment: Segment, plan: InheritPlan) -> None:
        names = plan.skip or (default_region(segment.model),)
        self.regions = tuple(find_region(segment.model, name) for name in names)
        values = {region.name: region.values for region in self.regions}
        together = {"": tuple(v for region in self.regions for v in region.values)}
        self.options = values if plan.choices else together
        graph = segment.model.graph
        self._outputs = list(graph.outputs)
        self._local = local_nodes(graph)
        self._values = {str(v.name): v for node in graph for v in node.outputs}
        self._inputs = {str(v.name) for v in graph.inputs}
        self._computed: dict[tuple[Swaps, str | None], tuple[str, ...]] = {}
        self._tags: dict[Swaps, int] = {frozenset(): 0}

    def swaps(self, call: Call) -> Swaps:
        """What a call replaces already."""
        made = {tensor: value for value, tensor in call.outputs.items()}
        return frozenset((v, made[t]) for v, t in call.inputs.items() if v not in self._inputs and t in made)

    def computed(self, swaps: Swaps, option: str | None) -> tuple[str, ...]:
        """The features that an evaluation computes, if it skips this or nothing."""
        if (swaps, option) not in self._computed:
            given = {self._values[v]: self._values[w] for v, w in swaps}
            read = () if option is None else self.options[option]
            running = reach(self._outputs, given | {self._values[v]: None for v in read}, self._local)
            every = dict.fromkeys(v for values in self.options.values() for v in values)
            self._computed[swaps, option] = tuple(
                v for v in every if v not in read and self._values[v].producer() in running
            )
        return self._computed[swaps, option]

    def tensor(self, segment: str, swaps: Swaps, value: str) -> str:
        """Where a feature is kept. Features of different phases differ in size, and share nothing."""
        number = self._tags.setdefault(swaps, len(self._tags))
        return f"{segment}/{value}" + (f"#{number}" if number else "")


class _Walk:
    """One schedule, from its first evaluation to its last.

    Args:
        loop: Whose part it is.
        total: Evaluations of the loop.
        offset: Those that the schedule leaves out.
        plan: What to inherit.
        features: Denoiser -> what can be.
    """

    def __init__(
        self, loop: str, total: int, offset: int, plan: InheritPlan, features: Mapping[str, _Features]
    ) -> None:
        self.offset, self.total = offset, total
        self._plan = plan
        self._features = features
        self._choices = _choices(plan, loop, total)
        self._written: set[str] = set()
        self._last_full: dict[tuple[str, Swaps], int] = {}

    def step(self, index: int, step: Step) -> Step:
        """The step with what it keeps and reads."""
        return dataclasses.replace(step, calls=tuple(self._call(index, call) for call in step.calls))

    def _call(self, index: int, call: Call) -> Call:
        features = self._features.get(call.segment)
        if features is None:
            return call
        swaps = features.swaps(call)
        option = self._option(index, call.segment, swaps)

        def tensors(values: tuple[str, ...]) -> dict[str, str]:
            return {value: features.tensor(call.segment, swaps, value) for value in values}

        read = {} if option is None else tensors(features.options[option])
        if read.keys() and not self._written.issuperset(read.values()):
            option, read = None, {}
        if option is None:
            self._last_full[call.segment, swaps] = index
        kept = tensors(features.computed(swaps, option))
        self._written.update(kept.values())
        return Call(call.segment, {**call.inputs, **read}, {**call.outputs, **kept})

    def _option(self, index: int, segment: str, swaps: Swaps) -> str | None:
        """What an evaluation would skip: an option, or None for a full one."""
        position = self.offset + index
        if self._choices:
            return self._choices[position] or None
        last = self._last_full.get((segment, swaps))
        since = None if last is None else index - last
        if self._plan.wants_full(position, self.total, since):
            return None
        return ""
