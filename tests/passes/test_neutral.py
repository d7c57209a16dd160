"""What does nothing to the last bit is dropped, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphs import parsed, run
from onnxscript.rewriter.rules.common import _no_op
from torch import Tensor, nn

from trimtab.export.trace import Example, trace
from trimtab.passes.specialize import Specialize


class Ratio(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 0.0) * 1.0 / (x.abs() * 1.000001 + 1e-15)


def test_a_trace_keeps_what_keeps_a_divisor_from_zero() -> None:
    graph = trace(Ratio(), {"x": Example(torch.randn(2, 4), ("n", None))}, ["y"])
    assert [node.op_type for node in graph.graph] == ["Abs", "Mul", "Add", "Div"]
    x = np.array([[0, 1, -2, 3]], np.float32)
    assert run(graph, {"x": x})["y"].tolist() == Ratio()(torch.from_numpy(x)).tolist()


@pytest.mark.parametrize(
    ("operation", "kept"),
    [
        ("Add(x, c)", 1e-12),
        ("Add(c, x)", -1e-9),
        ("Sub(x, c)", 1e-10),
        ("Mul(x, c)", 1.000002),
        ("Mul(c, x)", 0.999998),
        ("Div(x, c)", 1.000002),
    ],
)
def test_fixed_sizes_drop_a_neutral_element_and_nothing_near_it(operation: str, kept: float) -> None:
    def left(constant: float) -> list[str]:
        model = parsed(
            f"g (float[n,4] x) => (float[n,4] y) <float c = {{{constant!r}}}> {{ t = {operation} y = Neg(t) }}"
        )
        Specialize({"x": (2, 4)})(model)
        return [node.op_type for node in model.graph]

    name = operation.partition("(")[0]
    assert left(kept) == [name, "Neg"]
    assert left(0.0 if name in ("Add", "Sub") else 1.0) == ["Neg"]


def test_the_rules_are_themselves_again() -> None:
    trace(Ratio(), {"x": Example(torch.randn(2, 4), ("n", None))}, ["y"])
    assert all("try_rewrite" not in vars(rule) for rule in _no_op.rules)
