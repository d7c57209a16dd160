"""Searched schedules: what is measured, and that what is chosen is no worse than uniform."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.bundle import open_bundle
from trimtab.calibration.course import Course
from trimtab.calibration.draft import draft
from trimtab.calibration.drift import Candidate, Effort, candidates, chosen_of, search
from trimtab.calibration.trajectories import own_requests
from trimtab.comparison import relative_error
from trimtab.errors import CalibrationError, InputError
from trimtab.passes.inherit import inherit
from trimtab.passes.inherit_plan import InheritPlan
from trimtab.passes.partition import partition
from trimtab.program import Program
from trimtab.storage import read_program

BundleFolder = Callable[[str], Path]

pytestmark = pytest.mark.xdist_group("dit")

SKIP = ("layers", "feed-forward")


def only(folder: Path, schedule: str = "ddim-3") -> Program:
    """The tiny transformer with one schedule."""
    whole = read_program(open_bundle(folder))
    name, task = next(iter(whole.tasks.items()))
    kept = {key: value for key, value in task.schedules.items() if key.partition("/")[0] == schedule}
    return dataclasses.replace(whole, tasks={name: dataclasses.replace(task, schedules=kept)})


def test_what_is_chosen_is_as_fast_as_asked_and_drifts_no_more_than_uniform(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    folder = bundle_folder("dit")
    plan = InheritPlan(skip=SKIP, speed=1.3, dense_end=1)
    told: list[str] = []
    log, stage = tmp_path / "drifts", tmp_path / "stage"
    stage.mkdir()
    chosen = search(
        only(folder, "ddim-20"), plan, stage, Effort(trajectories=1, log=log), progress=told.append
    )
    assert not list(stage.iterdir())
    found = candidates(only(folder, "ddim-20"), plan, stage, Effort(trajectories=1, log=log))["ddim-20"]
    *starts, refined = found
    assert [c.name for c in starts] == ["least sum", "every 2: layers", "every 3: feed-forward"]
    assert refined.name == "refined"
    best = chosen_of(found)  # on a trajectory that was not searched by
    assert best.drift <= min(c.drift for c in found if c.name.startswith("every"))
    assert f"inheritance in ddim-20: {best.name}" in told[-1]
    assert chosen.choices == {"ddim-20": best.choices} and chosen.speed is None
    assert all(c.choices[0] == c.choices[-1] == "" for c in found)
    assert max(c.macs for c in found) <= found[0].full_macs / 1.3


@pytest.mark.parametrize(
    ("drift", "taken"), [(0.05, "refined"), (0.085, "refined"), (0.095, "every 2: layers")]
)
def test_a_uniform_schedule_gives_way_to_a_clear_lead_alone(drift: float, taken: str) -> None:
    drifts = {"least sum": 0.099, "every 2: layers": 0.1, "every 3: feed-forward": 0.15, "refined": drift}
    assert chosen_of([Candidate(name, (), 1, 2, each) for name, each in drifts.items()]).name == taken
    # Where all drift far, a lead says nothing.
    far = [Candidate(name, (), 1, 2, 10 * each) for name, each in drifts.items()]
    assert chosen_of(far).name == "every 2: layers"


def test_moves_find_what_drifts_less_than_every_schedule_that_they_start_from(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    folder = bundle_folder("dit")
    plan = InheritPlan(skip=SKIP, speed=1.3, dense_end=1)
    found = candidates(only(folder, "ddim-20"), plan, tmp_path, Effort(trajectories=1))["ddim-20"]
    course = Course(only(folder, "ddim-20"), SKIP)
    drifts = {}
    with draft(partition(course.program), tmp_path) as pipe:
        (request,) = own_requests(pipe, 1)
        full = course.draw(pipe, "ddim-20", request, (0,) * 20)
        for each in found:
            numbers = tuple(("", *SKIP).index(choice) for choice in each.choices)
            drifts[each.name] = relative_error(course.draw(pipe, "ddim-20", request, numbers), full)
    assert drifts.pop("refined") < 0.95 * min(drifts.values())


@pytest.mark.xdist_group("taesd")
def test_what_only_starts_from_pictures_is_walked_from_its_first_step(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    whole, name = read_program(open_bundle(bundle_folder("taesd"))), "image-to-image"
    task = whole.tasks[name]
    parts = {key: schedule for key, schedule in task.schedules.items() if "-3/" in key}
    program = dataclasses.replace(whole, tasks={name: dataclasses.replace(task, schedules=parts)})
    course = Course(program, ("branch 0",))
    ((loop, evaluations),) = course.schedules.items()
    assert loop.endswith("-3") and evaluations == len(parts[f"{loop}/from-0"].steps)
    with draft(partition(course.program), tmp_path) as pipe:
        (request,) = own_requests(pipe, 1, **course.requests[loop])
        full, skipping = (course.draw(pipe, loop, request, (0, way, 0)) for way in (0, 1))
        assert relative_error(skipping, full) > 0


def test_drift_is_known_for_every_age_that_a_feature_can_have(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    course = Course(only(bundle_folder("dit")), SKIP)
    with draft(partition(course.program), tmp_path) as pipe:
        requests = own_requests(pipe, 1)
        errors = course.errors(pipe, "ddim-3", requests[0], 2)
        macs = course.macs(pipe, "ddim-3", requests[0])
    can_be = [[False, False], [True, False], [True, True]]  # by evaluation, by age
    np.testing.assert_array_equal(np.isfinite(errors), [can_be, can_be])
    assert (errors > 0).all()
    assert (macs[0] > macs[1:]).all() and macs.shape == (3, 3)


def test_the_drift_of_a_candidate_is_that_of_the_compiled_schedule(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    plain = only(bundle_folder("dit"))
    plan = InheritPlan(skip=SKIP, speed=1.1)
    (first, *_) = candidates(plain, plan, tmp_path / "search", Effort(trajectories=1))["ddim-3"]
    chosen = InheritPlan(skip=SKIP, choices={"ddim-3": first.choices})
    latents = []
    for name, ours in (("a", plain), ("b", partition(inherit(plain, chosen)))):
        with draft(ours, tmp_path / name) as pipe:
            request, steps, _ = pipe.prepare(**own_requests(pipe, 2)[1])
            steps.run(request)
            latents.append(steps.steps[-1].results["next_sample"].copy())
    assert relative_error(latents[1], latents[0]) == pytest.approx(first.drift, rel=1e-3)
    assert np.isfinite(first.drift) and first.drift > 0


def test_a_speed_that_the_skips_cannot_give_is_refused_with_what_they_can(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    with pytest.raises(
        CalibrationError, match=r"20 times as fast, and skipping feed-forward gives at most 1\.\d"
    ):
        search(only(bundle_folder("dit")), InheritPlan(skip=("feed-forward",), speed=20), tmp_path)


def test_a_search_that_was_cut_off_goes_on_and_finds_the_same(
    bundle_folder: BundleFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundle_folder("dit")
    plan, log, stage = InheritPlan(skip=SKIP, speed=1.1), tmp_path / "drifts", tmp_path / "stage"
    stage.mkdir()
    drawn: list[object] = []
    draw = Course.draw

    def counted(self: Course, *arguments: Any) -> Any:
        drawn.append(arguments)
        return draw(self, *arguments)

    monkeypatch.setattr(Course, "draw", counted)
    whole = search(only(folder), plan, stage, Effort(trajectories=2, log=log))
    lines, count = log.read_text().splitlines(keepends=True), len(drawn)
    assert (
        search(only(folder), plan, stage, Effort(trajectories=2, log=log)) == whole
        and len(drawn) == count > 0
    )
    log.write_text("".join(lines[:-2]) + lines[-2][:9])  # cut off in the last line but one
    drawn.clear()
    assert search(only(folder), plan, stage, Effort(trajectories=2, log=log)) == whole
    assert 0 < len(drawn) < count and sorted(log.read_text().splitlines()) == sorted(
        "".join(lines).splitlines()
    )
    faster = dataclasses.replace(plan, speed=1.2)
    assert candidates(only(folder), faster, stage, Effort(trajectories=2, log=log))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"skip": ("layers",)},
            "holds drifts on other trajectories or skips: name another file, or remove it",
        ),
        ({"program": "ddim-20"}, "holds drifts on other trajectories or skips"),
        ({"text": "{}\n"}, "holds drifts of another model"),
        ({"text": "no drifts\n"}, "holds no drifts"),
        ({"drift": "NaN"}, "holds no drifts"),
    ],
)
def test_a_file_of_other_drifts_is_refused(
    bundle_folder: BundleFolder, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = bundle_folder("dit")
    plan, log = InheritPlan(skip=("feed-forward",), speed=1.05), tmp_path / "drifts"
    search(only(folder), plan, tmp_path, Effort(trajectories=1, moves=0, log=log))
    if "text" in change:
        log.write_text(change["text"])
    if "drift" in change:
        log.write_text(re.sub(r'"drift": [^}]*', f'"drift": {change["drift"]}', log.read_text()))
    before = log.read_text()
    plan = dataclasses.replace(plan, skip=change.get("skip", plan.skip))
    with pytest.raises(CalibrationError, match=message):
        search(only(folder, change.get("program", "ddim-3")), plan, tmp_path, Effort(log=log, trajectories=1))
    assert log.read_text() == before


def test_prompts_for_a_model_that_reads_none_are_refused(bundle_folder: BundleFolder, tmp_path: Path) -> None:
    plan = InheritPlan(skip=("layers",), speed=1.1, prompts=("a cat",))
    with pytest.raises(InputError, match="prompts were given, and the model reads none"):
        search(only(bundle_folder("dit")), plan, tmp_path)
    assert not list(tmp_path.iterdir())
