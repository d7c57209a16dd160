"""Which steps should inherit: the drift of each skip at each step, measured, and the best schedule for a speed.

The model's own trajectories are the measure; no data are needed. The schedule with the least summed drift and the
uniform ones are drawn to their end; the one whose last latents lie nearest to those of full evaluations is refined
by moves that are judged in the same way. All of them are then compared on other trajectories, where what is chosen
leads the uniform ones clearly: so a search that only fitted what it looked at changes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.calibration.course import Array, Choices, Course
from trimtab.calibration.draft import draft
from trimtab.calibration.journal import add, resume
from trimtab.calibration.least_drift import FULL, Drift, least_drift
from trimtab.calibration.local_moves import refine
from trimtab.calibration.ranges import fingerprint
from trimtab.calibration.trajectories import own_requests
from trimtab.comparison import relative_error
from trimtab.errors import CalibrationError, PassError
from trimtab.passes.calls import step_calls
from trimtab.passes.inherit_plan import FULL as NOTHING
from trimtab.passes.inherit_plan import InheritPlan
from trimtab.passes.partition import partition
from trimtab.passes.regions import default_region
from trimtab.program import DENOISER, Program, Segment
from trimtab.runtime.load import Pipeline

logger = logging.getLogger(__name__)

UNIFORM = "every"
"""How names of uniform schedules begin."""

LEAD = 0.9
"""The most that another schedule's drift may be of the best uniform one's, if it is to be taken in its place."""

FAR = 0.1
"""Drift from which pictures are others than those of full evaluations: to be nearer to these is not to be better."""


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        trajectories: How many are drawn to search by, and again as many to choose by. Two were not enough: on the
            sample U-Net what they favoured drifted as much as before on others.
        moves: How many schedules are drawn to refine the best one. At 30 the sample's searches had found most of what
            they find.
        log: A file that every measurement is added to as it is made. What is in it already is not made again.
    """

    trajectories: int = 4
    moves: int = 30
    log: Path | None = None


