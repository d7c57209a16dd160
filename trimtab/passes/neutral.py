"""onnxscript's rules for what does nothing, held to what does nothing.

They drop ``x + 0`` and ``x * 1``, and take any constant for 0 that is below 1e-8, and for 1 within 1e-5. So they drop
what keeps a divisor from 0, where it is small enough, and a picture of Sana held NaN.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.rules.common import _no_op

_NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}
"""Operator -> the constant with which it does nothing."""


@contextlib.contextmanager
def exact_neutral_elements() -> Iterator[None]:
    """Within it a constant is 0 or 1 to them if it is to the last bit."""
    for rule in _no_op.rules:
        rule.try_rewrite = functools.partial(_if_exact, rule.try_rewrite)
    try:
        yield
    finally:
        for rule in _no_op.rules:
            del rule.try_rewrite  # the method of its class is back


def _if_exact(try_rewrite: Any, model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
    for value in node.inputs if node.op_type in _NEUTRAL else ():
        constant = None if value is None else ir.convenience.get_const_tensor(value)
        if constant is not None and constant.size == 1 and constant.numpy().item() != _NEUTRAL[node.op_type]:
            return None
    return try_rewrite(model, graph, node, **options)
