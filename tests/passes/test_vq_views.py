"""Packed weights that are looked up through a buffer of two types: the same numbers, one weight after another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from trimtab.calibration.codebook_plan import Settings
from trimtab.calibration.kmeans import make_codebooks
from trimtab.errors import BundleError
from trimtab.manifest import VIEWS
from trimtab.passes import vq_op
from trimtab.passes.vq import PackWeights
from trimtab.passes.vq_on_demand import DecodeOnDemand
from trimtab.passes.vq_views import DecodeThroughViews
from trimtab.runtime.sessions import OnnxRuntimeSession

Array = npt.NDArray[np.float32]

X = np.random.default_rng(1).standard_normal((3, 128, 5, 5)).astype(np.float32)


def _graph(body: str, weights: dict[str, tuple[int, ...]], bits: int = 2, scale: bool = False) -> ir.Model:
    """A graph of x (3, 128, 5, 5) and its rows t (75, 128) to y, packed."""
    given = ", ".join(f"float[{', '.join(map(str, shape))}] {name}" for name, shape in weights.items())
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        agraph (float[3, 128, 5, 5] x, {given}) => (float[n, m] y)
        <int64[2] flat = {{-1, 128}}> {{
            moved = Transpose <perm = [0, 2, 3, 1]> (x)
            t = Reshape (moved, flat)
            {body}
        }}"""
    )
    random = np.random.default_rng(0)
    for value in list(model.graph.inputs)[1:]:
        array = random.standard_normal(weights[str(value.name)]).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    settings = Settings(rules=(("*", bits),), scale=scale)
    PackWeights(make_codebooks({"denoiser": model}, settings))(model)
    return model


def _chain(layers: int) -> ir.Model:
    products = "\n".join(f"t{n + 1} = MatMul ({'t' if n == 0 else f't{n}'}, w{n})" for n in range(layers))
    return _graph(f"{products}\ny = Identity (t{layers})", {f"w{n}": (128, 128) for n in range(layers)})


def _session(model: ir.Model, folder: Path) -> OnnxRuntimeSession:
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    ir.save(model, path)
    return OnnxRuntimeSession(path, fold=False)


def _run(model: ir.Model, folder: Path, shape: tuple[int, ...]) -> Array:
    y = np.zeros(shape, np.float32)
    run = _session(model, folder).bind({"x": X}, {"y": y})
    run()
    once = y.copy()
    run()  # the buffer is full of the last weight now
    assert np.array_equal(once, y)
    return y


_CONVOLUTION = """
    c = Conv <kernel_shape = [{k}, {k}], pads = [{p}, {p}, {p}, {p}], group = {g}> (x, w)
    y = Flatten <axis = 1> (c)
"""


@pytest.mark.parametrize(
    ("body", "weights", "columns"),
    [
        ("y = MatMul (t, w)", {"w": (128, 96)}, 96),
        ("y = Gemm <transB = 1> (t, w, b)", {"w": (96, 128), "b": (96,)}, 96),
        (_CONVOLUTION.format(k=1, p=0, g=1), {"w": (64, 128, 1, 1)}, 64 * 25),
        (_CONVOLUTION.format(k=3, p=1, g=1), {"w": (64, 128, 3, 3)}, 64 * 25),
        (_CONVOLUTION.format(k=3, p=1, g=2), {"w": (64, 64, 3, 3)}, 64 * 25),
        ("s = Slice (t, one, big, one)\ny = MatMul (s, w)", {"w": (127, 96)}, 96),
    ],
    ids=["MatMul", "Gemm", "Conv 1x1", "Conv 3x3", "Conv grouped", "odd channels"],
)
@pytest.mark.parametrize(("bits", "scale"), [(2, False), (2, True), (4, False), (4, True)])
def test_what_a_graph_computes_stays_bit_for_bit(
    body: str, weights: dict[str, tuple[int, ...]], columns: int, bits: int, scale: bool, tmp_path: Path
) -> None:
    if "one" in body:
        body = body.replace("one", "flat_one").replace("big", "flat_big")
        body = (
            "flat_one = Constant <value_ints = [1]> ()\nflat_big = Constant <value_ints = [128]> ()\n" + body
        )
    model = _graph(body, weights, bits, scale)
    rows = 3 if columns > 128 else 75
    before = _run(model, tmp_path, (rows, columns))
    result = DecodeThroughViews()(model)
    assert result.applied == ("w.decoded",) and not result.refused
    assert np.array_equal(_run(model, tmp_path, (rows, columns)), before)


def test_weights_share_one_buffer_one_after_another(tmp_path: Path) -> None:
    model = _chain(6)
    before = _run(model, tmp_path, (75, 128))
    assert len(DecodeThroughViews()(model).applied) == 6
    assert np.array_equal(_run(model, tmp_path, (75, 128)), before)
    session = _session(model, tmp_path)
    assert session._views.bytes == 128 * 128 * 2


