"""A program with every evaluation in every way, to try skips on: what each costs, and what it does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.calibration.least_drift import FULL
from trimtab.comparison import relative_error
from trimtab.errors import CalibrationError
from trimtab.passes.calls import whole_loops
from trimtab.passes.inherit import inherit
from trimtab.passes.inherit_plan import FULL as NOTHING
from trimtab.passes.inherit_plan import InheritPlan
from trimtab.program import STATE, Call, Program, Schedule
from trimtab.runtime.executor import BoundCall, Plan
from trimtab.runtime.load import Pipeline
from trimtab.storage import read_graph
from trimtab.targets.cost import node_costs

Array = npt.NDArray[Any]

Choices = tuple[int, ...]
"""For every evaluation `FULL`, or 1 + the option that it skips."""


class Course:
    """A program with every evaluation of every schedule in each way: in full, then skipping each option.

    Attributes:
        program: To be cut.
        schedules: Name -> evaluations.
        requests: Name -> what asks `Pipeline.prepare` for that schedule: the plain one's name and a size at which it is
            walked, the native one or, for a schedule of larger pictures, the smallest.
        skip: The options.
    """

    def __init__(self, program: Program, skip: tuple[str, ...]) -> None:
        self.skip = skip
        task_name, task = next(iter(program.tasks.items()))
        whole = whole_loops([task])
        self.schedules = {name: len(schedule.steps) for name, schedule in whole.items()}
        self.requests: dict[str, dict[str, Any]] = {
            name: {"schedule": name.partition("/")[0], "size": _least_size(program.size, schedule)}
            for name, schedule in whole.items()
        }
        ways = {
            name: dataclasses.replace(s, steps=s.steps * (1 + len(skip))) for name, s in whole.items()
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
        for name in self.schedules:
            pairs = [(a.calls, b.calls) for a, b in zip(ways[name].steps, schedules[name].steps, strict=True)]
            self._read[name] = [_added(a, b, lambda call: call.inputs) for a, b in pairs]
            self._kept[name] = [_added(a, b, lambda call: call.outputs) for a, b in pairs]

    def can_be(self, name: str, choices: Choices) -> bool:
        """Whether every evaluation reads only what an earlier one kept: another denoiser's features are not its."""
        kept: set[str] = set()
        for index, choice in enumerate(choices):
            way = choice * self.schedules[name] + index
            if not self._read[name][way] <= kept or (choice != FULL and not self._read[name][way]):
                return False
            kept |= self._kept[name][way]
        return True

    def macs(self, pipe: Pipeline, name: str, request: dict[str, Any]) -> npt.NDArray[np.int64]:
        """(1 + options, evaluations): multiplications of every evaluation in each way."""
        _, plan, _ = pipe.prepare(**request)
        known: dict[Any, int] = {}
        numbers = [step_macs(pipe, step.calls, known) for step in plan.steps]
        return np.array(numbers, np.int64).reshape(1 + len(self.skip), self.schedules[name])

    def errors(
        self, pipe: Pipeline, name: str, options: dict[str, Any], ages: int
    ) -> npt.NDArray[np.float64]:
        """(options, evaluations, ages): `Drift.errors` on one trajectory.

        Raises:
            CalibrationError: The model gives numbers that are not finite.
        """
        count = self.schedules[name]
        errors = np.full((len(self.skip), count, ages), np.inf)
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
                for age in range(1, min(index, ages) + 1):
                    if not read or not read <= features[index - age].keys():
                        continue
                    for key in read:
                        plan.buffers[key][...] = features[index - age][key]
                    errors[option, index, age - 1] = relative_error(self._again(plan, way, before), latents)
            if index >= ages:
                features[index - ages] = {}  # too old to be read from here on
            plan.buffers[STATE][...] = after
        return errors

    def draw(self, pipe: Pipeline, name: str, options: dict[str, Any], choices: Choices) -> Array:
        """The last latents of a schedule, errors piling up as they do."""
        request, plan, _ = pipe.prepare(**options)
        plan.begin(request)
        for index, choice in enumerate(choices):
            step = plan.steps[choice * self.schedules[name] + index]
            step.run(request)
        latents: Array = step.results["next_sample"].copy()
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


def step_macs(pipeline: Pipeline, calls: Sequence[BoundCall], known: dict[Any, int] | None = None) -> int:
    """The multiplications of some calls, at the sizes of what they read.

    Args:
        pipeline: Theirs.
        calls: Of a step.
        known: Of other steps of the pipeline, whose segments are counted once for each of their sizes; takes new ones.
    """
    known = {} if known is None else known
    total = 0
    for call in calls:
        sizes = {name: tuple(buffer.shape) for name, buffer in call.inputs.items()}
        key = (call.segment, tuple(sizes.items()))
        if key not in known:
            graph = read_graph(pipeline.bundle, pipeline.bundle.contents.segments[call.segment].graph)
            known[key] = sum(cost.macs for cost in node_costs(graph, sizes).values())
        total += known[key]
    return total


def _least_size(native: tuple[int, int], schedule: Schedule) -> tuple[int, int]:
    """The smallest (width, height), in the proportion of the native one, at which a schedule is walked."""
    if not schedule.least_pixels:
        return native
    scale = math.sqrt(schedule.least_pixels / math.prod(native))
    width, height = (
        math.ceil(side * scale / schedule.size_multiple) * schedule.size_multiple for side in native
    )
    return width, height


def _added(plain: Sequence[Call], ours: Sequence[Call], side: Callable[[Call], Any]) -> frozenset[str]:
    """Tensors that calls read, or write, beside those of the plain ones."""
    return frozenset(
        tensor
        for before, after in zip(plain, ours, strict=True)
        for key, tensor in side(after).items()
        if key not in side(before)
    )
