"""Maxima of tensors on a model's own trajectories, and the precision that follows from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import pytest

import trimtab
from trimtab.bundle import open_bundle
from trimtab.calibration import ranges as module
from trimtab.calibration.draft import draft
from trimtab.calibration.ranges import Ranges, fingerprint, load_ranges, measure_ranges
from trimtab.calibration.trajectories import record
from trimtab.errors import CalibrationError, InputError, TargetError
from trimtab.passes.precision import SCORES
from trimtab.program import Call, Program, Schedule, Segment, Step, Task
from trimtab.runtime.load import Pipeline
from trimtab.storage import read_program
from trimtab.targets.precision import in_precision

pytestmark = pytest.mark.xdist_group("dit")

BundleFolder = Callable[[str], Path]
REQUEST = {"label": 1, "seed": 0, "schedule": 3}


@pytest.fixture
def program(bundle_folder: BundleFolder) -> Program:
    return read_program(open_bundle(bundle_folder("dit")))


def test_ranges_are_the_maxima_of_all_steps(
    bundle_folder: BundleFolder, program: Program, tmp_path: Path
) -> None:
    import onnxruntime

    measured = measure_ranges(program, tmp_path / "draft", requests=[REQUEST]).segments["denoiser"]
    with trimtab.load(bundle_folder("dit")) as pipe:
        samples = record(pipe, [REQUEST])
    model = program.segments["denoiser"].model.clone()
    own = {v.name for v in model.graph.outputs}
    values = [v for node in model.graph for v in node.outputs if v.name in measured and v.name not in own]
    model.graph.outputs.extend(values)
    ir.save(model, tmp_path / "all.onnx", external_data="all.weights")
    session = onnxruntime.InferenceSession(tmp_path / "all.onnx", providers=["CPUExecutionProvider"])
    names = [str(v.name) for v in values]
    tensors = [session.run(names, sample.inputs) for sample in samples]
    assert len(names) > 50 and len(samples) == 3
    for index, name in enumerate(names):
        whole = max(float(np.abs(step[index]).max()) for step in tensors)
        assert measured[name] == pytest.approx(whole, rel=1e-3, abs=1e-5), name


def test_scores_of_an_attention_are_bounded_from_above() -> None:
    import onnxruntime

    text = """<ir_version: 10, opset_import: ["" : 23]>
    agraph (float[2, 3, 16, 8] q, float[2, 3, 5, 8] k) => (float[2, 3, 16, 8] y) { y = Attention (q, k, k) }"""
    model = ir.from_onnx_text(text)
    names = module._watch(model)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((2, 3, n, 8)).astype(np.float32) for n in (16, 5))
    bound = session.run(None, {"q": q, "k": k})[1][names.index(f"y{SCORES}")]
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(8)
    longest = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max() / np.sqrt(8)
    assert np.abs(scores).max() < bound == pytest.approx(longest, rel=1e-5)


def test_a_tensor_is_measured_as_soon_as_it_is_there(tmp_path: Path) -> None:
    import onnxruntime

    layers = 12
    body = "\n".join(f"x{n + 1} = MatMul (x{n}, w)" for n in range(layers))
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
    agraph (float[64, 64] x0, float[64, 64] w) => (float[64, 64] x{layers}) {{ {body} }}"""
    model = ir.from_onnx_text(text)
    for number, node in enumerate(model.graph):
        node.name, node.outputs[0].type = f"layer {number}", ir.TensorType(ir.DataType.FLOAT)
    names = module._watch(model)
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    ones = np.ones((64, 64), np.float32)
    session.run(None, {"x0": ones, "w": ones / 64})
    events = json.loads(Path(session.end_profiling()).read_text())
    order = [e["name"].removesuffix("_kernel_time") for e in events if e["name"].endswith("_kernel_time")]
    maxima = {node.inputs[0].name: node.name for node in model.graph if node.op_type == "ReduceMax"}
    assert len(names) == layers + 2
    for number in range(layers - 2):
        measured, later = order.index(maxima[f"x{number + 1}"]), order.index(f"layer {number + 2}")
        assert measured < later, f"x{number + 1} waits for its measurement"


def with_schedules(**calls: list[str]) -> Pipeline:
    """As much of a pipeline as says what to draw: schedule -> the segment that each of its steps calls."""
    schedules = {
        name: Schedule(tuple(Step((Call(segment, {}, {}),)) for segment in segments))
        for name, segments in calls.items()
    }
    task = Task((), (), schedules)
    contents = SimpleNamespace(tasks={"text-to-image": task}, size=(8, 8))
    return cast(
        "Pipeline", SimpleNamespace(bundle=SimpleNamespace(contents=contents), tasks=("text-to-image",))
    )


def schedules(requests: list[dict[str, Any]]) -> list[str]:
    return [request["schedule"] for request in requests]


def test_few_steps_are_measured_on_more_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = with_schedules(only=3 * ["denoiser"])
    for evaluations, pictures in ((3, 1), (4, 2), (300, module.PICTURES)):
        monkeypatch.setattr(module, "EVALUATIONS", evaluations)
        assert schedules(module._requests(pipe)) == pictures * ["only"]


