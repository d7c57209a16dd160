"""Numbers that a graph computes from a few of its inputs, by onnx's reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimtab.errors import PassError
from trimtab.passes import vq_op
from trimtab.passes.partition import reach

if TYPE_CHECKING:
    from onnx.reference import ReferenceEvaluator

Array = npt.NDArray[np.generic]

_SMALL = 256
"""Elements up to which arrays are compared: time steps, ranges and routing."""


class Reference:
    """Some values of a graph, for one set of numbers after another; no node runs twice on the same numbers.

    Args:
        graph: It stays as it is.
        wanted: What is computed.
        open_size: What a size is taken for that is no number yet.
    """

    def __init__(self, graph: ir.Graph, wanted: Sequence[ir.Value], open_size: int = 1) -> None:
        self._graph = graph
        self._wanted = list(wanted)
        self._sizes = {
            node.outputs[0]: _sizes(node, source.shape, open_size)
            for node in graph
            if node.op_type == "Shape" and (source := node.inputs[0]) is not None and source.shape is not None
        }
        makers = reach(self._wanted, dict.fromkeys(self._sizes), set())
        self._nodes = [node for node in graph if node in makers]
        self._evaluators: dict[ir.Node, ReferenceEvaluator] = {}
        self._small: dict[tuple[Any, ...], Array] = {}
        self._made: dict[tuple[Any, ...], list[Array]] = {}

    def values(self, given: Mapping[str, tuple[float, ...]]) -> list[Array]:
        """What is wanted.

        Args:
            given: Input of the graph -> its numbers, for all that are needed.

        Raises:
            PassError: The reference has no such operator.
        """
        values: dict[ir.Value, Array] = {value: self._one(array) for value, array in self._sizes.items()}
        for value in self._graph.inputs:
            if str(value.name) in given:
                assert value.dtype is not None and value.shape is not None
                array = np.array(given[str(value.name)], value.dtype.numpy())
                values[value] = self._one(array.reshape(value.shape.numpy()))
        for node in self._nodes:
            values.update(zip(node.outputs, self._results(node, values), strict=True))
        return [values[value] for value in self._wanted]

    def forget(self) -> None:
        """Lets go of what was made of large arrays: of numbers that come once, none is asked for again."""
        held = set(map(id, self._small.values()))
        self._made = {key: made for key, made in self._made.items() if held.issuperset(key[1:])}

    def _results(self, node: ir.Node, values: Mapping[ir.Value, Array]) -> list[Array]:
        read = [value for value in node.inputs if value is not None]
        computed = {str(value.name): values[value] for value in read if value.const_value is None}
        key = (node, *map(id, computed.values()))
        if key not in self._made:
            constants = {str(v.name): v.const_value.numpy() for v in read if v.const_value is not None}
            results = self._run(node, computed | constants)
            self._made[key] = [a if a.size > _SMALL else self._one(a) for a in results]
        return self._made[key]

    def _run(self, node: ir.Node, feeds: dict[str, Array]) -> list[Array]:
        if vq_op.is_packed(node):
            return [vq_op.decoded(node)]
        if node not in self._evaluators:
            from onnx.reference import ReferenceEvaluator

            try:
                self._evaluators[node] = ReferenceEvaluator(
                    ir.serde.serialize_node(node), opsets=dict(self._graph.opset_imports)
                )
            except NotImplementedError as error:
                raise PassError(
                    f"{node.outputs[0].name} is computed by {node.op_type}, which onnx's reference lacks"
                ) from error
        return [np.asarray(array) for array in self._evaluators[node].run(None, feeds)]

    def _one(self, array: Array) -> Array:
        """One object for equal arrays, so that what is made of them, as of a range's routing, is made once."""
        return self._small.setdefault((array.shape, array.dtype.str, array.tobytes()), array)


def _sizes(node: ir.Node, shape: ir.Shape, open_size: int) -> Array:
    start, end = (
        node.attributes[key].as_int() if key in node.attributes else None for key in ("start", "end")
    )
    dims = [dim if isinstance(dim, int) else open_size for dim in shape]
    return np.array(dims[start:end], np.int64)
