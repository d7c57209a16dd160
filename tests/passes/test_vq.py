"""Packed weights: what the operator means, where the pass puts it, and that the graph computes the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from packed import graph, node, random_codes, run

from trimtab.errors import PassError
from trimtab.passes import vq_op
from trimtab.passes.codebooks import Codebooks
from trimtab.passes.vq import PackWeights, sites
from trimtab.weights import parameter_count, weight_bytes


def test_six_bit_indices_come_back_from_three_bytes_for_four() -> None:
    codes = np.random.default_rng(0).integers(0, 64, (5, 7)).astype(np.uint8)
    packed = vq_op.pack_indices(codes, 6)
    assert packed.shape == (5, 6)
    assert packed[0, 0] == codes[0, 0] | (codes[0, 1] & 3) << 6  # the first code in the lowest bits
    np.testing.assert_array_equal(vq_op.unpack_indices(packed, 6)[:, :7], codes)


def test_a_segments_own_weights_go_before_those_of_the_same_name_elsewhere() -> None:
    common, own = random_codes((6, 16)), random_codes((6, 16), seed=1)
    books = Codebooks("", {"w": common, "b/w": own, "v": common}, {"b/v": "it is too small"})
    assert books.of("a").layers["w"] is common and books.of("b").layers["w"] is own
    assert "v" in books.of("a").layers and "v" not in books.of("b").layers
    assert books.of("b").kept["v"] == "it is too small"


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
def test_a_rows_neighbours_are_input_channels(kernel: tuple[int, ...]) -> None:
    weight = np.arange(2 * 5 * int(np.prod(kernel)), dtype=np.float32).reshape(2, 5, *kernel)
    rows = vq_op.to_rows(weight)
    np.testing.assert_array_equal(rows[1, :5], weight[(1, slice(None), *[0] * len(kernel))])
    np.testing.assert_array_equal(vq_op.from_rows(rows, weight.shape), weight)


# Weight's torch shape, the node that reads it, the shape of what it is applied to.
CASES = {
    "matmul": ((6, 16), "MatMul", {}, (2, 3, 16)),
    "matmul, odd channels": ((7, 13), "MatMul", {}, (2, 3, 13)),
    "gemm": ((6, 16), "Gemm", {"transB": 1}, (3, 16)),
    "gemm, odd channels, inputs first": ((5, 9), "Gemm", {}, (3, 9)),
    "conv 1x1": ((6, 8, 1, 1), "Conv", {}, (1, 8, 5, 4)),
    "conv 3x3": ((6, 8, 3, 3), "Conv", {"pads": [1, 1, 1, 1]}, (2, 8, 5, 4)),
    "conv 3x3, odd channels": ((5, 7, 3, 3), "Conv", {"strides": [2, 2]}, (1, 7, 5, 4)),
    "conv, grouped": ((6, 4, 3, 3), "Conv", {"group": 2}, (1, 8, 5, 4)),
    "conv, one axis": ((6, 4, 3), "Conv", {}, (1, 4, 9)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("bits", "scaled"), [(2, False), (2, True), (3, True), (3, False), (4, False)])
def test_a_packed_graph_computes_what_the_decoded_one_does(case: str, bits: int, scaled: bool) -> None:
    shape, op_type, attributes, x_shape = CASES[case]
    packed = random_codes(shape, bits, scaled)
    weight = vq_op.from_rows(packed.rows(), shape)
    stored = weight.T if op_type == "MatMul" or (op_type == "Gemm" and not attributes) else weight

    def model() -> ir.Model:
        return graph(
            {"x": x_shape}, {"w": np.ascontiguousarray(stored)}, node(op_type, "x", "w", **attributes)
        )

    small = model()
    result = PackWeights(Codebooks("", {"w": packed}))(small)
    assert result.applied == ("w",) and "w" not in small.graph.initializers
    x = np.random.default_rng(1).standard_normal(x_shape).astype(np.float32)
    expected = run(model(), x=x)
    for fold in (False, True):
        found = run(small, fold=fold, x=x)
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(("bits", "scaled"), [(2, False), (2, True), (3, True), (4, False)])
@pytest.mark.parametrize("columns", [16, 13])
def test_the_function_decodes_bit_for_bit(bits: int, scaled: bool, columns: int) -> None:
    packed = random_codes((7, columns), bits, scaled)
    one = np.eye(columns, dtype=np.float32)[None]
    model = graph({"x": one.shape}, {"w": packed.rows().T.copy()}, node("MatMul", "x", "w"))
    PackWeights(Codebooks("", {"w": packed}))(model)
    decoded = next(n for n in model.graph if vq_op.is_packed(n)).outputs[0]
    model.graph.outputs[0] = decoded
    np.testing.assert_array_equal(run(model, fold=False, x=one), packed.rows())


def test_a_weight_that_several_nodes_read_is_packed_once() -> None:
    packed = random_codes((16, 16))
    model = graph(
        {"x": (3, 16)},
        {"w": packed.rows().copy()},
        node("Gemm", "x", "w", transB=1),
        node("MatMul", "w.Gemm", "w"),
    )
    x = np.random.default_rng(1).standard_normal((3, 16)).astype(np.float32)
    expected = run(model, x=x)
    PackWeights(Codebooks("", {"w": packed}))(model)
    assert sum(map(vq_op.is_packed, model.graph)) == 1
    assert np.abs(run(model, fold=False, x=x) - expected).max() <= 1e-6 * np.abs(expected).max()


def test_a_second_run_changes_nothing() -> None:
    packed = random_codes((6, 16))
    model = graph({"x": (3, 16)}, {"w": packed.rows().T.copy()}, node("MatMul", "x", "w"))
    pass_ = PackWeights(Codebooks("", {"w": packed}))
    assert pass_(model).modified
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    again = pass_(model)
    assert not again.modified and not again.applied
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before


def test_only_what_is_read_as_a_weight_is_a_site() -> None:
    w = np.ones((4, 4), np.float32)
    model = graph(
        {"x": (4, 4)},
        {"left": w, "table": w, "both": w, "weight": w},
        node("MatMul", "left", "x"),
        node("Add", "left.MatMul", "table"),
        node("MatMul", "table.Add", "both"),
        node("Add", "both.MatMul", "both"),
        node("MatMul", "both.Add", "weight"),
    )
    # An Add's name hides the MatMul's of the same input; the graph is only looked at.
    assert [site.name for site in sites(model)] == ["weight"]


def test_a_stack_of_matrices_is_no_site() -> None:
    model = graph(
        {"x": (4, 2, 4)}, {"experts": np.ones((4, 4, 4), np.float32)}, node("MatMul", "x", "experts")
    )
    assert not list(sites(model))


def test_what_the_codebooks_keep_is_refused_with_their_reason() -> None:
    model = graph({"x": (3, 16)}, {"w": np.ones((16, 6), np.float32)}, node("MatMul", "x", "w"))
    result = PackWeights(Codebooks("", {}, {"w": "it is an embedder"}))(model)
    assert not result.modified
    assert [(r.where, r.reason) for r in result.refused] == [("w", "it is an embedder")]


def test_codes_of_another_shape_are_refused_by_name() -> None:
    model = graph({"x": (3, 16)}, {"w": np.ones((16, 6), np.float32)}, node("MatMul", "x", "w"))
    with pytest.raises(PassError, match=r"w is \(6, 16\) and its codes are for 8 rows of 16"):
        PackWeights(Codebooks("", {"w": random_codes((8, 16))}))(model)


def test_bytes_fall_and_parameters_do_not() -> None:
    packed = random_codes((64, 256))
    model = graph({"x": (3, 256)}, {"w": packed.rows().T.copy()}, node("MatMul", "x", "w"))
    books = Codebooks("", {"w": packed})
    PackWeights(books)(model)
    assert parameter_count(model) == 64 * 256
    assert weight_bytes(model) == books.nbytes == 64 * 256 // 4 + 256 * 4 * 4