def test_weights_that_may_be_looked_up_in_any_order_wait_for_one_another(tmp_path: Path) -> None:
    """All read the same activation: without the chain, nothing keeps one from writing over another."""
    count = 8
    products = "\n".join(f"p{n} = MatMul (t, w{n})" for n in range(count))
    body = f"{products}\ny = Sum ({', '.join(f'p{n}' for n in range(count))})"
    model = _graph(body, {f"w{n}": (128, 128) for n in range(count)})
    before = _run(model, tmp_path, (75, 128))
    DecodeThroughViews()(model)
    assert np.array_equal(_run(model, tmp_path, (75, 128)), before)
    places = {node.outputs[0].name: place for place, node in enumerate(model.graph)}
    waits = [n for n in model.graph if n.op_type == "GatherElements"]
    for first, second in itertools.pairwise(waits):
        assert _reaches(second, _reader(first)), "a look-up does not wait for the one before to be read"
    assert len(places) == len(model.graph)


def _reader(look_up: ir.Node) -> ir.Node:
    """The Cast that reads what a look-up wrote."""
    name = look_up.outputs[0].name
    assert name is not None
    (wait,) = (
        n
        for n in look_up.graph or ()
        if n.op_type == "Reshape" and n.inputs[0].name == name.removesuffix(".written")
    )
    ((cast, _),) = wait.outputs[0].uses()
    return cast


def _reaches(node: ir.Node, wanted: ir.Node) -> bool:
    before: Sequence[ir.Node] = [node]
    seen = set()
    while before:
        *before, node = before
        if node is wanted:
            return True
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer not in seen:
                seen.add(producer)
                before.append(producer)
    return False


def test_two_bindings_of_a_session_have_buffers_of_their_own(tmp_path: Path) -> None:
    model = _chain(2)
    DecodeThroughViews()(model)
    session = _session(model, tmp_path)
    made: list[tuple[int, ...]] = []
    session._new = lambda shape, dtype: made.append(shape) or np.zeros(shape, dtype)
    session.bind({"x": X}, {"y": np.zeros((75, 128), np.float32)})
    session.bind({"x": X}, {"y": np.zeros((75, 128), np.float32)})
    assert made == [(128 * 128 * 2,)] * 2


def test_a_second_run_finds_nothing_left() -> None:
    model = _chain(2)
    DecodeThroughViews()(model)
    result = DecodeThroughViews()(model)
    assert not result.modified and not result.applied and not result.refused


def _packed(model: ir.Model) -> ir.Node:
    (node,) = filter(vq_op.is_packed, model.graph)
    return node


def test_six_bit_codes_are_refused() -> None:
    result = DecodeThroughViews()(_graph("y = MatMul (t, w)", {"w": (128, 96)}, bits=3))
    assert [r.reason for r in result.refused] == ["its codes are computed, or of six bits"]


def test_codes_that_wait_already_are_refused() -> None:
    model = _graph("y = MatMul (t, w)", {"w": (128, 96)})
    DecodeOnDemand()(model)
    result = DecodeThroughViews()(model)
    assert [r.reason for r in result.refused] == ["its codes are computed, or of six bits"]


@pytest.mark.parametrize("number", [1 / 3, 1e6, np.nan])
def test_codewords_that_fp16_has_not_are_refused(number: float) -> None:
    model = _graph("y = MatMul (t, w)", {"w": (128, 96)})
    codebook = _packed(model).inputs[1]
    assert codebook is not None and codebook.const_value is not None
    array = codebook.const_value.numpy().copy()
    array[0, 0] = number
    codebook.const_value = ir.tensor(array, name=codebook.name)
    result = DecodeThroughViews()(model)
    assert not result.modified
    assert [r.reason for r in result.refused] == [
        "its codewords are not two or four numbers of FP16, in FP32"
    ]


def test_a_weight_beside_no_activation_is_refused() -> None:
    model = _graph("y = MatMul (t, w)", {"w": (128, 96)})
    packed = _packed(model)
    (product,) = (n for n in model.graph if n.op_type == "MatMul")
    product.replace_input_with(0, product.inputs[1])
    result = DecodeThroughViews()(model)
    assert [r.where for r in result.refused] == [packed.outputs[0].name]
    assert [r.reason for r in result.refused] == ["what reads it reads no activation"]


@pytest.mark.parametrize(
    ("kind", "shape"), [(ir.DataType.FLOAT, [4]), (ir.DataType.FLOAT16, ["n"]), (ir.DataType.FLOAT16, None)]
)
def test_a_view_of_another_type_or_an_open_size_is_no_view(
    kind: ir.DataType, shape: list[int | str] | None, tmp_path: Path
) -> None:
    model = _chain(1)
    view = ir.Value(
        name=f"{VIEWS}w", type=ir.TensorType(kind), shape=None if shape is None else ir.Shape(shape)
    )
    model.graph.inputs.append(view)
    with pytest.raises(BundleError, match="no view of a packed weight"):
        _session(model, tmp_path)
