"""Which steps should inherit: the drift of each skip at each step, measured, and the best schedule for a speed.

The model's own trajectories are the measure; no data are needed. Searched and uniform schedules of the same speed
are then drawn to their end, and the one whose last latents lie nearest to those of full evaluations is taken: what
is chosen is never worse than uniform on the trajectories that were looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimtab.calibration.draft import draft
from trimtab.calibration.least_drift import FULL, Drift, least_drift
from trimtab.calibration.trajectories import own_requests
from trimtab.comparison import relative_error
from trimtab.errors import CalibrationError, PassError
from trimtab.passes.inherit import DENOISER, inherit, split_name
from trimtab.passes.inherit_plan import FULL as NOTHING
from trimtab.passes.inherit_plan import InheritPlan
from trimtab.passes.partition import partition, step_calls
from trimtab.passes.regions import default_region
from trimtab.program import STATE, Call, Program, Schedule, Segment
from trimtab.runtime.executor import BoundCall, Plan
from trimtab.runtime.load import Pipeline
from trimtab.targets.cost import node_costs

logger = logging.getLogger(__name__)

TRAJECTORIES = 4
"""Pictures that are drawn to measure by. Drift is a mean over all pixels: it differs little between them."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Candidate:
    """A schedule that keeps to the speed.

    Attributes:
        name: "searched", or "every N: OPTION".
        choices: For every evaluation what it skips; empty for nothing.
        macs: Multiplications of all evaluations.
        full_macs: The same if all ran in full.
        drift: Relative error (L2) of the last latents against those of full evaluations, mean of the trajectories.
    """

    name: str
    choices: tuple[str, ...]
    macs: int
    full_macs: int
    drift: float


def search(
    program: Program,
    plan: InheritPlan,
    folder: Path,
    *,
    trajectories: int = TRAJECTORIES,
    progress: Callable[[str], None] = logger.info,
) -> InheritPlan:
    """Finds the schedule of a plan that asks for a speed.

    Args:
        program: As it will be cut; its weights may lie in ``folder / "graphs"``.
        plan: With ``speed``. Its ``dense_start`` and ``dense_end`` hold; empty ``skip`` is the default region.
        folder: Where the program is drafted; what was not there before is removed again.
        trajectories: How many are drawn.
        progress: Told what was found.

    Returns:
        The same plan with ``choices`` for every schedule in the place of ``speed``.

    Raises:
        CalibrationError: No schedule is as fast as that.
        PassError: The denoiser lacks what the plan skips.
    """
    chosen = {}
    for name, found in candidates(program, plan, folder, trajectories=trajectories).items():
        best = min(found, key=lambda candidate: (candidate.drift, candidate.macs))
        others = ", ".join(f"{c.name} {c.drift:.4f}" for c in found)
        progress(f"inheritance in {name}: {best.name} (drift of the last latents: {others})")
        chosen[name] = best.choices
    return dataclasses.replace(plan, skip=_options(program, plan), choices=chosen, speed=None)


def candidates(
    program: Program, plan: InheritPlan, folder: Path, *, trajectories: int = TRAJECTORIES
) -> dict[str, list[Candidate]]:
    """Schedule -> the searched one and the uniform ones at the plan's speed. As `search`."""
    assert plan.speed is not None
    skip = _options(program, plan)
    course = Course(program, skip)
    found = {}
    with _drafted(partition(course.program), folder) as pipe:
        for name in course.schedules:
            found[name] = _of_schedule(course, name, plan, plan.speed, pipe, trajectories)
    return found


def step_macs(pipeline: Pipeline, calls: Sequence[BoundCall]) -> int:
    """The multiplications of some calls, at the sizes of what they read."""
    total = 0
    for call in calls:
        graph = ir.load(pipeline.bundle.path(pipeline.bundle.contents.segments[call.segment].graph))
        sizes = {name: buffer.shape for name, buffer in call.inputs.items()}
        total += sum(cost.macs for cost in node_costs(graph, sizes).values())
    return total