def test_the_longest_schedule_within_the_budget_is_measured_and_else_the_shortest() -> None:
    denoiser = ["denoiser"]
    of = {"one": denoiser, "most": 20 * denoiser, "few": 4 * denoiser, "more": 50 * denoiser}
    assert schedules(module._requests(with_schedules(**of))) == ["most"]
    assert schedules(module._requests(with_schedules(one=denoiser, more=50 * denoiser))) == 4 * ["one"]
    long = with_schedules(longer=80 * denoiser, more=50 * denoiser)
    assert schedules(module._requests(long)) == ["more"]


def test_of_steps_that_all_start_from_a_picture_those_of_full_strength_are_measured() -> None:
    denoiser = ["denoiser"]
    of = {f"{steps}/from-{start}": (steps - start) * denoiser for steps in (3, 20) for start in (0, 2)}
    assert schedules(module._requests(with_schedules(**of))) == ["20"]


def test_segments_that_a_shorter_schedule_alone_calls_are_measured_too() -> None:
    pipe = with_schedules(most=20 * ["denoiser"], few=["denoiser.full"], fewer=["denoiser"])
    assert schedules(module._requests(pipe)) == ["most", "few"]


@pytest.mark.xdist_group("sdxl")
def test_an_encoder_of_pictures_is_measured_where_its_strength_leaves_none_of_few_steps(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    program = read_program(open_bundle(bundle_folder("sdxl")))
    few = {
        name: replace(task, schedules={n: s for n, s in task.schedules.items() if "-20" not in n})
        for name, task in program.tasks.items()
    }
    task = few["image-to-image"]
    assert task.strength == 0.3 and not any(name.endswith("/from-3") for name in task.schedules)
    request = {"prompt": "a red circle", "seed": 0}
    measured = measure_ranges(replace(program, tasks=few), tmp_path / "draft", requests=[request])
    assert "vae_encoder" in measured.segments


def test_ranges_are_saved_and_taken_again_for_the_same_program_alone(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Ranges(fingerprint(program), {"denoiser": {"a": 1.5}})
    known.save(tmp_path / "ranges.json")
    assert load_ranges(tmp_path / "ranges.json") == known

    def never(*_: object, **__: object) -> None:
        raise RuntimeError("it was measured")

    monkeypatch.setattr(module, "draft", never)
    assert measure_ranges(program, tmp_path, earlier=tmp_path / "ranges.json") == known
    replace(known, fingerprint="another").save(tmp_path / "ranges.json")
    with pytest.raises(RuntimeError, match="it was measured"):
        measure_ranges(program, tmp_path, earlier=tmp_path / "ranges.json")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"fingerprint": "a"}', '{"fingerprint": "a", "segments": {"d": {"x": -1}}}']
)
def test_a_file_that_holds_no_ranges_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "ranges.json").write_text(text)
    with pytest.raises(InputError, match="holds no ranges"):
        load_ranges(tmp_path / "ranges.json")


def test_saved_ranges_are_plain_json(tmp_path: Path) -> None:
    Ranges("mark", {"vae": {"x": 2.0}}).save(tmp_path / "deep" / "ranges.json")
    assert json.loads((tmp_path / "deep" / "ranges.json").read_text()) == {
        "fingerprint": "mark",
        "segments": {"vae": {"x": 2.0}},
    }


ATTENTION = "decoder.mid_block.attentions.0"


def planted(program: Program, factor: float) -> Program:
    """The program with an attention of its VAE whose values leave FP16, and whose output layer takes it back."""
    model = program.segments["vae_decoder"].model.clone()
    factors = {"to_v.weight.T": factor, "to_v.bias": factor, "to_out.0.weight.T": 1 / factor}
    for name, each in factors.items():
        name = f"{ATTENTION}.{name}"
        weight = model.graph.initializers[name].const_value
        assert weight is not None
        model.graph.initializers[name].const_value = ir.tensor(weight.numpy() * np.float32(each), name=name)
    return replace(program, segments={**program.segments, "vae_decoder": Segment("vae_decoder", model)})


def test_exactly_the_layer_that_overflows_stays_in_float32_and_the_picture_stays(
    program: Program, tmp_path: Path
) -> None:
    strong = planted(program, 3e5)
    measured = measure_ranges(strong, tmp_path / "measured", requests=[REQUEST])
    safe = in_precision(strong, "fp16", measured.segments)
    kept = {name: refused for name, refused in _refused(strong, measured).items() if refused}
    assert kept == {"vae_decoder": {f"{ATTENTION}.to_v", ATTENTION, f"{ATTENTION}.to_out.0"}}
    with draft(strong, tmp_path / "fp32") as whole, draft(safe, tmp_path / "fp16") as half:
        difference = np.abs(whole(**REQUEST).pixels - half(**REQUEST).pixels).max()
    assert 0 < difference <= 2 / 255
    # Without the ranges the same picture is lost.
    blind = in_precision(strong, "fp16", {name: {} for name in strong.segments})
    with draft(blind, tmp_path / "blind") as pipe, pytest.raises(TargetError, match="not finite"):
        pipe(**REQUEST)


def _refused(program: Program, measured: Ranges) -> dict[str, set[str]]:
    from trimtab.passes.precision import convert

    return {
        name: {r.where for r in convert(segment.model, "fp16", measured.segments[name]).refused}
        for name, segment in program.segments.items()
    }


def test_a_model_that_is_broken_in_float32_is_not_measured(program: Program, tmp_path: Path) -> None:
    broken = planted(program, float("nan"))
    with pytest.raises(CalibrationError, match="vae_decoder gives numbers that are not finite in float32"):
        measure_ranges(broken, tmp_path, requests=[REQUEST])
