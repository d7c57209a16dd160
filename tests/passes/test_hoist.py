"""Products of the time and the conditions, moved out of the loop: what moves, when nothing does, and the numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chains import chain, entries, run_model, whole
from graphs import parsed

import trimtab
from trimtab.calibration.draft import draft
from trimtab.errors import PassError
from trimtab.passes.all_steps import for_all_steps
from trimtab.passes.calls import step_calls
from trimtab.passes.hoist import hoist
from trimtab.passes.inherit import inherit
from trimtab.passes.inherit_plan import InheritPlan
from trimtab.passes.partition import partition
from trimtab.passes.unread import drop_unread
from trimtab.program import Call, Program, Schedule, Segment, Step, Task, TensorSpec, loop_of
from trimtab.runtime.load import load

BundleFolder = Callable[[str], Path]


# ---- pictures ----


@pytest.mark.parametrize(
    ("family", "products", "asked"),
    [
        ("dit", 3, {"label": 3}),
        ("sd3", 5, {"prompt": "a red circle"}),
        # Its time steps follow the size of the picture: they are rows of a table, and no constants.
        ("flux", 5, {"prompt": "a red circle", "size": (96, 64)}),
    ],
)
def test_a_transformer_draws_the_same_with_its_modulations_computed_before(
    family: str, products: int, asked: dict[str, Any], bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    folder = bundle_folder(family)
    program = hoist(whole(folder))
    assert entries(program, "Hoist") == [("denoiser", products, 0)]
    cut = drop_unread(partition(program))
    with load(folder) as plain, draft(cut, tmp_path / "draft") as hoisted:
        width, height = asked.get("size", (64, 64))
        start = {"image": np.full((height, width, 3), 0.25, np.float32), "strength": 0.6}
        more = [start] if "image-to-image" in plain.tasks else []
        for options in ({"count": 2}, {"guidance": 1.0}, {"schedule": 20}, *more):
            given = {"seed": 1, "schedule": 3, **asked, **options}
            np.testing.assert_allclose(hoisted(**given).pixels, plain(**given).pixels, atol=1e-6)


@pytest.mark.xdist_group("dit")
def test_no_step_reads_the_weights_that_were_moved(bundle_folder: BundleFolder) -> None:
    program = drop_unread(partition(hoist(whole(bundle_folder("dit")))))
    assert list(program.segments) == ["denoiser.0", "vae_decoder", "denoiser.conditions"]
    step = program.segments["denoiser.0"].model.graph
    assert not any("norm1" in name or "proj_out_1" in name for name in step.initializers)
    assert "timestep" not in {value.name for value in step.inputs}
    assert all(call.segment == "denoiser.0" for call in step_calls(program))


@pytest.mark.xdist_group("dit")
def test_a_second_picture_of_the_same_plan_has_the_same_time_steps(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    """A plan is cleared to zeros where a picture was not finite."""
    cut = drop_unread(partition(hoist(whole(bundle_folder("dit")))))
    with draft(cut, tmp_path / "draft") as pipe:
        first = pipe(label=3, seed=1, schedule=3).pixels
        request, plan, _ = pipe.prepare(label=3, seed=1, schedule=3)
        plan.clear()
        plan.run(request)
        np.testing.assert_array_equal(plan.buffers["picture"], first)


@pytest.mark.xdist_group("dit")
def test_a_bundle_says_the_time_steps_of_its_schedules(bundle_folder: BundleFolder) -> None:
    program = drop_unread(partition(hoist(whole(bundle_folder("dit")))))
    (task,) = program.tasks.values()
    schedule = task.schedules["ddim-3"]
    (first,) = schedule.prologue
    plain = whole(bundle_folder("dit")).tasks["class-to-image"].schedules["ddim-3"]
    times = tuple(step.constants["timestep"][0] for step in plain.steps)
    assert schedule.constants == {first.inputs["timestep"]: times}
    rows = [call.inputs["linear_2"] for step in schedule.steps for call in step.calls]
    assert rows == [f"{first.outputs['linear_2']}[{index}]" for index in range(3)]


@pytest.mark.xdist_group("dit")
def test_steps_that_inherit_read_what_was_moved(bundle_folder: BundleFolder, tmp_path: Path) -> None:
    inherited = inherit(whole(bundle_folder("dit")), InheritPlan(skip=("layers",), every=2))
    asked = {"label": 3, "seed": 1, "schedule": 20}
    with (
        draft(partition(inherited), tmp_path / "plain") as plain,
        draft(drop_unread(partition(hoist(inherited))), tmp_path / "hoisted") as hoisted,
    ):
        np.testing.assert_allclose(hoisted(**asked).pixels, plain(**asked).pixels, atol=1e-6)


@pytest.mark.xdist_group("sd3")
def test_schedules_that_start_later_share_an_engine_with_the_whole_one(bundle_folder: BundleFolder) -> None:
    program = hoist(whole(bundle_folder("sd3")))
    schedules = program.tasks["image-to-image"].schedules
    constants = {
        name: schedule.constants for name, schedule in schedules.items() if loop_of(name).endswith("-3")
    }
    assert len(constants) > 1
    assert len({repr(values) for values in constants.values()}) == 1
    later = next(schedule for name, schedule in schedules.items() if name.endswith("-3/from-2"))
    (row,) = {
        tensor.rpartition("[")[2]
        for tensor in later.steps[0].calls[0].inputs.values()
        if "conditions" in tensor
    }
    assert row == "2]"


def test_a_compiled_bundle_is_hoisted(pipeline_folder: BundleFolder, tmp_path: Path) -> None:
    folder = tmp_path / "dit.bundle"
    trimtab.compile(pipeline_folder("dit"), folder, steps=(3,), hoist=True)
    with load(folder) as pipe:
        passes = pipe.bundle.contents.passes
        first = pipe(label=3, seed=1).pixels
    assert ("Hoist", 3) in [(entry.name, entry.applied) for entry in passes]
    with load(folder, low_memory=True) as pipe:
        np.testing.assert_array_equal(pipe(label=3, seed=1).pixels, first)


# ---- what stays ----


@pytest.mark.xdist_group("dit")
def test_a_second_run_moves_nothing(bundle_folder: BundleFolder, caplog: pytest.LogCaptureFixture) -> None:
    once = hoist(whole(bundle_folder("dit")))
    with caplog.at_level(logging.WARNING):
        twice = hoist(once)
    assert (twice.segments, twice.tasks) == (once.segments, once.tasks)
    assert entries(twice, "Hoist")[-1] == ("denoiser", 0, 1)
    assert "denoiser: nothing is computed before the steps" in caplog.text


@pytest.mark.xdist_group("ddpm")
def test_a_u_net_stays_as_it_is_and_says_how_little_there_is(
    bundle_folder: BundleFolder, caplog: pytest.LogCaptureFixture
) -> None:
    program = whole(bundle_folder("ddpm"))
    with caplog.at_level(logging.WARNING):
        result = hoist(program)
    assert (result.segments, result.tasks) == (program.segments, program.tasks)
    assert entries(result, "Hoist") == [("denoiser", 0, 1)]
    assert "nothing is computed before the steps" in caplog.text


def test_what_reads_no_time_stays() -> None:
    step = Step((Call("denoiser", {"x0": "x"}, {"x5": "y"}),))
    task = Task(
        (TensorSpec("x", "float32", ("batch", 1, 8), {"kind": "noise"}),), (), {"s-2": Schedule((step,) * 2)}
    )
    program = Program({"denoiser": Segment("denoiser", chain(5))}, {"t": task}, (), (), (8, 8), 1, None, 1)
    assert entries(hoist(program), "Hoist") == [("denoiser", 0, 1)]


# ---- one graph for all steps ----

EXPANDED = """g (float time, float[rows, 2] text) => (float[rows, 3] y)
<float[3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 10}, int64[1] one = {1}>
{
    vector = Reshape (time, one)
    count = Shape <start: int = 0, end: int = 1> (text)
    times = Expand (vector, count)
    column = Unsqueeze (times, one)
    both = Concat <axis: int = 1> (column, text)
    y = MatMul (both, w)
}"""


MORE_AXES = EXPANDED.replace("float[rows, 3] y", "float[rows, 2, 3] y").replace(
    "y = MatMul (both, w)",
    """line = MatMul (both, w)
    lines = Unsqueeze (line, one)
    y = Concat <axis: int = 1> (lines, lines)""",
)


@pytest.mark.parametrize("text_form", [EXPANDED, MORE_AXES])
def test_steps_become_rows_and_every_result_is_that_of_its_step(text_form: str) -> None:
    text = np.arange(8, dtype=np.float32).reshape(4, 2)
    times = np.array([3, 1, 2], np.float32)
    each = [run_model(parsed(text_form), {"time": np.array(time), "text": text})["y"] for time in times]
    model = parsed(text_form)
    for_all_steps(model, "time")
    np.testing.assert_array_equal(run_model(model, {"time": times, "text": text})["y"], np.stack(each))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "vector = Reshape (time, one)",
            "half = Mul (time, time)\n    vector = Reshape (half, one)",
            "is not repeated",
        ),
        (
            "column = Unsqueeze (times, one)",
            "c = Mul (vector, times)\n    column = Unsqueeze (c, one)",
            "is not repeated",
        ),
        ("float[rows, 2] text", "float[other, 2] text", "no condition has as many rows"),
        ("float[rows, 3] y", "float[4, 3] y", "not all as many rows"),
    ],
)
def test_a_graph_without_a_time_step_for_each_row_is_refused(old: str, new: str, message: str) -> None:
    model = parsed(EXPANDED.replace(old, new))
    with pytest.raises(PassError, match=message):
        for_all_steps(model, "time")