def _of_schedule(
    course: Course, name: str, plan: InheritPlan, speed: float, pipe: Pipeline, trajectories: int
) -> list[Candidate]:
    skip, evaluations = course.skip, course.schedules[name]
    requests = own_requests(pipe, trajectories, schedule=name)
    macs = course.macs(pipe, name, requests[0])
    dense = {t for t in range(evaluations) if t < plan.dense_start or t >= evaluations - plan.dense_end}
    known = Drift(macs, np.zeros((len(skip), evaluations, 0)))
    budget = known.budget(speed)

    def uniform(option: int, every: int) -> tuple[int, ...]:
        choices: list[int] = []
        since = every
        for index in range(evaluations):
            since = 1 if index in dense or since >= every else since + 1
            choices.append(FULL if since == 1 else 1 + option)
        return tuple(choices)

    named: dict[str, tuple[int, ...]] = {}
    widest = 0
    for option, text in enumerate(skip):
        for every in range(2, evaluations + 1):
            if known.cost(uniform(option, every)) <= budget:
                named[f"every {every}: {text}"] = uniform(option, every)
                widest = max(widest, every)
                break
    if not named:
        most = max(macs[FULL].sum() / known.cost(uniform(option, evaluations)) for option in range(len(skip)))
        raise CalibrationError(
            f"{name} is to be {speed} times as fast, and skipping {', '.join(skip)} gives at most "
            f"{most:.2f}: ask for less, or skip more"
        )
    # Features may grow twice as old as in the widest uniform schedule.
    drift = Drift(macs, course.errors(pipe, name, requests, min(2 * widest, evaluations - 1)))
    searched = least_drift(drift, budget, dense)
    if searched is not None:
        named = {"searched": searched} | named
    reference = [course.draw(pipe, name, request, (FULL,) * evaluations) for request in requests]
    return [
        Candidate(
            label,
            tuple(NOTHING if choice == FULL else skip[choice - 1] for choice in choices),
            drift.cost(choices),
            drift.cost((FULL,) * evaluations),
            float(
                np.mean(
                    [
                        relative_error(course.draw(pipe, name, request, choices), latents)
                        for request, latents in zip(requests, reference, strict=True)
                    ]
                )
            ),
        )
        for label, choices in named.items()
    ]


