"""What the time step alone decides, looked up: what becomes a table, what does not, and the numbers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir.passes.common as common
import pytest
from chains import entries, run_model, whole
from graphs import parsed
from packed import random_codes

import trimtab
from trimtab.calibration.draft import draft
from trimtab.passes.calls import step_calls
from trimtab.passes.codebooks import Codebooks
from trimtab.passes.hidiffusion import hidiffusion
from trimtab.passes.hoist import hoist
from trimtab.passes.inherit import inherit
from trimtab.passes.inherit_plan import InheritPlan
from trimtab.passes.partition import partition
from trimtab.passes.time_tables import tabulate_times
from trimtab.passes.vq import PackWeights, sites
from trimtab.program import Call, Program, Schedule, Segment, Step, Task
from trimtab.runtime.load import load
from trimtab.weights import weight_bytes

BundleFolder = Callable[[str], Path]


# ---- pictures ----


@pytest.mark.parametrize(
    ("family", "products", "asked"),
    [
        ("sd15", 11, {"prompt": "a red circle"}),
        ("ddpm", 8, {}),
        (
            "pix2pix",
            5,
            {"prompt": "a red circle", "image": np.full((64, 64, 3), 0.25, np.float32)},
        ),  # a row more
        ("pixart_sigma", 2, {"prompt": "a red circle"}),  # of which one is made of the other
        ("dit", 2, {"label": 3}),
        ("z_image", 5, {"prompt": "a red circle", "size": (64, 64)}),
    ],
)
def test_pictures_are_the_same_from_tables(
    family: str, products: int, asked: dict[str, Any], bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    folder = bundle_folder(family)
    program = tabulate_times(whole(folder))
    assert entries(program, "TabulateTimes") == [("denoiser", products, 0)]
    with load(folder) as plain, draft(program, tmp_path / "draft") as ours:
        start = {"image": np.full((64, 64, 3), 0.25, np.float32), "strength": 0.6}
        more = [start] if "image-to-image" in plain.tasks else []
        rows = [] if family == "ddpm" else [{"guidance": 1.0}]
        for options in ({"count": 2}, {"schedule": 20}, *rows, *more):
            given = {"seed": 1, "schedule": 3, **asked, **options}
            np.testing.assert_allclose(ours(**given).pixels, plain(**given).pixels, atol=1e-5)


@pytest.mark.xdist_group("sd15")
def test_the_graph_has_no_weight_that_only_the_time_step_reads(bundle_folder: BundleFolder) -> None:
    program = whole(bundle_folder("sd15"))
    before = program.segments["denoiser"].model.graph
    names = set(before.initializers)
    graph = tabulate_times(program).segments["denoiser"].model.graph
    assert not any("time_emb" in name for name in graph.initializers)
    assert [value.name for value in graph.inputs if value.name in ("timestep", "time_row")] == ["time_row"]
    assert set(before.initializers) == names and "timestep" in {value.name for value in before.inputs}


@pytest.mark.xdist_group("sd15")
def test_every_step_says_its_row_and_equal_time_steps_share_one(bundle_folder: BundleFolder) -> None:
    plain = whole(bundle_folder("sd15"))
    program = tabulate_times(plain)
    times: dict[float, float] = {}
    for name, task in plain.tasks.items():
        for key, schedule in task.schedules.items():
            ours = program.tasks[name].schedules[key]
            for old, new in zip(schedule.steps, ours.steps, strict=True):
                assert old.constants["timestep"][0] not in new.constants.get("timestep", ())
                (row,) = new.constants["time_row"]
                assert times.setdefault(old.constants["timestep"][0], row) == row
    assert sorted(times.values()) == list(range(len(times)))
    reads = {call.inputs["time_row"] for call in step_calls(program) if call.segment == "denoiser"}
    assert reads == {"time_row"}


@pytest.mark.xdist_group("dit")
def test_modulations_are_computed_before_the_steps_from_tables(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    folder = bundle_folder("dit")
    program = partition(hoist(tabulate_times(whole(folder))))
    conditions = program.segments["denoiser.conditions"].model.graph
    assert [value.name for value in conditions.inputs] == ["class_labels", "time_row"]
    assert not any("timestep_embedder" in name for name in conditions.initializers)
    with load(folder) as plain, draft(program, tmp_path / "draft") as ours:
        asked = {"label": 3, "seed": 1, "schedule": 20, "count": 2}
        np.testing.assert_allclose(ours(**asked).pixels, plain(**asked).pixels, atol=1e-5)


@pytest.mark.xdist_group("sd15")
@pytest.mark.parametrize("rewrite", ["inherit", "hidiffusion"])
def test_graphs_that_are_cut_are_cut_as_before(
    rewrite: str, bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    program = whole(bundle_folder("sd15"))
    size = (128, 128) if rewrite == "hidiffusion" else (64, 64)
    program = hidiffusion(program) if rewrite == "hidiffusion" else inherit(program, InheritPlan(every=2))
    plain, ours = partition(program), partition(tabulate_times(program))
    assert ours.segments.keys() == plain.segments.keys()
    asked = {"prompt": "a red circle", "seed": 1, "schedule": 20, "size": size}
    with draft(plain, tmp_path / "plain") as theirs, draft(ours, tmp_path / "ours") as found:
        np.testing.assert_allclose(found(**asked).pixels, theirs(**asked).pixels, atol=1e-5)


@pytest.mark.xdist_group("ddpm")
@pytest.mark.parametrize("scaled", [False, True])
def test_packed_weights_are_decoded_for_the_tables(
    scaled: bool, bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    program = whole(bundle_folder("ddpm"))
    model = program.segments["denoiser"].model
    found = [site for site in sites(model) if "time_emb" in site.name]
    codes = {site.name: random_codes(site.shape, 3 if "proj" in site.name else 2, scaled) for site in found}
    PackWeights(Codebooks("", codes))(model)
    ours = tabulate_times(program)
    assert entries(ours, "TabulateTimes") == [("denoiser", 8, 0)]
    assert not any("time_emb" in name for name in ours.segments["denoiser"].model.graph.initializers)
    with draft(program, tmp_path / "plain") as theirs, draft(ours, tmp_path / "ours") as drawn:
        np.testing.assert_allclose(
            drawn(seed=1, schedule=3).pixels, theirs(seed=1, schedule=3).pixels, atol=1e-5
        )


@pytest.mark.xdist_group("ddpm")
def test_a_u_net_is_compiled_with_tables_and_nothing_is_warned_of(
    pipeline_folder: BundleFolder,
    bundle_folder: BundleFolder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "ddpm.bundle"
    with caplog.at_level(logging.WARNING):
        trimtab.compile(pipeline_folder("ddpm"), folder, steps=(3,), hoist=True)
    assert "before the steps" not in caplog.text
    assert entries(whole(folder), "TabulateTimes") == [("denoiser", 8, 0)]
    with load(folder) as ours, load(bundle_folder("ddpm")) as plain:
        np.testing.assert_allclose(ours(seed=1).pixels, plain(seed=1, schedule=3).pixels, atol=1e-5)
    with pytest.raises(trimtab.TrimtabError, match="compile one without --hoist"):
        trimtab.Denoiser(folder, torch_module())


def torch_module() -> Any:
    import torch

    module = torch.nn.Module()
    module.config = torch.nn.Module()
    return module


# ---- what stays ----


@pytest.mark.xdist_group("ddpm")
def test_a_second_run_changes_nothing(bundle_folder: BundleFolder) -> None:
    once = tabulate_times(whole(bundle_folder("ddpm")))
    twice = tabulate_times(once)
    assert (twice.segments, twice.tasks) == (once.segments, once.tasks)
    assert entries(twice, "TabulateTimes")[-1] == ("denoiser", 0, 1)


@pytest.mark.parametrize("family", ["lcm", "flux"])
def test_what_depends_on_guidance_or_size_too_stays(family: str, bundle_folder: BundleFolder) -> None:
    """An LCM's time embedding reads the guidance scale; Flux's time steps follow the size of the picture."""
    program = whole(bundle_folder(family))
    result = tabulate_times(program)
    assert (result.segments, result.tasks) == (program.segments, program.tasks)
    assert entries(result, "TabulateTimes") == [("denoiser", 0, 1)]


def numbers(count: int) -> str:
    return ", ".join(f"{number:.3f}" for number in np.random.default_rng(count).standard_normal(count))


TIMED = f"""g (float timestep, float[rows, 2] x) => (float[rows, 16] y)
<float[1, 16] w = {{{numbers(16)}}}, float[16, 16] v = {{{numbers(256)}}}, int64[1] one = {{1}}>
{{
    single = Reshape (timestep, one)
    count = Shape <start: int = 0, end: int = 1> (x)
    times = Expand (single, count)
    column = Unsqueeze (times, one)
    hidden = MatMul (column, w)
    made = MatMul (hidden, v)
    sum = ReduceSum (x, one)
    y = Add (made, sum)
}}"""


def program_of(text: str, steps: int = 3) -> Program:
    model, typed = parsed(text), parsed(TIMED)
    for each in (model, typed):
        common.ShapeInferencePass()(each)
    known = {value.name: value for node in typed.graph for value in node.outputs}
    for value in (value for node in model.graph for value in node.outputs if value.name in known):
        value.shape, value.type = known[value.name].shape, known[value.name].type
    call = Call("denoiser", {"timestep": "timestep", "x": "x"}, {"y": "x"})
    schedule = Schedule(tuple(Step((call,), {"timestep": (float(index),)}) for index in range(steps)))
    return Program(
        {"denoiser": Segment("denoiser", model)},
        {"t": Task((), (), {"s": schedule})},
        (),
        (),
        (8, 8),
        1,
        None,
        1,
    )


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    "repeated",
    [
        "times = Expand (single, count)",
        "ones = ConstantOfShape <value: tensor = float[1] {1}> (count)\n    times = Mul (single, ones)",
    ],
)
def test_a_row_is_what_the_graph_computes_for_its_time_step(repeated: str, rows: int) -> None:
    program = program_of(TIMED.replace("times = Expand (single, count)", repeated))
    result = tabulate_times(program)
    x = np.random.default_rng(1).standard_normal((rows, 2)).astype(np.float32)
    for index in range(3):
        plain = run_model(
            program.segments["denoiser"].model, {"timestep": np.array(index, np.float32), "x": x}
        )
        ours = run_model(result.segments["denoiser"].model, {"time_row": np.array(index), "x": x})
        np.testing.assert_allclose(ours["y"], plain["y"], atol=1e-6)
    model = result.segments["denoiser"].model
    assert weight_bytes(model) < weight_bytes(program.segments["denoiser"].model) / 4


@pytest.mark.parametrize(
    ("old", "new", "steps", "reason"),
    [
        ("", "", 80, "80 rows are larger than the weights"),
        (
            "column = Unsqueeze (times, one)",
            "many = Cast <to: int = 1> (count)\n    c = Mul (times, many)\n    column = Unsqueeze (c, one)",
            3,
            "made depends on a size too",
        ),
        (
            "times = Expand (single, count)",
            "times = Tile (single, count)",
            3,
            "does not repeat its time step for every row",
        ),
        (
            "hidden = MatMul",
            "hidden = other.Product",
            3,
            "hidden is computed by Product, which onnx's reference lacks",
        ),
    ],
)
def test_what_cannot_be_a_table_stays_and_the_reason_is_said(
    old: str, new: str, steps: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    program = program_of(TIMED.replace(old, new) if old else TIMED, steps)
    with caplog.at_level(logging.INFO):
        result = tabulate_times(program)
    assert reason in caplog.text
    assert (result.segments, result.tasks) == (program.segments, program.tasks)
    assert entries(result, "TabulateTimes") == [("denoiser", 0, 1)]


def test_a_product_that_a_call_names_is_not_replaced() -> None:
    program = program_of(TIMED)
    (task,) = program.tasks.values()
    (schedule,) = task.schedules.values()
    steps = tuple(
        dataclasses.replace(
            step, calls=tuple(dataclasses.replace(c, outputs={**c.outputs, "made": "m"}) for c in step.calls)
        )
        for step in schedule.steps
    )
    tasks = {"t": dataclasses.replace(task, schedules={"s": dataclasses.replace(schedule, steps=steps)})}
    assert entries(tabulate_times(dataclasses.replace(program, tasks=tasks)), "TabulateTimes") == [
        ("denoiser", 0, 1)
    ]


def test_two_calls_of_a_step_at_different_times_read_a_row_each() -> None:
    program = program_of(TIMED)
    (task,) = program.tasks.values()
    (schedule,) = task.schedules.values()
    steps = tuple(
        dataclasses.replace(
            step,
            calls=(*step.calls, dataclasses.replace(step.calls[0], inputs={"timestep": "later", "x": "x"})),
            constants={**step.constants, "later": (step.constants["timestep"][0] + 1,)},
        )
        for step in schedule.steps
    )
    tasks = {"t": dataclasses.replace(task, schedules={"s": dataclasses.replace(schedule, steps=steps)})}
    result = tabulate_times(dataclasses.replace(program, tasks=tasks))
    for index, step in enumerate(result.tasks["t"].schedules["s"].steps):
        assert [step.constants[call.inputs["time_row"]] for call in step.calls] == [(index,), (index + 1,)]
        assert step.constants.keys() == {"time_row", "time_row_1"}
