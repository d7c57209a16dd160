"""A graph for one step as a graph for all steps: a row for each step and each row of its conditions.

Rows of a denoiser know nothing of each other, so steps can be rows, wherever the graph takes a time step for each row:

    timestep (), labels (rows,)           -> result (rows, channels), or with more axes
    timestep (steps,), labels (rows,)     -> result (steps, rows, channels)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from trimtab.errors import PassError
from trimtab.passes.constants import shared_constant

STEPS = "steps"
"""The symbol of how many time steps there are."""


def for_all_steps(model: ir.Model, name: str) -> None:
    """Edits a graph to take a vector of time steps.

    Exact: the same operators run on the same rows.

    Args:
        model: Its results are (rows, channels), or have more axes, and one of its other inputs is (rows, ...) at least.
            It is edited.
        name: The input that is the time step: a number, or a vector of one.

    Raises:
        PassError: The graph does not take a time step for each row, or no other input has rows.
    """
    graph = model.graph
    time = next(value for value in graph.inputs if value.name == name)
    counts = {value.shape[0] for value in graph.outputs if value.shape is not None}
    rows = next(iter(counts))
    if len(counts) > 1 or not isinstance(rows, ir.SymbolicDim):
        raise PassError("its products have not all as many rows")
    conditions = [value for value in graph.inputs if value is not time and value.shape]
    rowed = [value for value in conditions if value.shape is not None and value.shape[0] == rows]
    if not rowed or any(value.shape != ir.Shape([1]) for value in conditions if value not in rowed):
        raise PassError("no condition has as many rows as what is computed, or one has others")
    vectors = _vectors(time)
    whole = ir.Value(name=name, shape=ir.Shape([STEPS]), type=time.type)
    before = _Nodes(graph, "before")
    steps, count = before.sizes(whole), before.sizes(rowed[0], 0, 1)
    column = before.op("Unsqueeze", [whole, before.numbers(1)], [STEPS, 1])
    times = before.flat(column, before.join([steps, count], 2), [rows])
    many = dict.fromkeys(vectors, times)
    for value in rowed:
        assert value.shape is not None
        rank = value.shape.rank()
        every = before.join([steps, before.sizes(value, 0, rank)], rank + 1)
        many[value] = before.flat(value, every, list(value.shape))
    body = list(graph)
    graph.insert_before(body[0], before.nodes)
    for node in body:
        for index, read in enumerate(node.inputs):
            if read is not None and read in many:
                node.replace_input_with(index, many[read])
    graph.remove([node for node in body if vectors.intersection(node.outputs)], safe=True)
    graph.inputs[graph.inputs.index(time)] = whole
    _rename_rows(body, rows)
    after = _Nodes(graph, "after")
    # The last first: ONNX Runtime goes back from the last node, and would else keep the rows of all results to the end.
    for index, value in reversed(list(enumerate(graph.outputs))):
        graph.outputs[index] = _by_step(after, value, rows, [steps, count])
    graph.extend(after.nodes)


class _Nodes:
    """New nodes at some place of a graph, whose results have types and shapes."""

    def __init__(self, graph: ir.Graph, place: str) -> None:
        self._graph = graph
        self._place = place
        self._tape = ir.tape.Tape()

    @property
    def nodes(self) -> Sequence[ir.Node]:
        return self._tape.nodes

    def op(
        self, operator: str, inputs: Sequence[ir.Value], dims: Sequence[Any], **attributes: int
    ) -> ir.Value:
        """The result of an operator, of its first input's type unless it counts."""
        result = self._tape.op(operator, inputs, attributes)
        counts = operator == "Shape"
        result.type = ir.TensorType(ir.DataType.INT64) if counts else inputs[0].type
        result.shape = ir.Shape(dims)
        result.name = f"{self._graph.name}/{self._place}_{len(self.nodes)}"
        return result

    def numbers(self, *values: int) -> ir.Value:
        """A constant of whole numbers, one for all who ask for the same."""
        name = f"{self._graph.name}/numbers_{'_'.join(map(str, values))}"
        return shared_constant(self._graph, name, np.array(values, np.int64))

    def sizes(self, value: ir.Value, start: int = 0, end: int = 1) -> ir.Value:
        """Some sizes of a value."""
        return self.op("Shape", [value], [end - start], start=start, end=end)

    def join(self, sizes: Sequence[ir.Value], count: int) -> ir.Value:
        """Sizes one behind the other, and how many they are."""
        return self.op("Concat", sizes, [count], axis=0)

    def flat(self, value: ir.Value, every: ir.Value, dims: Sequence[Any]) -> ir.Value:
        """A value repeated for all steps, and steps and rows as one axis.

        Args:
            value: What is repeated.
            every: The sizes with an axis of steps in front.
            dims: Those of the result, for one step.
        """
        repeated = self.op("Expand", [value, every], [STEPS, *dims])
        inner = [self.sizes(value, 1, len(dims))] if len(dims) > 1 else []
        sizes = self.join([self.numbers(-1), *inner], len(dims)) if inner else self.numbers(-1)
        return self.op("Reshape", [repeated, sizes], [_every(dims[0]), *dims[1:]])


def _vectors(time: ir.Value) -> set[ir.Value]:
    """Values of one element that are the time step, and that something makes one for each row.

    Raises:
        PassError: Something else reads it first.
    """
    if time.shape is not None and time.shape.rank() == 1:
        vectors = {time}
    else:
        readers = {use.node for use in time.uses()}
        if any(node.op_type not in ("Reshape", "Unsqueeze") for node in readers):
            raise PassError("its time step is not repeated for every row before anything is computed with it")
        vectors = {node.outputs[0] for node in readers}
    if any(use.node.op_type != "Expand" for value in vectors for use in value.uses()):
        raise PassError("its time step is not repeated for every row before anything is computed with it")
    return vectors


def _rename_rows(nodes: Sequence[ir.Node], rows: ir.SymbolicDim) -> None:
    """Says in the shapes of the results of some nodes that there are rows for every step."""
    for value in (value for node in nodes for value in node.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([_every(rows) if dim == rows else dim for dim in value.shape])


def _every(rows: ir.SymbolicDim) -> str:
    return f"{STEPS}*{rows.value}"


def _by_step(after: _Nodes, value: ir.Value, rows: ir.SymbolicDim, sizes: Sequence[ir.Value]) -> ir.Value:
    """A result (steps * rows, channels) as (steps, rows, channels), under its name."""
    assert value.shape is not None
    channels = [size for size in value.shape[1:] if isinstance(size, int)]
    name, value.name = str(value.name), f"{value.name}/rows"
    whole = after.join([*sizes, after.numbers(*channels)], 2 + len(channels))
    result = after.op("Reshape", [value, whole], [STEPS, rows, *channels])
    result.name = name
    return result