class Course:
    """A program with every evaluation of every schedule in each way: in full, then skipping each option.

    Attributes:
        program: To be cut.
        schedules: Name -> evaluations.
        skip: The options.
    """

    def __init__(self, program: Program, skip: tuple[str, ...]) -> None:
        self.skip = skip
        task_name, task = next(iter(program.tasks.items()))
        whole = {name: s for name, s in task.schedules.items() if split_name(name)[0] == name}
        self.schedules = {name: len(schedule.steps) for name, schedule in whole.items()}
        ways = {
            name: Schedule(s.steps * (1 + len(skip)), s.prologue) for name, s in whole.items()
        }  # at index way * evaluations + evaluation
        choices = {
            name: tuple(way for way in (NOTHING, *skip) for _ in range(count))
            for name, count in self.schedules.items()
        }
        one_task = {task_name: dataclasses.replace(task, schedules=ways)}
        self.program = inherit(
            dataclasses.replace(program, tasks=one_task), InheritPlan(skip=skip, choices=choices)
        )
        schedules = self.program.tasks[task_name].schedules
        self._read: dict[str, list[frozenset[str]]] = {}
        self._kept: dict[str, list[frozenset[str]]] = {}
        for name, count in self.schedules.items():
            plain, ours = ways[name].steps, schedules[name].steps
            pairs = [(a.calls, b.calls) for a, b in zip(plain, ours, strict=True)]
            self._read[name] = [_added(a, b, lambda call: call.inputs) for a, b in pairs]
            self._kept[name] = [_added(a, b, lambda call: call.outputs) for a, b in pairs[:count]]

    def macs(self, pipe: Pipeline, name: str, request: dict[str, Any]) -> npt.NDArray[np.int64]:
        """(1 + options, evaluations): multiplications of every evaluation in each way."""
        _, plan, _ = pipe.prepare(**request)
        known: dict[Any, int] = {}
        for step in plan.steps:
            if id(step.calls) not in known:  # steps that call the same share their calls
                known[id(step.calls)] = step_macs(pipe, step.calls)
        numbers = [known[id(step.calls)] for step in plan.steps]
        return np.array(numbers, np.int64).reshape(1 + len(self.skip), self.schedules[name])

    def errors(
        self, pipe: Pipeline, name: str, requests: Sequence[dict[str, Any]], ages: int
    ) -> npt.NDArray[np.float64]:
        """(options, evaluations, ages): `Drift.errors`, mean over the requests."""
        count = self.schedules[name]
        total = np.zeros((len(self.skip), count, ages))
        for options in requests:
            request, plan, _ = pipe.prepare(**options)
            plan.begin(request)
            features: list[dict[str, Array]] = []
            for index in range(count):
                before = plan.buffers[STATE].copy()
                step = plan.steps[index]
                step.run(request)
                after, latents = plan.buffers[STATE].copy(), step.results["next_sample"].copy()
                if not np.isfinite(latents).all():
                    raise CalibrationError(
                        f"the model gives numbers that are not finite at step {index} of {options}: mend its weights"
                    )
                features.append({key: plan.buffers[key].copy() for key in self._kept[name][index]})
                for option in range(len(self.skip)):
                    way = (1 + option) * count + index
                    read = self._read[name][way]
                    for age in range(1, ages + 1):
                        if age > index or not read or not read <= features[index - age].keys():
                            total[option, index, age - 1] = np.inf
                            continue
                        for key in read:
                            plan.buffers[key][...] = features[index - age][key]
                        error = relative_error(self._again(plan, way, before), latents)
                        total[option, index, age - 1] += error
                if index >= ages:
                    features[index - ages] = {}  # too old to be read from here on
                plan.buffers[STATE][...] = after
        return total / len(requests)

    def draw(self, pipe: Pipeline, name: str, options: dict[str, Any], choices: Sequence[int]) -> Array:
        """The last latents of a schedule, errors piling up as they do."""
        request, plan, _ = pipe.prepare(**options)
        plan.begin(request)
        for index, choice in enumerate(choices):
            plan.steps[choice * self.schedules[name] + index].run(request)
        last = plan.steps[choices[-1] * self.schedules[name] + len(choices) - 1]
        latents: Array = last.results["next_sample"].copy()
        return latents

    @staticmethod
    def _again(plan: Plan, way: int, state: Array) -> Array:
        """The next latents from a state, with the noise that was drawn last."""
        plan.buffers[STATE][...] = state
        step = plan.steps[way]
        step.place[...] = step.constants
        for call in step.calls:
            call.run()
        return np.asarray(step.results["next_sample"])


def _options(program: Program, plan: InheritPlan) -> tuple[str, ...]:
    if plan.skip:
        return plan.skip
    for call in step_calls(program):
        if call.segment.startswith(DENOISER):
            return (default_region(program.segments[call.segment].model),)
    raise PassError("the program has no denoiser: nothing can be inherited")


def _added(plain: Sequence[Call], ours: Sequence[Call], side: Callable[[Call], Any]) -> frozenset[str]:
    """Tensors that calls read, or write, beside those of the plain ones."""
    return frozenset(
        tensor
        for before, after in zip(plain, ours, strict=True)
        for key, tensor in side(after).items()
        if key not in side(before)
    )


@contextlib.contextmanager
def _drafted(program: Program, folder: Path) -> Iterator[Pipeline]:
    """A pipeline that leaves neither files nor references to them behind."""
    before = set(folder.rglob("*"))
    copies = {name: Segment(name, segment.model.clone()) for name, segment in program.segments.items()}
    try:
        with draft(dataclasses.replace(program, segments=copies), folder) as pipe:
            yield pipe
    finally:
        for path in sorted(set(folder.rglob("*")) - before, reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
