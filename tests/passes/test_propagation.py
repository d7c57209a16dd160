"""Sizes of all tensors of a graph, once its inputs have sizes."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from graphs import parsed as graph

from trimtab.errors import PassError
from trimtab.passes.propagation import Extent, propagate
from trimtab.shapes import shape


def sizes(model: ir.Model, name: str, **symbols: int) -> tuple[int, ...]:
    given = {
        str(value.name): shape(
            [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape], symbols
        )
        for value in model.graph.inputs
        if value.shape is not None
    }
    found = propagate(model, given)
    return next(extent.shape for value, extent in found.items() if value.name == name)


SHAPED = """
agraph (float[n, 4, h, w] x) => (float[n, 4, a, b] y)
<int64[1] minus = {-1}, int64[1] one = {1}, int64[1] two = {2}, float[2] halves = {0.5, 0.5}> {
    whole = Shape <start = 2> (x)
    half = Div (whole, two)
    nc = Shape <start = 0, end = 2> (x)
    wanted = Concat <axis = 0> (nc, half)
    y = Resize <mode = "nearest"> (x, , , wanted)
}
"""


def test_sizes_follow_shape_arithmetic() -> None:
    assert sizes(graph(SHAPED), "y", n=3, h=10, w=6) == (3, 4, 5, 3)
    assert sizes(graph(SHAPED), "y", n=1, h=2, w=4) == (1, 4, 1, 2)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PassError, match="3 axes, 4 needed"):
        propagate(graph(SHAPED), {"x": (1, 4, 8)})


def test_an_operator_of_another_domain_has_the_sizes_that_it_declares() -> None:
    text = """
    agraph (float[n, 4] x) => (float[n, 8] y) <float[n, 8] z> {
        z = own.Unknown (x)
        y = Relu (z)
    }
    """
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 23, "own" : 1]>\n{text}')
    assert sizes(model, "y", n=5) == (5, 8)
    next(iter(model.graph)).outputs[0].shape = None
    with pytest.raises(PassError, match="sizes of z, which Unknown makes"):
        propagate(model, {"x": (5, 4)})


def test_numbers_below_a_byte_are_packed_and_the_last_byte_counts_whole() -> None:
    assert Extent((3, 3), ir.DataType.INT4).bytes == 5
    assert Extent((2, 2), ir.DataType.UINT4).bytes == 2
