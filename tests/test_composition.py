"""Everything together: what is compiled with several rewrites draws what its parts, run one after the other, draw.

The independent composition is a hand-over: a bundle of the whole denoiser takes the first steps, a bundle of the
pruned one is given its state and takes the rest. Both have the same rewrites, and none of the switch.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import trimtab
from trimtab.bundle import open_bundle
from trimtab.calibration import codebook_plan
from trimtab.calibration.course import Course
from trimtab.calibration.draft import draft
from trimtab.calibration.drift import Effort, candidates
from trimtab.calibration.trajectories import Sample, own_requests, record
from trimtab.comparison import relative_error
from trimtab.compiler import export_model
from trimtab.errors import InputError, PassError
from trimtab.passes.candidates import Candidates
from trimtab.passes.hidiffusion import hidiffusion
from trimtab.passes.inherit import inherit
from trimtab.passes.inherit_plan import InheritPlan
from trimtab.passes.partition import partition
from trimtab.passes.removal import PLAN, RemovalPlan, RemoveLayers, load_plan
from trimtab.passes.student import digest, save_weights
from trimtab.program import Program, Segment
from trimtab.recipe import Recipe, make_recipe
from trimtab.runtime.load import Pipeline
from trimtab.storage import read_program, write_contents, write_graphs
from trimtab.switching import carry_out
from trimtab.targets.bindings import segment_shapes
from trimtab.targets.device import find_device
from trimtab.targets.engines import make_engines
from trimtab.transforms import transform
from trimtab.weights import WeightStore

BundleFolder = Callable[[str], Path]

pytestmark = pytest.mark.xdist_group("sd15")

STEPS, SWITCH = 20, 10
PROMPT: dict[str, Any] = {"prompt": "a red circle", "seed": 3}
LARGE: dict[str, Any] = PROMPT | {"size": (128, 128)}
"""Twice the side that the tiny pipeline was made for."""


def plain(folder: Path, schedule: str = f"ddim-{STEPS}") -> Program:
    """The tiny pipeline's first task, with one schedule, and the segments that these call."""
    program = read_program(open_bundle(folder))
    name, task = next(iter(program.tasks.items()))
    kept = {key: value for key, value in task.schedules.items() if key == schedule}
    calls = [*task.prologue, *program.epilogue, *kept[schedule].steps[0].calls]
    segments = {call.segment: program.segments[call.segment] for call in calls}
    tasks = {name: dataclasses.replace(task, schedules=kept)}
    return dataclasses.replace(program, segments=segments, tasks=tasks)


def pruned(program: Program, path: Path) -> Path:
    """A removal plan of a third of the candidates, at that path."""
    candidates = Candidates(program.segments["denoiser"].model)
    RemovalPlan(candidates.fingerprint, tuple(candidates)[1::3], "by hand").save(path)
    return path


def student(program: Program, folder: Path) -> Path:
    """A student's folder: that plan, and other weights and biases in the decoder's blocks."""
    folder.mkdir()
    model = program.segments["denoiser"].model
    RemoveLayers(load_plan(pruned(program, folder / PLAN)).removed)(model)
    weights = {
        name: 1.2 * value.const_value.numpy() + np.float32(0.01)
        for name, value in model.graph.initializers.items()
        if name.startswith("up_blocks") and value.const_value is not None
    }
    save_weights(folder, weights, digest(model, weights))
    return folder


def made(program: Program, folder: Path, **recipe: Any) -> Pipeline:
    """A program transformed and opened."""
    folder.mkdir()
    return draft(transform(program, make_recipe(recipe), folder, lambda _: None), folder)


def walk(pipe: Pipeline, first: int, last: int, start: Any = None, **options: Any) -> tuple[list[Any], Any]:
    """The latents after steps first to last, and the sampler's state after them: from a state or from noise."""
    request, plan, _ = pipe.prepare(**options)
    plan.begin(request)
    if start is not None:
        plan.buffers["state"][...] = start
    latents = []
    for step in plan.steps[first:last]:
        step.run(request)
        latents.append(step.results["next_sample"].copy())
    return latents, plan.buffers["state"].copy()


