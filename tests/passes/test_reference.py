"""Numbers of a graph by onnx's reference: what is computed once, and what is let go of."""

from __future__ import annotations

import numpy as np
from graphs import parsed

from trimtab.passes.reference import Reference


def test_large_results_are_let_go_of_and_computed_again_from_other_numbers() -> None:
    weights = ", ".join(map(str, range(512)))
    graph = parsed(
        "g (float[1] x) => (float[512] y) <float[512] w = {" + weights + "}>"
        "{ small = Add (x, x) large = Mul (small, w) y = Mul (large, large) }"
    ).graph
    made = {node.outputs[0].name: node.outputs[0] for node in graph}
    reference = Reference(graph, [made["large"], made["y"]])
    first = reference.values({"x": (1.0,)})
    assert reference.values({"x": (1.0,)})[1] is first[1]
    reference.forget()
    for number in (1.0, 2.0, 3.0):
        large, y = reference.values({"x": (number,)})
        np.testing.assert_array_equal(large, 2 * number * np.arange(512, dtype=np.float32))
        np.testing.assert_array_equal(y, large**2)
        reference.forget()
    assert reference.values({"x": (1.0,)})[1] is not first[1]
