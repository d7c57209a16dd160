"""Searched schedules: what is measured, and that what is chosen is no worse than uniform."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trimtab.bundle import open_bundle
from trimtab.calibration.draft import draft
from trimtab.calibration.drift import Course, candidates, search
from trimtab.calibration.trajectories import own_requests
from trimtab.comparison import relative_error
from trimtab.errors import CalibrationError
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
    ours = only(bundle_folder("dit"), "ddim-20")
    plan = InheritPlan(skip=SKIP, speed=1.3, dense_end=1)
    told: list[str] = []
    chosen = search(ours, plan, tmp_path, trajectories=1, progress=told.append)
    assert not list(tmp_path.iterdir())
    found = candidates(ours, plan, tmp_path, trajectories=1)["ddim-20"]
    assert [c.name for c in found] == ["searched", "every 2: layers", "every 3: feed-forward"]
    assert "inheritance in ddim-20: searched" in told[0]
    best = min(found, key=lambda c: c.drift)
    assert chosen.choices == {"ddim-20": best.choices} and chosen.speed is None
    assert all(c.choices[0] == c.choices[-1] == "" for c in found)
    assert max(c.macs for c in found) <= found[0].full_macs / 1.3


def test_drift_is_known_for_every_age_that_a_feature_can_have(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    course = Course(only(bundle_folder("dit")), SKIP)
    with draft(partition(course.program), tmp_path) as pipe:
        requests = own_requests(pipe, 2)
        errors = course.errors(pipe, "ddim-3", requests, 2)
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
    (first, *_) = candidates(plain, plan, tmp_path / "search", trajectories=1)["ddim-3"]
    chosen = InheritPlan(skip=SKIP, choices={"ddim-3": first.choices})
    latents = []
    for name, ours in (("a", plain), ("b", partition(inherit(plain, chosen)))):
        with draft(ours, tmp_path / name) as pipe:
            request, steps, _ = pipe.prepare(**own_requests(pipe, 1)[0])
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
