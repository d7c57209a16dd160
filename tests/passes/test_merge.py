"""MergeWeights: equal weights become one, and nothing else changes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from graphs import feeds_for, model, run, value

from trimtab.passes.merge import MergeWeights

Weight = npt.NDArray[np.generic]


def sums(**weights: Weight) -> ir.Model:
    """y = x + the first weight + the second ..."""
    x = value("x", [3, 4])
    nodes, last = [], x
    for name in weights:
        nodes.append(ir.node("Add", [last, value(name, [])], name=f"add_{name}"))
        last = nodes[-1].outputs[0]
    last.name, last.type, last.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([3, 4])
    return model([x], nodes, [last], weights)


def weight(seed: int) -> Weight:
    return np.random.default_rng(seed).standard_normal((3, 4)).astype(np.float32)


def test_equal_weights_become_one_and_the_result_stays_bit_for_bit() -> None:
    graph = sums(a=weight(1), b=weight(2), c=weight(1), d=weight(1))
    feeds = feeds_for(graph, {"x": (3, 4)})
    before = run(graph, feeds)["y"]
    assert MergeWeights()(graph).applied == ("c", "d")
    assert set(graph.graph.initializers) == {"a", "b"}
    assert np.array_equal(run(graph, feeds)["y"], before)


def test_a_second_time_there_is_nothing_to_do() -> None:
    graph = sums(a=weight(1), b=weight(1))
    assert MergeWeights()(graph).modified
    result = MergeWeights()(graph)
    assert not result.modified and result.applied == ()


def test_weights_that_differ_in_one_bit_stay_apart() -> None:
    large = np.zeros((3, 4096), np.float32)  # more than is looked at first
    other = large.copy()
    other[1, 1001] = -0.0
    x = value("x", [3, 4096])
    first = ir.node("Add", [x, value("a", [])], name="first")
    second = ir.node("Div", [first.outputs[0], value("b", [])], name="second")
    second.outputs[0].name, second.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = model([x], [first, second], [second.outputs[0]], {"a": large, "b": other})
    assert MergeWeights()(graph).applied == ()
    assert set(graph.graph.initializers) == {"a", "b"}


def test_the_same_bytes_of_another_type_or_shape_stay_apart() -> None:
    ones = np.ones((3, 4), np.float32)
    graph = sums(a=ones, b=ones.view(np.int32), c=ones[:1])
    assert MergeWeights()(graph).applied == ()


def test_a_weight_that_is_the_graphs_output_keeps_its_name() -> None:
    graph = sums(a=weight(1), b=weight(1))
    graph.graph.outputs.append(graph.graph.initializers["b"])
    assert MergeWeights()(graph).applied == ()


def test_empty_weights_and_text_do_no_harm() -> None:
    graph = sums(a=weight(1))
    for name in ("none", "nor this"):
        graph.graph.register_initializer(
            ir.Value(name=name, const_value=ir.tensor(np.zeros((0, 4), np.float32), name=name))
        )
    graph.graph.register_initializer(
        ir.Value(name="text", const_value=ir.StringTensor([b"a", b"b"], shape=ir.Shape([2]), name="text"))
    )
    assert MergeWeights()(graph).applied == ("nor this",)
