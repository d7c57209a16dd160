"""Spares torch's exporter its second trace of a model.

`torch.onnx.export` runs a traced program through fake tensors once more, to take apart the operators that have
no translation to ONNX and to make writes in place into new values. With open sizes that is a third of an
export's time. Most of our graphs have neither: nothing in them writes in place, and every operator has a
translation, once the few below are given theirs. Such a program is translated as it stands; the graph
computes the same to the last bit, and nodes that were made up by the second trace no longer lack module names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.onnx_opset import opset23 as op

AS_THEY_ARE = frozenset(
    {"chunk", "concat", "contiguous", "conv2d", "dropout", "einsum", "flatten", "group_norm", "layer_norm"}
    | {"linear", "pad", "reshape", "rms_norm", "scaled_dot_product_attention", "sym_size", "to", "unflatten"}
    | {"upsample_nearest2d"}
)
"""Composite operators that the exporter, or `TRANSLATIONS`, translates without taking them apart."""


def _cast(
    self: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: str = ""
) -> Any:
    return op.Cast(self, to=dtype)


def _cast_to_device(
    self: Any,
    device: str,
    dtype: int,
    non_blocking: bool = False,
    copy: bool = False,
    memory_format: str = "",
) -> Any:
    return op.Cast(self, to=dtype)


def _cast_to_layout(
    self: Any,
    dtype: int = -1,
    layout: str = "",
    device: str = "",
    pin_memory: bool = False,
    non_blocking: bool = False,
    copy: bool = False,
    memory_format: str = "",
) -> Any:
    return op.Identity(self) if dtype == -1 else op.Cast(self, to=dtype)


def _cosine(self: Any) -> Any:
    """Positions of PixArt and Flux are turned in FP64, of which ONNX Runtime 1.23 has sines alone.

    It is the last that runs on Python 3.10.
    """
    if self.dtype != ir.DataType.DOUBLE:
        return op.Cos(self)
    return op.Sin(op.Add(self, op.Constant(value=ir.tensor(math.pi / 2, ir.DataType.DOUBLE))))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.to.dtype: _cast,
    torch.ops.aten.to.device: _cast_to_device,
    torch.ops.aten.to.dtype_layout: _cast_to_layout,
    torch.ops.aten.cos.default: _cosine,
}
"""For `torch.onnx.export`'s ``custom_translation_table``: what it would else take apart first, or write otherwise."""


def decompose_only_if_needed(exported: torch.export.ExportedProgram) -> None:
    """Makes a program return itself when it is asked to decompose and has nothing to decompose.

    Args:
        exported: A program as `torch.export.export` gives it.
    """
    decompose = exported.run_decompositions

    def run_decompositions(decomp_table: Mapping[Any, Any], **options: Any) -> Any:
        needed = needs_decomposition(exported, decomp_table)
        return decompose(dict(decomp_table), **options) if needed else exported

    exported.run_decompositions = run_decompositions


def needs_decomposition(exported: torch.export.ExportedProgram, table: Mapping[Any, Any]) -> bool:
    """Whether something in a program has no translation as it stands.

    That is an operator in ``table``, one that writes in place, control flow, or a composite one that is not in
    `AS_THEY_ARE`.

    Args:
        exported: A program as `torch.export.export` gives it.
        table: The decompositions that the exporter asks for, by operator.
    """
    graphs = (m.graph for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule))
    return any(
        _is_in_the_way(node, table) for graph in graphs for node in graph.nodes if node.op == "call_function"
    )


def _is_in_the_way(node: torch.fx.Node, table: Mapping[Any, Any]) -> bool:
    operator = node.target
    if not isinstance(operator, torch._ops.OpOverload):
        return isinstance(operator, torch._ops.OperatorBase)  # control flow, and no sum of sizes
    schema = operator._schema
    if operator in table or schema.is_mutable:
        return True
    composite = operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return composite and schema.name.removeprefix("aten::") not in AS_THEY_ARE
