"""What conditions alone decide, computed once: what moves, what stays, and the numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chains import entries, run_model, whole
from graphs import parsed

import trimtab
from trimtab.calibration.draft import draft
from trimtab.passes.calls import step_calls
from trimtab.passes.context import hoist_context
from trimtab.passes.hoist import hoist
from trimtab.passes.inherit import inherit
from trimtab.passes.inherit_plan import InheritPlan
from trimtab.passes.known_products import known_inputs
from trimtab.passes.partition import partition
from trimtab.passes.time_tables import tabulate_times
from trimtab.passes.unread import drop_unread
from trimtab.program import Call, Program, Schedule, Segment, Step, Task, TensorSpec
from trimtab.runtime.load import load

BundleFolder = Callable[[str], Path]


# ---- pictures ----


@pytest.mark.parametrize(
    ("family", "products"),
    [
        ("sdxl", 16),
        ("pixart_sigma", 4),
        ("sana", 4),
        ("lcm", 8),  # whose time embedding, with the guidance scale, is computed for all steps at once
    ],
)
def test_pictures_are_the_same_from_keys_and_values_of_before(
    family: str, products: int, bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    folder = bundle_folder(family)
    program = hoist_context(whole(folder))
    assert entries(program, "HoistContext") == [("denoiser", products, 0)]
    cut = drop_unread(partition(hoist(program)))
    with load(folder) as plain, draft(cut, tmp_path / "draft") as ours:
        start = {"image": np.full((64, 64, 3), 0.25, np.float32), "strength": 0.6}
        more = [start] if "image-to-image" in plain.tasks else []
        for options in ({"count": 2}, {"guidance": 1.0}, {"size": (96, 64)}, *more):
            given = {"prompt": "a red circle", "seed": 1, "schedule": 3, **options}
            np.testing.assert_allclose(ours(**given).pixels, plain(**given).pixels, atol=1e-6)


@pytest.mark.parametrize("family", ["z_image"])
def test_blocks_of_the_text_alone_are_run_once_where_the_time_steps_are_tables(
    family: str, bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    before = tabulate_times(whole(bundle_folder(family)))
    program = hoist_context(before)
    assert [applied > 0 for _, applied, _ in entries(program, "HoistContext")] == [True]
    after = drop_unread(partition(program))
    kept = after.segments["denoiser.0"].model.graph.initializers
    assert not [
        name for name in kept if name.startswith(("context_refiner", "cap_embedder")) and "weight.T" in name
    ]
    with draft(before, tmp_path / "plain") as plain, draft(after, tmp_path / "draft") as ours:
        for options in ({"count": 2}, {"guidance": 0.0}, {"size": (80, 48)}):
            given = {"prompt": "a red circle", "seed": 1, "schedule": 3, "size": (64, 64), **options}
            np.testing.assert_allclose(ours(**given).pixels, plain(**given).pixels, atol=1e-6)


@pytest.mark.xdist_group("sdxl")
def test_no_step_reads_the_text_or_the_weights_that_it_meets(bundle_folder: BundleFolder) -> None:
    program = drop_unread(partition(hoist_context(whole(bundle_folder("sdxl")))))
    step = program.segments["denoiser.0"].model.graph
    assert "encoder_hidden_states" not in {value.name for value in step.inputs}
    assert not any("attn2.to_k" in name or "attn2.to_v" in name for name in step.initializers)
    for task in program.tasks.values():
        for schedule in task.schedules.values():
            assert [call.segment for call in schedule.prologue].count("denoiser.context") == 1
    before = program.segments["denoiser.context"].model.graph
    assert [value.name for value in before.inputs] == ["encoder_hidden_states"]


@pytest.mark.xdist_group("sdxl")
def test_steps_that_inherit_read_what_was_moved(bundle_folder: BundleFolder, tmp_path: Path) -> None:
    inherited = inherit(whole(bundle_folder("sdxl")), InheritPlan(every=2))
    asked = {"prompt": "a red circle", "seed": 1, "schedule": 20}
    ours = drop_unread(partition(hoist_context(inherited)))
    assert {"denoiser.0", "denoiser.1", "denoiser.2", "denoiser.context"} <= ours.segments.keys()
    with draft(partition(inherited), tmp_path / "plain") as plain, draft(ours, tmp_path / "ours") as found:
        np.testing.assert_allclose(found(**asked).pixels, plain(**asked).pixels, atol=1e-6)


@pytest.mark.xdist_group("pixart_sigma")
def test_a_compiled_bundle_frees_them_before_the_steps_where_memory_is_low(
    pipeline_folder: BundleFolder, bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    folder = tmp_path / "pixart.bundle"
    trimtab.compile(pipeline_folder("pixart_sigma"), folder, steps=(3,), hoist=True)
    asked: dict[str, Any] = {"prompt": "a red circle", "seed": 1}
    with load(folder, low_memory=True) as low, load(bundle_folder("pixart_sigma")) as plain:
        np.testing.assert_allclose(low(**asked).pixels, plain(**asked, schedule=3).pixels, atol=1e-5)
        assert entries(whole(folder), "HoistContext") == [("denoiser", 4, 0)]


# ---- what stays ----


@pytest.mark.xdist_group("sdxl")
def test_a_second_run_moves_nothing(bundle_folder: BundleFolder) -> None:
    once = hoist_context(whole(bundle_folder("sdxl")))
    twice = hoist_context(once)
    assert (twice.segments, twice.tasks) == (once.segments, once.tasks)
    assert entries(twice, "HoistContext")[-1] == ("denoiser", 0, 1)


@pytest.mark.parametrize("family", ["ddpm", "dit", "flux"])
def test_a_denoiser_stays_in_which_conditions_alone_decide_little(
    family: str, bundle_folder: BundleFolder
) -> None:
    program = whole(bundle_folder(family))
    result = hoist_context(program)
    assert (result.segments, result.tasks) == (program.segments, program.tasks)
    assert entries(result, "HoistContext") == [("denoiser", 0, 1)]


ATTENDING = """g (float[n, 4] x, float[n, 4] text) => (float[n, 4] y)
<float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}>
{
    keys = MatMul (text, w)
    sum = Add (x, keys)
    y = Relu (sum)
}"""


def attending(*conditions: str, steps: int = 2) -> Program:
    """A program whose steps call a denoiser with each of some conditions."""
    model = parsed(ATTENDING)
    for node in model.graph:
        for value in node.outputs:
            value.shape, value.type = model.graph.inputs[0].shape, model.graph.inputs[0].type
    calls = tuple(
        Call("denoiser", {"x": f"x{index}" if index else "x", "text": text}, {"y": f"x{index + 1}"})
        for index, text in enumerate(conditions)
    )
    inputs = (
        TensorSpec("x", "float32", ("batch", 4), {"kind": "noise"}),
        *(TensorSpec(name, "float32", ("batch", 4), {"kind": "labels"}) for name in set(conditions)),
    )
    task = Task(inputs, (), {"s-2": Schedule((Step(calls),) * steps)})
    return Program({"denoiser": Segment("denoiser", model)}, {"t": task}, (), (), (8, 8), 1, None, 1)


def test_a_product_with_a_condition_is_computed_once() -> None:
    program = hoist_context(attending("text"))
    (schedule,) = program.tasks["t"].schedules.values()
    assert schedule.prologue == (Call("denoiser.context", {"text": "text"}, {"keys": "context_0"}),)
    assert {call.inputs["keys"] for call in step_calls(program)} == {"context_0"}
    text = np.arange(8, dtype=np.float32).reshape(2, 4)
    keys = run_model(program.segments["denoiser.context"].model, {"text": text})["keys"]
    np.testing.assert_array_equal(keys, text @ np.arange(1, 17, dtype=np.float32).reshape(4, 4))


def test_calls_that_give_different_conditions_keep_them() -> None:
    """Nine views of one scene, each with its own."""
    program = attending("front", "back")
    assert known_inputs(program, "denoiser") == (set(), set())
    assert entries(hoist_context(program), "HoistContext") == [("denoiser", 0, 1)]


def test_a_condition_that_a_step_writes_stays() -> None:
    program = attending("text")
    task = program.tasks["t"]
    (schedule,) = task.schedules.values()
    writing = dataclasses.replace(schedule.steps[1], calls=(Call("other", {}, {"z": "text"}),))
    later = dataclasses.replace(schedule, steps=(schedule.steps[0], writing, schedule.steps[0]))
    tasks = {"t": dataclasses.replace(task, schedules={"s-2": later})}
    assert entries(hoist_context(dataclasses.replace(program, tasks=tasks)), "HoistContext") == [
        ("denoiser", 0, 1)
    ]
