"""Specialize: sizes become numbers, arithmetic on them goes, and nothing else changes."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from graphs import feeds_for, model, run, value

from trimtab.errors import PassError
from trimtab.passes.specialize import Specialize

SIZES = {"x": (2, 6, 4), "like": (2, 3)}


def graph() -> ir.Model:
    """y = x as (n, heads, -1) times w, by way of Shape; the exporter's names are on every value."""
    x, like = value("x", ["n", "width", 4]), value("like", ["n", "width//2"])
    w, axis, three = (value(name, []) for name in ("w", "axis", "three"))
    n = ir.node("Shape", [x], {"start": 0, "end": 1}, name="n")
    sizes = ir.node("Concat", [n.outputs[0], three], {"axis": 0}, name="sizes")
    shaped = ir.node("Reshape", [x, sizes.outputs[0]], name="shaped")
    product = ir.node("Mul", [shaped.outputs[0], w], name="product")
    total = ir.node("ReduceSum", [like, axis], {"keepdims": 1}, name="total")
    row = ir.node("Unsqueeze", [total.outputs[0], axis], name="row")
    added = ir.node("Add", [product.outputs[0], row.outputs[0]], name="added")
    product.outputs[0].shape = ir.Shape(["n", 3, "4*width//3"])
    product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    result = added.outputs[0]
    result.name, result.type = "y", ir.TensorType(ir.DataType.FLOAT)
    result.shape = ir.Shape(["n", 3, "4*width//3"])
    nodes = [n, sizes, shaped, product, total, row, added]
    weights = {"w": np.float32([[1], [2], [3]]), "axis": np.array([1]), "three": np.array([3, -1])}
    return model([x, like], nodes, [result], weights)


def test_sizes_become_numbers_and_the_arithmetic_on_them_goes() -> None:
    whole, fixed = graph(), graph()
    result = Specialize(SIZES)(fixed)
    assert {"x", "like", "y"} <= set(result.applied)
    assert {node.op_type for node in fixed.graph} == {"Reshape", "Mul", "ReduceSum", "Unsqueeze", "Add"}
    values = [*fixed.graph.inputs, *(v for node in fixed.graph for v in node.outputs)]
    assert all(v.shape is not None and v.shape.is_static() for v in values)
    feeds = feeds_for(whole, SIZES)
    assert np.array_equal(run(fixed, feeds)["y"], run(whole, feeds)["y"])


def test_a_second_time_there_is_nothing_to_do() -> None:
    fixed = graph()
    Specialize(SIZES)(fixed)
    before = ir.to_proto(fixed).SerializeToString()
    assert not Specialize(SIZES)(fixed).applied
    assert ir.to_proto(fixed).SerializeToString() == before


def test_a_result_that_follows_from_sizes_alone_becomes_a_constant_of_which_nothing_warns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fixed = graph()
    width = ir.node("Shape", [fixed.graph.inputs[0]], {"start": 1, "end": 2}, name="width")
    number = ir.node("Cast", width.outputs, {"to": ir.DataType.FLOAT}, name="number")
    table = ir.node("Mul", [number.outputs[0], number.outputs[0]], name="table")
    fixed.graph.insert_before(fixed.graph[0], [width, number, table])
    table.outputs[0].name, table.outputs[0].shape = "table", ir.Shape([1])
    table.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    fixed.graph.outputs.append(table.outputs[0])
    Specialize(SIZES)(fixed)
    assert run(fixed, feeds_for(fixed, SIZES))["table"].tolist() == [36]
    assert not caplog.records


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ({"x": (2, 6, 4)}, "like has no sizes"),
        ({"x": (2, 6, 5), "like": (2, 3)}, "5 along axis 2, 4 needed"),
        ({"x": (2, 6), "like": (2, 3)}, "2 axes, 3 needed"),
        ({"x": (2, 6, 4), "like": (2, 4)}, "width//2 is 3"),
        ({"x": (2, 6, 4), "like": (3, 3)}, "3 along axis 0, 2 needed"),
    ],
)
def test_sizes_that_the_graph_does_not_have_are_refused(
    sizes: dict[str, tuple[int, ...]], found: str
) -> None:
    with pytest.raises(PassError, match=re.escape(found)):
        Specialize(sizes)(graph())
