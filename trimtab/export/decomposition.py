"""Spares torch's exporter its second trace of a model.

`torch.onnx.export` runs a traced program through fake tensors once more, to take apart the operators that have
no translation to ONNX and to make writes in place into new values. With open sizes that is a third of an
export's time. Most of our graphs have neither: nothing in them writes over what is read again, and every operator has a
translation, once the few below are given theirs. Such a program is translated as it stands; the graph
computes the same to the last bit, and nodes that were made up by the second trace no longer lack module names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
import torch
from onnxscript.onnx_opset import opset23 as op

T = TypeVar("T")
"""For arguments of one type: numbers among them become constants of it."""

AS_THEY_ARE = frozenset(
    {"chunk", "concat", "contiguous", "conv2d", "dropout", "einsum", "flatten", "group_norm", "layer_norm"}
    | {"linear", "pad", "reshape", "rms_norm", "scaled_dot_product_attention", "sym_size", "to", "unflatten"}
    | {"upsample_nearest2d"}
)
"""Composite operators that the exporter translates without taking them apart; `TRANSLATIONS` has others."""


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


def _from(self: T, other: T, alpha: float = 1.0) -> Any:
    return op.Sub(other, _times(self, alpha))


def _and(self: Any, other: Any) -> Any:
    return op.And(self, other) if self.dtype == ir.DataType.BOOL else op.BitwiseAnd(self, other)


def _outer(self: Any, vec2: Any) -> Any:
    """Of two types at times: positions in FP32, frequencies in FP64."""
    kinds = (ir.tensor_adapters.to_torch_dtype(value.dtype) for value in (self, vec2))
    wider = ir.tensor_adapters.from_torch_dtype(torch.promote_types(*kinds))
    column, row = (op.Cast(value, to=wider) for value in (self, vec2))
    return op.Mul(op.Unsqueeze(column, [1]), op.Unsqueeze(row, [0]))


def _smaller(self: Any, other: Any) -> Any:
    return op.Min(self, other)


def _where(condition: Any, self: T, other: T) -> Any:
    return op.Where(condition, self, other)


def _add(self: T, other: T, alpha: float = 1.0) -> Any:
    return op.Add(self, _times(other, alpha))


def _divide(self: T, other: T) -> Any:
    return op.Div(self, other)


def _times(value: Any, factor: float) -> Any:
    return value if factor == 1 else op.Mul(value, op.Constant(value=ir.tensor(factor, value.dtype)))


def _meshgrid(tensors: Any, indexing: str = "ij") -> Any:
    axes = list(range(len(tensors)))
    if indexing == "xy":
        axes[:2] = axes[1::-1]
    sizes = op.Concat(*(op.Shape(tensors[axis]) for axis in axes), axis=0)
    places = [[other for other in range(len(axes)) if other != axes.index(i)] for i in range(len(axes))]
    return tuple(op.Expand(op.Unsqueeze(t, place), sizes) for t, place in zip(tensors, places, strict=True))


def _repeat_interleave(self: Any, repeats: Any, dim: int | None = None, output_size: Any = None) -> Any:
    """Written out, as onnxscript 0.7's is wrong for one axis."""
    if dim is None:
        self, axis, rank = op.Reshape(self, [-1]), 0, 1
    else:
        rank = len(self.shape)
        axis = dim % rank
    here = np.arange(rank + 1) == axis + 1
    times = op.Where(op.Constant(value=ir.tensor(here)), repeats, op.Constant(value_ints=[1] * (rank + 1)))
    before, after = op.Shape(self, start=0, end=axis), op.Shape(self, start=axis + 1)
    sizes = op.Concat(before, op.Constant(value_ints=[-1]), after, axis=0)
    return op.Reshape(op.Expand(op.Unsqueeze(self, [axis + 1]), times), sizes)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.to.dtype: _cast,
    torch.ops.aten.to.device: _cast_to_device,
    torch.ops.aten.to.dtype_layout: _cast_to_layout,
    torch.ops.aten.cos.default: _cosine,
    torch.ops.aten.rsub.Scalar: _from,
    torch.ops.aten.__and__.Tensor: _and,
    torch.ops.aten.outer.default: _outer,
    torch.ops.aten.min.other: _smaller,
    torch.ops.aten.where.ScalarOther: _where,
    torch.ops.aten.meshgrid.indexing: _meshgrid,
    torch.ops.aten.repeat_interleave.self_int: _repeat_interleave,
    torch.ops.aten.add_.Tensor: _add,
    torch.ops.aten.div_.Tensor: _divide,
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

    That is an operator in ``table``, one that writes over what something else may read, control flow, or a composite
    one that is in neither `AS_THEY_ARE` nor `TRANSLATIONS`.

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
    if operator in table or (schema.is_mutable and not _writes_over_what_nothing_else_reads(node)):
        return True
    known = operator in TRANSLATIONS or schema.name.removeprefix("aten::") in AS_THEY_ARE
    return _is_composite(operator) and not known


def _writes_over_what_nothing_else_reads(node: torch.fx.Node) -> bool:
    """Whether an operator in place is one of `TRANSLATIONS`, and as good as one that makes a new value.

    So it is if its target was computed by the graph, for it alone, and shares its memory with nothing.
    """
    target, *others = node.args
    if node.target not in TRANSLATIONS or not isinstance(target, torch.fx.Node) or len(target.users) > 1:
        return False
    maker = target.target
    if not isinstance(maker, torch._ops.OpOverload) or _is_composite(maker):
        return False
    if any(result.alias_info for result in maker._schema.returns):
        return False
    dtypes = {n.meta["val"].dtype for n in (target, *others) if isinstance(n, torch.fx.Node)}
    return len(dtypes) == 1


def _is_composite(operator: torch._ops.OpOverload) -> bool:
    return operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
