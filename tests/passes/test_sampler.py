"""FuseSampler: fires, refuses, is idempotent, and computes what the table says."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from trimtab.passes.sampler import FuseSampler

SLOTS = 3
LATENT = (2, 4, 6)


def denoiser(dtype: ir.DataType = ir.DataType.FLOAT, symbol: str = "batch") -> ir.Model:
    """prediction = tanh(sample * context) + timestep, with context (N, C, 1, 1)."""
    shape = [symbol, LATENT[0], "height", "width"]
    sample = ir.Value(name="sample", shape=ir.Shape(shape), type=ir.TensorType(dtype))
    timestep = ir.Value(name="timestep", shape=ir.Shape([]), type=ir.TensorType(dtype))
    context = ir.Value(name="context", shape=ir.Shape([symbol, LATENT[0], 1, 1]), type=ir.TensorType(dtype))
    product = ir.node("Mul", [sample, context], name="product")
    bent = ir.node("Tanh", product.outputs, name="bent")
    shifted = ir.node("Add", [bent.outputs[0], timestep], name="shifted")
    # An inner value with the name of a new output must make way.
    product.outputs[0].name = "clipped"
    for node in (product, bent, shifted):
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), ir.Shape(shape)
    shifted.outputs[0].name = "prediction"
    graph = ir.Graph(
        [sample, timestep, context],
        shifted.outputs,
        nodes=[product, bent, shifted],
        opset_imports={"": 23},
        name="denoiser",
    )
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("noise", [False, True], ids=["", "noise"])
@pytest.mark.parametrize("clip_range", [None, 0.8], ids=["", "clip"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rows", [1, 2])
def test_it_computes_what_the_table_says(
    rows: int, batch: int, clip_range: float | None, noise: bool, dtype: ir.DataType
) -> None:
    model = denoiser(dtype)
    assert FuseSampler(SLOTS, clip_range, noise)(model).applied == ("sampler",)

    random = np.random.default_rng(rows * 10 + batch)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    narrow = dtype.numpy()
    extra = (clip_range is not None) + noise
    feeds = {
        "state": normal(SLOTS, batch, *LATENT),
        "sample_weights": normal(SLOTS),
        "mix": np.array([1.0] if rows == 1 else [-6.5, 7.5], np.float32),
        "next_weights": normal(SLOTS + 1 + extra),
        "timestep": np.array(0.25, narrow),
        "context": normal(rows * batch, LATENT[0], 1, 1).astype(narrow),
    }
    if clip_range is not None:
        feeds["clip_weights"] = normal(SLOTS + 1)
    if noise:
        feeds["noise"] = normal(batch, *LATENT)
    found = run(model, feeds)

    def weigh(weights: np.ndarray) -> np.ndarray:
        return np.tensordot(weights, feeds["state"], axes=1)

    sample = np.concatenate([weigh(feeds["sample_weights"])] * rows).astype(narrow)
    prediction = (np.tanh(sample * feeds["context"]) + feeds["timestep"]).astype(np.float32)
    output = np.tensordot(feeds["mix"], prediction.reshape(rows, batch, *LATENT), axes=1)
    # In half precision the model itself rounds, by 2**-11 near one, and guidance multiplies that by 14. All
    # that comes after the model is float32, so it is held to float32 from the graph's own output on.
    error = np.abs(found["model_output"] - output).max() / np.abs(output).max()
    assert error < (2e-6 if dtype == ir.DataType.FLOAT else 14 * 2**-11)
    output = found["model_output"]
    weights = feeds["next_weights"]
    expected = {"next_sample": weigh(weights[:SLOTS]) + weights[SLOTS] * output, "model_output": output}
    if clip_range is not None:
        unclipped = weigh(feeds["clip_weights"][:SLOTS]) + feeds["clip_weights"][SLOTS] * output
        expected["clipped"] = np.clip(unclipped, -clip_range, clip_range)
        expected["next_sample"] = expected["next_sample"] + weights[SLOTS + 1] * expected["clipped"]
    if noise:
        expected["next_sample"] = expected["next_sample"] + weights[-1] * feeds["noise"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        error = np.abs(found[name] - value).max() / np.abs(value).max()
        assert error < 2e-6, (name, error)


def test_the_interface_is_the_documented_one() -> None:
    model = denoiser()
    FuseSampler(SLOTS, 1.0, True)(model)
    shapes = {value.name: str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)}
    latent = f"{LATENT[0]},height,width"
    assert shapes == {
        "state": f"[{SLOTS},batch,{latent}]",
        "sample_weights": f"[{SLOTS}]",
        "mix": "[rows]",
        "next_weights": f"[{SLOTS + 3}]",
        "clip_weights": f"[{SLOTS + 1}]",
        "noise": f"[batch,{latent}]",
        "timestep": "[]",
        "context": f"[rows*batch,{LATENT[0]},1,1]",
        "next_sample": f"[batch,{latent}]",
        "model_output": f"[batch,{latent}]",
        "clipped": f"[batch,{latent}]",
    }
    assert model.opset_imports[""] == 23


def test_sizes_that_depend_on_the_batch_are_renamed() -> None:
    model = denoiser()
    product = model.graph.node(0).outputs[0]
    product.shape = ir.Shape(["4*batch + batches", 2])
    FuseSampler(SLOTS)(model)
    assert str(product.shape) == "[4*(rows*batch) + batches,2]"


def test_new_nodes_carry_a_scope_and_old_ones_keep_theirs() -> None:
    model = denoiser()
    old = {node.name for node in model.graph}
    FuseSampler(SLOTS, 1.0, True)(model)
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        assert scopes.startswith("['', 'sampler', ") != (node.name in old)


def test_it_is_idempotent() -> None:
    model = denoiser()
    FuseSampler(SLOTS)(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    result = FuseSampler(SLOTS)(model)
    assert not result.modified
    assert result.applied == ()
    assert "already fused" in result.refused[0].reason
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def _without_sample(model: ir.Model) -> None:
    model.graph.inputs[0].name = "latents"


def _without_prediction(model: ir.Model) -> None:
    model.graph.outputs[0].name = "noise_pred"


def _fixed_batch(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape([2, *LATENT])


def _double(model: ir.Model) -> None:
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.DOUBLE)


def _taken_name(model: ir.Model) -> None:
    model.graph.inputs[2].name = "mix"


def _more_channels(model: ir.Model) -> None:
    model.graph.outputs[0].shape = ir.Shape(["batch", 2 * LATENT[0], "height", "width"])


def _unknown_rank(model: ir.Model) -> None:
    model.graph.inputs[0].shape = None


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_without_sample, "no input 'sample'"),
        (_without_prediction, "no output 'prediction'"),
        (_fixed_batch, "fixed to 2"),
        (_double, "float type is needed"),
        (_taken_name, "already uses the names mix"),
        (_more_channels, "prediction has the shape"),
        (_unknown_rank, "known rank"),
    ],
)
def test_it_refuses_with_the_reason(spoil: object, reason: str) -> None:
    model = denoiser()
    assert callable(spoil)
    spoil(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    result = FuseSampler(SLOTS)(model)
    assert not result.modified
    assert reason in result.refused[0].reason
    assert result.refused[0].where == "denoiser"
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_other_names_and_any_rank() -> None:
    dtype = ir.TensorType(ir.DataType.FLOAT)
    tokens = ir.Value(name="hidden", shape=ir.Shape(["n", "tokens"]), type=dtype)
    node = ir.node("Neg", [tokens])
    node.outputs[0].name, node.outputs[0].type = "velocity", dtype
    model = ir.Model(
        ir.Graph([tokens], node.outputs, nodes=[node], opset_imports={"": 23}, name="tokens"), ir_version=10
    )
    assert FuseSampler(1, sample="hidden", prediction="velocity")(model).modified
    state = np.arange(10, dtype=np.float32).reshape(1, 2, 5)
    one = np.ones(1, np.float32)
    found = run(
        model,
        {"state": state, "sample_weights": one, "mix": one, "next_weights": np.array([1.0, 0.5], np.float32)},
    )
    np.testing.assert_array_equal(found["model_output"], -state[0])
    np.testing.assert_array_equal(found["next_sample"], 0.5 * state[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_reaches_the_next_sample_where_a_clip_hides_it(value: float) -> None:
    """The runtime asks for its cause once a picture is not finite; TensorRT's Clip gives a bound for NaN."""
    model = denoiser()
    FuseSampler(SLOTS, 0.8)(model)
    (clip,) = [node for node in model.graph if node.op_type == "Clip"]
    zeros = ir.node("Mul", [clip.inputs[1], clip.inputs[1]])
    hidden = ir.node("Expand", [zeros.outputs[0], ir.node("Shape", [clip.inputs[0]]).outputs[0]])
    shape = hidden.inputs[1].producer()  # type: ignore[union-attr]
    for number, node in enumerate((zeros, shape, hidden)):
        assert node is not None
        node.outputs[0].name = f"hidden{number}"
        model.graph.insert_before(clip, node)
    clip.replace_input_with(0, hidden.outputs[0])
    feeds = {
        "state": np.zeros((SLOTS, 1, *LATENT), np.float32),
        "sample_weights": np.ones(SLOTS, np.float32),
        "mix": np.ones(1, np.float32),
        "next_weights": np.array([0.1] * SLOTS + [0.0, 0.5], np.float32),  # the output's own weight is 0
        "clip_weights": np.ones(SLOTS + 1, np.float32),
        "timestep": np.array(0.25, np.float32),
        "context": np.ones((1, LATENT[0], 1, 1), np.float32),
    }
    feeds["timestep"] = np.array(value, np.float32)
    found = run(model, feeds)
    assert np.isfinite(found["clipped"]).all() and not np.isfinite(found["next_sample"]).any()