@dataclass(frozen=True)
class Candidate:
    """A schedule that keeps to the speed.

    Attributes:
        name: "least sum", "every N: OPTION", or "refined".
        choices: For every evaluation what it skips; empty for nothing.
        macs: Multiplications of all evaluations.
        full_macs: The same if all ran in full.
        drift: Relative error (L2) of the last latents against those of full evaluations, mean over the trajectories
            to choose by.
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
    effort: Effort = Effort(),
    progress: Callable[[str], None] = logger.info,
) -> InheritPlan:
    """Finds the schedule of a plan that asks for a speed.

    Args:
        program: As it will be cut; its weights may lie in ``folder / "graphs"``.
        plan: With ``speed``. Its ``dense_start`` and ``dense_end`` hold; empty ``skip`` is the default region.
        folder: Where the program is drafted; what was not there before is removed again.
        effort: How much is measured.
        progress: Told what was found.

    Returns:
        The same plan with ``choices`` for every schedule in the place of ``speed``.

    Raises:
        CalibrationError: No schedule is as fast as that; the file is of another model or of other trajectories.
        InputError: Prompts for a model that reads none.
        PassError: The denoiser lacks what the plan skips.
    """
    chosen = {}
    for name, schedules in candidates(program, plan, folder, effort, progress).items():
        best = chosen_of(schedules)
        others = ", ".join(f"{c.name} {c.drift:.4f}" for c in schedules)
        progress(f"inheritance in {name}: {best.name} (drift of the last latents: {others})")
        chosen[name] = best.choices
    return dataclasses.replace(plan, skip=_options(program, plan), choices=chosen, speed=None, prompts=())


def chosen_of(schedules: Sequence[Candidate]) -> Candidate:
    """The schedule of the least drift; the best uniform one where that leads it by little, or is far off itself.

    Such a lead says nothing of pictures (docs/inherit.md, measured picture by picture).
    """

    def least(of: Iterable[Candidate]) -> Candidate:
        return min(of, key=lambda candidate: (candidate.drift, candidate.macs))

    best, uniform = least(schedules), least(s for s in schedules if s.name.startswith(UNIFORM))
    return best if best.drift < min(LEAD * uniform.drift, FAR) else uniform


def candidates(
    program: Program,
    plan: InheritPlan,
    folder: Path,
    effort: Effort = Effort(),
    progress: Callable[[str], None] = logger.info,
) -> dict[str, list[Candidate]]:
    """Schedule -> the one of the least sum, the uniform ones, and the best of them refined. As `search`."""
    assert plan.speed is not None
    skip = _options(program, plan)
    journal = None
    if effort.log is not None:
        journal = _Journal(effort.log, _header(program, plan, skip, effort.trajectories))
    course = Course(program, skip)
    found = {}
    with _drafted(partition(course.program), folder) as pipe:
        for name in course.schedules:
            requests = own_requests(
                pipe, 2 * effort.trajectories, prompts=plan.prompts or None, **course.requests[name]
            )
            width, height = course.requests[name]["size"]
            progress(f"measuring what {name} may skip, at {width}x{height}")
            scale = _Scale(course, pipe, name, requests, journal)
            found[name] = _of_schedule(scale, plan, plan.speed, effort.moves)
    return found


def _of_schedule(scale: _Scale, plan: InheritPlan, speed: float, moves: int) -> list[Candidate]:
    skip, evaluations, name = scale.course.skip, scale.evaluations, scale.name
    dense = {t for t in range(evaluations) if t < plan.dense_start or t >= evaluations - plan.dense_end}
    known = Drift(scale.macs, np.zeros((len(skip), evaluations, 0)))
    budget = known.budget(speed)
    named: dict[str, Choices] = {}
    widest, most = 0, 1.0
    for option, text in enumerate(skip):
        for every in range(2, evaluations + 1):
            uniform = scale.uniform(option, every, dense)
            most = max(most, float(scale.macs[FULL].sum()) / known.cost(uniform))
            if known.cost(uniform) <= budget:
                named[f"{UNIFORM} {every}: {text}"] = uniform
                widest = max(widest, every)
                break
    if not named:
        raise CalibrationError(
            f"{name} is to be {speed} times as fast, and skipping {', '.join(skip)} gives at most "
            f"{most:.2f}: ask for less, or skip more"
        )
    # No feature grows older by more than one evaluation than in the widest uniform schedule: latents of schedules with
    # older ones may lie nearer to those of full evaluations, and their pictures show less of what was asked for.
    drift = Drift(scale.macs, scale.errors(min(widest, evaluations - 1)))
    summed = least_drift(drift, budget, dense)
    if summed is not None:
        named = {"least sum": summed} | named
    drifts = {label: scale.drift(choices) for label, choices in named.items()}

    def allowed(choices: Choices) -> bool:
        return (
            drift.cost(choices) <= budget
            and np.isfinite(drift.summed(choices))
            and all(choices[index] == FULL for index in dense)
            and scale.course.can_be(name, choices)
        )

    start = named[min(drifts, key=lambda label: (drifts[label], drift.cost(named[label])))]
    refined = refine(start, len(skip), scale.drift, allowed, drift.summed, moves)
    if refined != start:
        named["refined"] = refined
    return [
        Candidate(
            label,
            tuple(NOTHING if choice == FULL else skip[choice - 1] for choice in choices),
            drift.cost(choices),
            drift.cost((FULL,) * evaluations),
            scale.drift(choices, others=True),
        )
        for label, choices in named.items()
    ]


class _Scale:
    """One schedule of a `Course`, and the trajectories that it is measured on."""

    def __init__(
        self,
        course: Course,
        pipe: Pipeline,
        name: str,
        requests: Sequence[dict[str, Any]],
        journal: _Journal | None,
    ) -> None:
        self.course, self.name, self.evaluations = course, name, course.schedules[name]
        self.macs = course.macs(pipe, name, requests[0])
        self._pipe = pipe
        self._requests = requests
        self._journal = journal
        self._full: dict[int, Array] = {}
        self._known = {} if journal is None else journal.drifts.get(name, {})

    def uniform(self, option: int, every: int, dense: set[int]) -> Choices:
        """Skips an option but at every N-th evaluation, at dense ones, and where there is nothing to read yet."""
        choices: Choices = ()
        since = every
        for index in range(self.evaluations):
            since += 1
            full = (
                index in dense or since > every or not self.course.can_be(self.name, (*choices, 1 + option))
            )
            choices = (*choices, FULL if full else 1 + option)
            since = 1 if full else since
        return choices

    def errors(self, ages: int) -> npt.NDArray[np.float64]:
        """`Drift.errors`, mean of the trajectories to search by."""
        total = np.zeros((len(self.course.skip), self.evaluations, ages))
        half = len(self._requests) // 2
        for number, request in enumerate(self._requests[:half]):
            known = None if self._journal is None else self._journal.errors.get((self.name, number))
            if known is None or known.shape[2] < ages:
                known = self.course.errors(self._pipe, self.name, request, ages)
                if self._journal is not None:
                    self._journal.add_errors(self.name, number, known)
            total += known[:, :, :ages]
        return total / half

    def drift(self, choices: Choices, *, others: bool = False) -> float:
        """Relative error of the last latents: mean of the trajectories to search by, or of the others."""
        half = len(self._requests) // 2
        numbers = range(half, 2 * half) if others else range(half)
        return float(np.mean([self._drift(number, choices) for number in numbers]))

    def _drift(self, number: int, choices: Choices) -> float:
        if (number, choices) not in self._known:
            if number not in self._full:
                self._full[number] = self._draw(number, (FULL,) * self.evaluations)
            drift = relative_error(self._draw(number, choices), self._full[number])
            # A NaN compares with nothing, and would stay the least.
            self._known[number, choices] = math.inf if math.isnan(drift) else drift
            if self._journal is not None:
                self._journal.add_drift(self.name, number, choices, self._known[number, choices])
        return self._known[number, choices]

    def _draw(self, number: int, choices: Choices) -> Array:
        return self.course.draw(self._pipe, self.name, self._requests[number], choices)


class _Journal:
    """Measurements in a file.

    Attributes:
        errors: (schedule, trajectory) -> (options, evaluations, ages) `Drift.errors`.
        drifts: Schedule -> (trajectory, choices) -> the drift of the last latents.
    """

    def __init__(self, path: Path, header: dict[str, object]) -> None:
        self.path = path
        self.errors: dict[tuple[str, int], npt.NDArray[np.float64]] = {}
        self.drifts: dict[str, dict[tuple[int, Choices], float]] = {}
        resume(path, header, self._parse, holds="drifts", measured_on="trajectories or skips")

    def add_errors(self, schedule: str, number: int, errors: npt.NDArray[np.float64]) -> None:
        listed = errors.astype(object)
        listed[np.isinf(errors)] = None  # JSON has no infinity
        add(self.path, {"schedule": schedule, "trajectory": number, "errors": listed.tolist()})

    def add_drift(self, schedule: str, number: int, choices: Choices, drift: float) -> None:
        listed = None if math.isinf(drift) else drift
        add(self.path, {"schedule": schedule, "trajectory": number, "choices": choices, "drift": listed})

    def _parse(self, entry: dict[str, Any]) -> None:
        schedule, number = str(entry["schedule"]), int(entry["trajectory"])
        if "errors" in entry:
            errors = np.array(entry["errors"], np.float64)
            if errors.ndim != 3:
                raise ValueError("errors by option, evaluation and age are needed")
            self.errors[schedule, number] = np.where(np.isnan(errors), np.inf, errors)
        else:
            choices = tuple(int(choice) for choice in entry["choices"])
            drift = math.inf if entry["drift"] is None else float(entry["drift"])
            if math.isnan(drift):
                raise ValueError("a drift that is no number")
            self.drifts.setdefault(schedule, {})[number, choices] = drift


def _header(
    program: Program, plan: InheritPlan, skip: tuple[str, ...], trajectories: int
) -> dict[str, object]:
    """What measurements depend on beside the graphs: their schedules, and what is drawn and skipped."""
    task = next(iter(program.tasks.values()))
    loops = hashlib.sha256(repr((program.size, task.guidance, task.schedules)).encode()).hexdigest()
    return {
        "schema": 1,
        "fingerprint": fingerprint(program),
        "schedules": loops,
        "skip": list(skip),
        "prompts": list(plan.prompts),
        "trajectories": trajectories,
    }


def _options(program: Program, plan: InheritPlan) -> tuple[str, ...]:
    if plan.skip:
        return plan.skip
    for call in step_calls(program):
        if call.segment.startswith(DENOISER):
            return (default_region(program.segments[call.segment].model),)
    raise PassError("the program has no denoiser: nothing can be inherited")


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