@pytest.fixture
def codebooks_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight has its own codebook: else a pruned denoiser's small ones share with others than the whole one's."""
    monkeypatch.setattr(codebook_plan, "ALIKE", 0)


def check_hand_over(
    fresh: Callable[[], Program],
    folder: Path,
    options: dict[str, Any],
    recipe: dict[str, Any],
    steps: int = STEPS,
    switch: int = SWITCH,
) -> None:
    """Holds a bundle that switches against one of the whole denoiser, and one of the pruned, one after the other."""
    plan = str(pruned(fresh(), folder / "small.json"))
    with (
        made(fresh(), folder / "whole", **recipe) as whole,
        made(fresh(), folder / "small", removal_plan=plan, **recipe) as small,
        made(fresh(), folder / "ours", switch=[(plan, switch / steps)], **recipe) as ours,
    ):
        first, state = walk(whole, 0, switch, **options)
        expected = first + walk(small, switch, steps, state, **options)[0]
        found, _ = walk(ours, 0, steps, **options)
        (*_, only), _ = walk(whole, switch, steps, state, **options)
    assert np.isfinite(expected[-1]).all() and len(found) == steps
    for index in range(steps):
        scale = np.abs(expected[index]).max()
        np.testing.assert_allclose(found[index], expected[index], rtol=0, atol=1e-5 * scale)
    assert np.abs(only - expected[-1]).max() > 1e-3 * scale  # the pruned one does something else


@pytest.mark.usefixtures("codebooks_apart")
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ({"inherit": 2}, PROMPT),
        pytest.param({"hidiffusion": True}, LARGE, marks=pytest.mark.slow),  # in the next too
        ({"hidiffusion": True, "vq": 2, "inherit": {"skip": "layers", "every": 2}}, LARGE),
    ],
    ids=["inherit", "hidiffusion", "all"],
)
def test_a_bundle_that_switches_draws_what_its_parts_draw_in_turn(
    recipe: dict[str, Any], options: dict[str, Any], bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    check_hand_over(functools.partial(plain, bundle_folder("sd15")), tmp_path, options, recipe)


@pytest.mark.usefixtures("codebooks_apart")
@pytest.mark.xdist_group("ddpm")
@pytest.mark.parametrize(
    ("scheduler", "switch"), [("dpm++", 3), pytest.param("pndm", 5, marks=pytest.mark.slow)]
)
def test_what_a_sampler_remembers_passes_from_one_denoiser_to_the_other(
    scheduler: str, switch: int, pipeline_folder: BundleFolder, tmp_path: Path
) -> None:
    folder = pipeline_folder("ddpm")
    (tmp_path / "graphs").mkdir()
    recipe = Recipe(steps=(5,), scheduler=scheduler)
    program = export_model(folder, recipe, WeightStore(tmp_path / "graphs").keep, tmp_path)
    (schedule,) = (s for task in program.tasks.values() for s in task.schedules.values())
    steps = len(schedule.steps)
    assert steps == (14 if scheduler == "pndm" else 5)

    def fresh() -> Program:
        return dataclasses.replace(
            program,
            segments={n: Segment(n, segment.model.clone()) for n, segment in program.segments.items()},
        )

    # The inherited feature is as old as the switch at most: the full evaluation comes with the new denoiser.
    plan = {"full": [0, 2, switch, switch + 1]}
    check_hand_over(fresh, tmp_path, {"seed": 3}, {"inherit": plan, "vq": 4}, steps, switch)


def test_inheritance_of_nothing_changes_nothing_of_the_rest(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    folder = bundle_folder("sd15")
    plan = str(pruned(plain(folder), tmp_path / "small.json"))
    recipe: dict[str, Any] = {"removal_plan": plan, "switch": [(plan, 0.5)]}
    once = {"full": list(range(STEPS))}
    with (
        made(plain(folder), tmp_path / "one", inherit=1, **recipe) as one,
        made(plain(folder), tmp_path / "cut", inherit=once, **recipe) as cut,
        made(plain(folder), tmp_path / "alone", removal_plan=plan) as alone,
    ):
        expected = alone(**PROMPT).pixels
        np.testing.assert_array_equal(one(**PROMPT).pixels, expected)
        np.testing.assert_allclose(cut(**PROMPT).pixels, expected, rtol=0, atol=1e-5)
        parts = [name for name in cut.bundle.contents.segments if name.startswith("denoiser")]
        # Both are the same denoiser, which stands once where it is cut.
        assert parts == ["denoiser.0"] and "denoiser-small" in one.bundle.contents.segments


LEVEL = "down_blocks.1.downsamplers.0.conv:up_blocks.0.upsamplers.0.conv"


@pytest.mark.parametrize(
    ("removed", "silent"),
    [
        (["up_blocks.1.attentions.0"], ["up_blocks.1.attentions.0"]),
        pytest.param(["down_blocks.1.attentions.0"], ["down_blocks.1.attentions.0"], marks=pytest.mark.slow),
        ([LEVEL], []),
    ],
)
def test_hidiffusion_pools_a_pruned_u_net_where_it_pools_the_whole_one(
    removed: list[str], silent: list[str], bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    folder = bundle_folder("sd15")
    program = plain(folder)
    candidates = Candidates(program.segments["denoiser"].model)
    RemovalPlan(candidates.fingerprint, tuple(removed), "by hand").save(tmp_path / "small.json")
    for module in silent:  # what is removed, multiplied by 0
        for part in ("weight", "bias"):
            value = program.segments["denoiser"].model.graph.initializers[f"{module}.proj_out.{part}"]
            assert value.const_value is not None
            value.const_value = ir.tensor(np.zeros_like(value.const_value.numpy()), name=value.name)
    recipe: dict[str, Any] = {"removal_plan": str(tmp_path / "small.json"), "hidiffusion": True}
    with (
        made(plain(folder), tmp_path / "small", **recipe) as small,
        made(program, tmp_path / "whole", hidiffusion=True) as whole,
    ):
        options = PROMPT | {"size": (256, 256)}  # four times the side: its first steps pool
        (ours,), (expected,) = walk(small, 0, 1, **options)[0], walk(whole, 0, 1, **options)[0]
    assert np.isfinite(ours).all() and ours.shape == expected.shape
    if silent:
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_hidiffusion_refuses_a_u_net_that_lacks_what_it_scales_back(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    program = plain(bundle_folder("sd15"))
    RemoveLayers(["up_blocks.1.resnets.0+attentions.0+skip"])(program.segments["denoiser"].model)
    with pytest.raises(PassError, match=r"no layer there reads a skip of down_blocks\.1: keep one of up_bl"):
        hidiffusion(program)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({"hidiffusion": True}, "HiDiffusion rewrites U-Nets"),
        ({"inherit": {"every": 2, "skip": ["branch 9"]}}, "branch 9 is to be inherited"),
        ({"inherit": {"speed": 1.5, "skip": ["*.no"]}}, r"\*\.no is to be inherited"),
    ],
)
def test_what_the_last_passes_refuse_is_said_before_weights_are_packed(
    recipe: dict[str, Any], reason: str, bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    program = plain(bundle_folder("sd15"))
    if "hidiffusion" in recipe:  # which goes by the names of modules
        for node in program.segments["denoiser"].model.graph:
            node.metadata_props.clear()
    told: list[str] = []
    with pytest.raises(PassError, match=reason):
        transform(program, make_recipe({"vq": 2, **recipe}), tmp_path, told.append)
    assert told == []


def test_what_a_denoiser_that_is_switched_to_lacks_is_said_before_weights_are_packed(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    program, layer = plain(bundle_folder("sd15")), "mid_block.resnets.1"
    fingerprint = Candidates(program.segments["denoiser"].model).fingerprint
    RemovalPlan(fingerprint, (layer,), "none").save(tmp_path / "pruned.json")
    recipe = {
        "switch": [[str(tmp_path / "pruned.json"), 0.5]],
        "inherit": {"every": 2, "skip": layer},
        "vq": 2,
    }
    told: list[str] = []
    with pytest.raises(PassError, match=rf"{layer} is to be inherited"):
        transform(program, make_recipe(recipe), tmp_path, told.append)
    assert told == []


def test_a_search_measures_schedules_of_larger_pictures_at_a_size_that_walks_them(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    def fresh() -> Program:
        return hidiffusion(plain(bundle_folder("sd15"), "ddim-3"))

    requests = Course(fresh(), ("branch 0",)).requests
    assert [request["size"] for request in requests.values()] == [(64, 64), (96, 96), (192, 192)]
    plan = InheritPlan(skip=("branch 0",), speed=1.1)
    found = candidates(fresh(), plan, tmp_path / "search", Effort(trajectories=1, moves=0))
    assert found.keys() == {"ddim-3", "ddim-3/2x", "ddim-3/4x"}
    best = {name: schedules[0] for name, schedules in found.items()}
    chosen = InheritPlan(skip=plan.skip, choices={name: each.choices for name, each in best.items()})
    with (
        draft(partition(fresh()), tmp_path / "full") as full,
        draft(partition(inherit(fresh(), chosen)), tmp_path / "ours") as ours,
    ):
        for name, request in requests.items():
            (asked,) = own_requests(full, 2, **request)[1:]
            assert ours.prepare(**asked)[2]["schedule"] == name
            (*_, expected), _ = walk(full, 0, 3, **asked)
            (*_, latents), _ = walk(ours, 0, 3, **asked)
            assert relative_error(latents, expected) == pytest.approx(best[name].drift, rel=1e-3)
            assert best[name].drift > 0


def test_larger_pictures_that_no_engine_would_draw_are_refused_before_anything_is_built(
    pipeline_folder: BundleFolder, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"hidiffusion": True, "steps": 2, "cache": None, "targets": "orin-nano-8gb"}
    with pytest.raises(
        InputError, match=r"of more than (\d+)x\1, and no engine would be made for one: give a"
    ):
        trimtab.compile(pipeline_folder("sd15"), tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_calibration_brings_every_packed_denoiser_nearer_to_what_it_was(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    plan = str(student(plain(bundle_folder("sd15")), tmp_path / "small"))

    def errors(name: str, samples: list[Sample], **recipe: Any) -> dict[str, float]:
        """Denoiser -> the mean squared error of its predictions."""
        with made(
            plain(bundle_folder("sd15")), tmp_path / name, switch=[(plan, 0.5)], vq=2, **recipe
        ) as pipe:
            segments = pipe.bundle.contents.segments
            found: dict[str, list[float]] = {}
            for sample in samples:
                graph = pipe.bundle.path(segments[sample.segment].graph)
                session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
                (output,) = session.run(["model_output"], sample.inputs)
                found.setdefault(sample.segment, []).append(float(np.square(output - sample.output).mean()))
        return {segment: float(np.mean(each)) for segment, each in found.items()}

    with made(plain(bundle_folder("sd15")), tmp_path / "dense", switch=[(plan, 0.5)]) as dense:
        samples = record(dense, own_requests(dense, 2), steps=[1, 8, 12, 18])
    before = errors("k-means", samples)
    after = errors("calibrated", samples, vq_minutes=0.08)
    assert before.keys() == {"denoiser", "denoiser-small"}
    # How much nearer is a matter of time, and here there are seconds.
    assert all(after[name] < before[name] for name in before), (before, after)


@pytest.mark.slow
@pytest.mark.xdist_group("sd_below")
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
@pytest.mark.parametrize("family", ["sd15", "sd_below"])
def test_tensorrt_rtx_builds_what_pictures_of_the_trained_size_and_of_a_larger_one_call(
    family: str, bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    (tmp_path / "graphs").mkdir()
    schedule = next(n for n in open_bundle(bundle_folder(family)).contents.tasks["text-to-image"].schedules)
    program = partition(hidiffusion(plain(bundle_folder(family), schedule)))
    store = WeightStore(tmp_path / "graphs")
    write_graphs(program, tmp_path, store)
    contents = write_contents(program, tmp_path)
    device, sizes = [find_device("rtx-4090")], (contents.size, LARGE["size"])
    engines = make_engines(program.segments, contents, device, sizes, store, tmp_path, None, print)
    assert len(engines["denoiser.0"]) == 2 and all(each.built for made in engines.values() for each in made)
    called = {
        c.segment
        for name in (schedule, f"{schedule}/2x")
        for step in contents.tasks["text-to-image"].schedules[name].steps
        for c in step.calls
    }
    assert {name for name, made in engines.items() if made and name.startswith("denoiser")} == called


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
def test_tensorrt_rtx_builds_all_segments_of_a_bundle_with_everything(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    # Engines have fixed sizes, and HiDiffusion's are those of a large native one.
    program = dataclasses.replace(plain(bundle_folder("sd15")), size=LARGE["size"], trained_size=(64, 64))
    plan = str(pruned(plain(bundle_folder("sd15")), tmp_path / "small.json"))
    recipe = make_recipe({"switch": [(plan, 0.5)], "inherit": 2, "vq": 2, "hidiffusion": True})
    folder = tmp_path / "bundle"
    (folder / "graphs").mkdir(parents=True)
    program = transform(program, recipe, folder, lambda _: None)
    store = WeightStore(folder / "graphs")
    write_graphs(program, folder, store)
    contents = write_contents(program, folder)
    engines = make_engines(
        program.segments, contents, [find_device("rtx-4090")], (contents.size,), store, folder, None, print
    )
    assert len(engines) == len(program.segments) > 10
    assert all(made and all(engine.built for engine in made) for made in engines.values())


@pytest.mark.parametrize("inherit", [None, 2])
def test_without_a_layer_that_reads_the_text_nothing_encodes_it_and_prompts_make_no_difference(
    inherit: int | None, bundle_folder: BundleFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = plain(bundle_folder("sd15"))
    candidates = Candidates(program.segments["denoiser"].model)
    reading = [name for name in candidates if name.endswith("attn2")]
    RemovalPlan(candidates.fingerprint, tuple(reading), "by hand").save(tmp_path / PLAN)
    recipe: dict[str, Any] = {
        "removal_plan": str(tmp_path / PLAN),
        **({"inherit": inherit} if inherit else {}),
    }
    whole = carry_out(plain(bundle_folder("sd15")), tmp_path / PLAN)
    with draft(whole, tmp_path / "whole") as before, made(program, tmp_path / "ours", **recipe) as ours:
        contents = ours.bundle.contents
        assert "text_encoder" not in contents.segments and "text_encoder left out" in caplog.text
        assert segment_shapes(contents, contents.size).keys() == contents.segments.keys()
        pictures = [pipe(p, seed=3).pixels for pipe, p in ((ours, "a cat"), (ours, "x"), (before, "x"))]
    assert np.array_equal(pictures[0], pictures[1])
    if inherit is None:
        assert np.abs(pictures[0] - pictures[2]).max() < 1e-6
        # In diffusers' hands it is given a text all the same.
        unet = torch.nn.Module()
        unet.config = SimpleNamespace()
        sample, text = torch.zeros(1, 4, 8, 8), torch.zeros(1, 5, 16)
        assert trimtab.Denoiser(tmp_path / "ours", unet)(sample, 5, text).sample.shape == sample.shape
