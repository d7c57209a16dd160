"""Packed weights that are decoded when they are needed, and one at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from trimtab.calibration.codebook_plan import Settings
from trimtab.calibration.kmeans import make_codebooks
from trimtab.passes.vq import PackWeights
from trimtab.passes.vq_on_demand import DecodeOnDemand

LAYERS, WIDTH = 6, 128


@pytest.fixture
def packed() -> ir.Model:
    """A chain of layers with a Gelu between, which ONNX Runtime fuses: its new nodes come last in its list."""
    body = "\n".join(
        f"h{n} = MatMul (x{n}, w{n}) b{n} = Add (h{n}, bias) x{n + 1} = Gelu (b{n})" for n in range(LAYERS)
    )
    weights = {"bias": (WIDTH,)} | {f"w{n}": (WIDTH, WIDTH) for n in range(LAYERS)}
    given = ", ".join(f"float[{', '.join(map(str, shape))}] {name}" for name, shape in weights.items())
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        agraph (float[8, {WIDTH}] x0, {given}) => (float[8, {WIDTH}] x{LAYERS}) {{ {body} }}"""
    )
    random = np.random.default_rng(0)
    for value in list(model.graph.inputs)[1:]:
        array = random.standard_normal(weights[str(value.name)]) / WIDTH**0.5
        value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    PackWeights(make_codebooks({"denoiser": model}, Settings(rules=(("*", 2),))))(model)
    return model


def _run(model: ir.Model, profile: Path | None = None) -> tuple[np.ndarray, list[str]]:
    options = onnxruntime.SessionOptions()
    options.enable_profiling = profile is not None
    options.profile_file_prefix = str(profile)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["ConstantFolding"],
    )
    x = np.random.default_rng(1).standard_normal((8, WIDTH)).astype(np.float32)
    (result,) = session.run(None, {"x0": x})
    events = json.loads(Path(session.end_profiling()).read_text()) if profile is not None else []
    kernels = [e for e in events if e["name"].endswith("_kernel_time")]
    return result, [e["args"]["op_name"] for e in kernels]


def test_every_weight_waits_and_nothing_changes(packed: ir.Model) -> None:
    before, _ = _run(packed)
    result = DecodeOnDemand()(packed)
    assert len(result.applied) == LAYERS and not result.refused
    assert np.array_equal(_run(packed)[0], before)


def test_a_second_run_does_nothing_and_says_why(packed: ir.Model) -> None:
    DecodeOnDemand()(packed)
    result = DecodeOnDemand()(packed)
    assert not result.modified and {r.reason for r in result.refused} == {
        "its codes are computed: it waits for something already"
    }


def test_onnxruntime_decodes_one_weight_at_a_time(packed: ir.Model, tmp_path: Path) -> None:
    def most(order: list[str]) -> int:
        """Weights that were decoded and not yet multiplied with, at the most."""
        held = highest = 0
        for op in order:
            held += (op == "Gather") - (op in ("MatMul", "FusedMatMul", "Gemm"))
            highest = max(highest, held)
        return highest

    assert most(_run(packed, tmp_path / "before")[1]) > 1, (
        "ONNX Runtime needs no help any more: drop the pass"
    )
    DecodeOnDemand()(packed)
    assert most(_run(packed, tmp_path / "after")[1]) == 1


def test_a_weight_of_several_readers_waits_for_the_first_in_the_graph_whichever_was_wired_first(
    packed: ir.Model,
) -> None:
    first, second, *_ = (node for node in packed.graph if node.op_type == "MatMul")
    weight = first.inputs[1]
    second.replace_input_with(1, weight)
    before, _ = _run(packed)
    first.replace_input_with(1, None)
    first.replace_input_with(1, weight)
    assert weight is not None and [node for node, _ in weight.uses()] == [second, first]
    DecodeOnDemand()(packed)
    assert np.array_equal(_run(packed)[0], before)


def test_a_weight_beside_no_activation_is_refused(packed: ir.Model) -> None:
    reader = next(node for node in packed.graph if node.op_type == "MatMul")
    turned = reader.inputs[1]
    assert turned is not None
    packed.graph.outputs.append(turned)
    other = ir.node("Identity", [turned])
    other.outputs[0].name = "copy"
    packed.graph.append(other)
    packed.graph.outputs[-1] = other.outputs[0]
    reader.replace_input_with(1, packed.graph.initializers["bias"])
    result = DecodeOnDemand()(packed)
    assert [r.reason for r in result.refused] == ["what reads it reads no activation"]
