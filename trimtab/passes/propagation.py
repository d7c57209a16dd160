"""Size and type of every tensor of a graph, once its inputs have sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimtab.errors import BundleError, PassError
from trimtab.shapes import bind, evaluate


@dataclass(frozen=True)
class Extent:
    """What a tensor takes.

    Attributes:
        shape: Sizes.
        dtype: The type of its elements.
    """

    shape: tuple[int, ...]
    dtype: ir.DataType

    @property
    def elements(self) -> int:
        """How many."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of all elements, packed."""
        return -(-self.elements * self.dtype.bitwidth // 8)


Extents = Mapping[ir.Value, Extent]
"""Every input, initializer and result in a graph -> what it takes."""

_SMALL = 1024
"""Elements up to which a tensor's value is followed: shapes, axes and scales are far smaller, and a table of
positions, which nothing takes for a size, is larger."""


def propagate(model: ir.Model, inputs: Mapping[str, Sequence[int]]) -> Extents:
    """Walks a graph once and infers all sizes, following the values of shape arithmetic.

    Standard operators go by ONNX's own inference. A call of a function, and an operator of another domain, has
    the sizes that its outputs declare.

    Args:
        model: Not changed. Weights are not read.
        inputs: Graph input -> sizes, for every input whose sizes are open.

    Raises:
        PassError: An input's sizes are missing or do not fit, or a node's outputs cannot be inferred.
    """
    extents: dict[ir.Value, Extent] = {}
    symbols: dict[str, int] = {}
    for value in model.graph.inputs:
        dims = _dims(value)
        name = value.name or ""
        shape = tuple(dim for dim in inputs.get(name, dims or ()) if isinstance(dim, int))
        if dims is None and name not in inputs:
            raise PassError(f"the graph's input {name} has no shape: give its sizes")
        if dims is not None and (problem := bind(dims, shape, symbols)):
            raise PassError(f"the graph's input {name} of {dims} is given {list(shape)}: {problem}")
        extents[value] = Extent(shape, value.dtype or ir.DataType.FLOAT)
    return _Walk(model, extents, symbols).run()


def _dims(value: ir.Value) -> list[int | str] | None:
    if value.shape is None:
        return None
    return [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]


_LIKE_FIRST = frozenset(("GroupNormalization", "Mish", "MeanVarianceNormalization"))
"""Operators that ONNX has no inference of its own for: their result is as what they read."""


class _Walk:
    """One walk over one graph."""

    def __init__(self, model: ir.Model, extents: dict[ir.Value, Extent], symbols: Mapping[str, int]) -> None:
        self.model, self.extents, self.symbols = model, extents, symbols
        self.opsets = dict(model.graph.opset_imports)
        self.values: dict[ir.Value, npt.NDArray[Any]] = {}

    def run(self) -> Extents:
        for value in self.model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                raise PassError(f"the initializer {value.name} has no value: load the graph with its weights")
            self.extents[value] = Extent(tuple(tensor.shape.numpy()), tensor.dtype)
            if tensor.size <= _SMALL:
                self.values[value] = tensor.numpy()
        for node in self.model.graph:
            self._visit(node)
        return self.extents

    def _visit(self, node: ir.Node) -> None:
        if node.domain == "":
            results = self._known(node)
            if results is not None:
                for value, array in zip(node.outputs, results, strict=False):
                    self._learn(value, np.asarray(array))
                return
        inferred = self._inferred(node) if node.domain == "" else {}
        if node.domain == "" and node.op_type in _LIKE_FIRST and node.inputs[0] is not None:
            inferred = {str(node.outputs[0].name): self.extents[node.inputs[0]]}
        for value in node.outputs:
            if value.name:
                self.extents[value] = inferred.get(value.name) or self._declared(node, value)

    def _learn(self, value: ir.Value, array: npt.NDArray[Any]) -> None:
        self.extents[value] = Extent(array.shape, value.dtype or ir.DataType.from_numpy(array.dtype))
        if array.size <= _SMALL:
            self.values[value] = array

    def _known(self, node: ir.Node) -> list[Any] | None:
        """A node's results, where they follow from sizes and constants alone."""
        if node.op_type == "Constant":
            tensor = ir.convenience.get_const_tensor(node.outputs[0])
            return None if tensor is None else [tensor.numpy()]
        if node.op_type == "Shape" and node.inputs[0] is not None:
            whole = self.extents[node.inputs[0]].shape
            start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(whole))
            return [np.array(whole[start:end], np.int64)]
        if node.op_type == "Size" and node.inputs[0] is not None:
            return [np.array(self.extents[node.inputs[0]].elements, np.int64)]
        if not node.inputs or any(v is not None and v not in self.values for v in node.inputs):
            return None
        from onnx.reference import ReferenceEvaluator

        feeds = {v.name: self.values[v] for v in node.inputs if v is not None}
        try:
            evaluator = ReferenceEvaluator(ir.serde.serialize_node(node), opsets=self.opsets)
            return list(evaluator.run(None, feeds))
        except Exception:  # what the reference cannot do is left to inference
            return None

    def _inferred(self, node: ir.Node) -> dict[str, Extent]:
        import onnx

        types, data = {}, {}
        for value in node.inputs:
            if value is None or not value.name:
                continue
            extent = self.extents[value]
            types[value.name] = onnx.helper.make_tensor_type_proto(int(extent.dtype), extent.shape)
            if value in self.values:
                data[value.name] = onnx.numpy_helper.from_array(self.values[value], value.name)
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opsets.get("", 1), "")
            imports = [onnx.helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
            outputs = onnx.shape_inference.infer_node_outputs(
                schema, ir.serde.serialize_node(node), types, data, None, imports
            )
        except Exception:  # the declared sizes remain
            return {}
        found = {}
        for name, kind in outputs.items():
            tensor = kind.tensor_type
            if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
                shape = tuple(d.dim_value for d in tensor.shape.dim)
                found[name] = Extent(shape, ir.DataType(tensor.elem_type))
        return found

    def _declared(self, node: ir.Node, value: ir.Value) -> Extent:
        dims = _dims(value)
        try:
            if dims is not None and value.dtype is not None:
                return Extent(tuple(evaluate(dim, self.symbols) for dim in dims), value.dtype)
        except BundleError:
            pass
        raise PassError(
            f"the sizes of {value.name}, which {node.op_type} makes, do not follow from the inputs': "
            "declare its shape and type in the graph"
        )
