"""Packed weights in pieces, where few rows are multiplied with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from trimtab.calibration.codebook_plan import Settings
from trimtab.calibration.kmeans import make_codebooks
from trimtab.passes import vq_op
from trimtab.passes.vq import PackWeights
from trimtab.passes.vq_pieces import SplitFewRows
from trimtab.passes.vq_views import DecodeThroughViews
from trimtab.runtime.sessions import OnnxRuntimeSession

X = np.random.default_rng(1).standard_normal((2, 128)).astype(np.float32)
NUMBERS = 1 << 12
"""Of a piece: a third of the weights'."""

MATMUL = "y = MatMul (x, w)"
GEMM = "y = Gemm <transB = 1, alpha = 0.5> (x, w, b)"
TURNED = "y = Gemm (x, w, b)"


def _packed(
    body: str, shape: tuple[int, int], bits: int = 2, scale: bool = False, rank: str = "n, 128"
) -> ir.Model:
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        agraph (float[{rank}] x, float[{shape[0]}, {shape[1]}] w, float[96] b) => (float y) {{ {body} }}"""
    )
    random = np.random.default_rng(0)
    for value, sizes in zip(list(model.graph.inputs)[1:], (shape, (96,)), strict=True):
        value.const_value = ir.tensor(random.standard_normal(sizes).astype(np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    PackWeights(make_codebooks({"denoiser": model}, Settings(rules=(("*", bits),), scale=scale)))(model)
    return model


def _run(model: ir.Model, path: Path) -> npt.NDArray[np.float32]:
    ir.save(model, path)
    y = np.zeros((2, 96), np.float32)
    OnnxRuntimeSession(path, fold=False).bind({"x": X}, {"y": y})()
    return y


@pytest.mark.parametrize(("body", "shape"), [(MATMUL, (128, 96)), (GEMM, (96, 128)), (TURNED, (128, 96))])
@pytest.mark.parametrize(("bits", "scale"), [(2, False), (2, True), (3, False), (4, True)])
def test_pieces_give_what_the_whole_gives(
    body: str, shape: tuple[int, int], bits: int, scale: bool, tmp_path: Path
) -> None:
    model = _packed(body, shape, bits, scale)
    before = _run(model, tmp_path / "whole.onnx")
    result = SplitFewRows(NUMBERS)(model)
    assert result.applied == ("w.decoded",)
    sizes = [node.attributes["shape"].as_ints() for node in model.graph if vq_op.is_packed(node)]
    assert sizes == [(32, 128)] * 3
    assert np.abs(_run(model, tmp_path / "pieces.onnx") - before).max() <= 1e-6 * np.abs(before).max()
    DecodeThroughViews()(model)
    assert np.abs(_run(model, tmp_path / "views.onnx") - before).max() <= 1e-6 * np.abs(before).max()


def test_the_last_piece_is_what_is_left(tmp_path: Path) -> None:
    model = _packed(GEMM, (96, 128))
    before = _run(model, tmp_path / "whole.onnx")
    SplitFewRows(40 * 128)(model)
    sizes = [node.attributes["shape"].as_ints()[0] for node in model.graph if vq_op.is_packed(node)]
    assert sum(sizes) == 96 and max(sizes) * 128 <= 40 * 128 and len(set(sizes)) == 1
    SplitFewRows(20 * 128)(model)  # pieces are weights too, and these are small enough to be cut unevenly
    sizes = [node.attributes["shape"].as_ints()[0] for node in model.graph if vq_op.is_packed(node)]
    assert sum(sizes) == 96 and max(sizes) <= 20
    assert np.abs(_run(model, tmp_path / "pieces.onnx") - before).max() <= 1e-6 * np.abs(before).max()


def test_pieces_of_a_file_are_places_in_it_and_no_copies(tmp_path: Path) -> None:
    model = _packed(GEMM, (96, 128))
    before = _run(model, tmp_path / "whole.onnx")
    ir.save(model, tmp_path / "model.onnx", external_data="model.weights", size_threshold_bytes=256)
    model = ir.load(tmp_path / "model.onnx")
    size = (tmp_path / "model.weights").stat().st_size
    SplitFewRows(NUMBERS)(model)
    after = _run(model, tmp_path / "pieces.onnx")
    assert np.abs(after - before).max() <= 1e-6 * np.abs(before).max()
    codes = [node.inputs[0] for node in model.graph if vq_op.is_packed(node)]
    kept = [value.const_value for value in codes if value is not None]
    assert len(kept) == 3 and all(isinstance(tensor, ir.ExternalTensor) for tensor in kept)
    assert (tmp_path / "model.weights").stat().st_size == size
    assert (tmp_path / "pieces.onnx").stat().st_size < size


def test_a_second_run_does_nothing() -> None:
    model = _packed(GEMM, (96, 128))
    SplitFewRows(NUMBERS)(model)
    result = SplitFewRows(NUMBERS)(model)
    assert not result.modified and {r.reason for r in result.refused} == {"it is small"}


@pytest.mark.parametrize(
    ("body", "rank", "reason"),
    [
        (MATMUL, "n, 7, 128", "what it is multiplied with may have many rows"),
        ("t = MatMul (x, w) u = MatMul (x, w) y = Add (t, u)", "n, 128", "several products read it"),
        ("c = Abs (b) y = Gemm (x, w, c)", "n, 128", "its codes are computed, or what is added is no vector"),
    ],
    ids=["many rows", "several readers", "computed bias"],
)
def test_what_cannot_be_split_is_refused(body: str, rank: str, reason: str) -> None:
    model = _packed(body, (128, 96), rank=rank)
    result = SplitFewRows(NUMBERS)(model)
    (refusal,) = result.refused
    assert not result.modified and refusal.reason.startswith(reason)


def test_a_weight_that_is_no_second_factor_is_refused() -> None:
    model = _packed(MATMUL, (128, 96))
    (product,) = (node for node in model.graph if node.op_type == "MatMul")
    x, weight = product.inputs
    product.replace_input_with(0, weight)
    product.replace_input_with(1, x)
    (refusal,) = SplitFewRows(NUMBERS)(model).refused
    assert refusal.reason == "no product reads it as its second factor"
