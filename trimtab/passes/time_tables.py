"""What depends on the time step alone, as a table with a row for each time step that the schedules have.

A U-Net embeds the time step and multiplies it into every residual block: 3% of Stable Diffusion 1.5's weights, read
in every step for one number that is known beforehand. A step says which row it reads:

    Call("denoiser", {"timestep": "timestep", ...})      with {"timestep": (801.0,)}
    Call("denoiser", {"time_row": "time_row", ...})      with {"time_row": (4.0,)}
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trimtab.errors import PassError
from trimtab.passes.calls import calls_in_steps, denoisers, map_steps
from trimtab.passes.constants import add_constant
from trimtab.passes.known_products import last_products
from trimtab.passes.partition import reach
from trimtab.passes.reference import Array, Reference
from trimtab.passes.segments import local_nodes
from trimtab.program import Call, PassEntry, Program, Segment, Step
from trimtab.weights import weight_bytes

logger = logging.getLogger(__name__)

ROW = "time_row"
"""The input that says which row a step reads, and the constant of the step that it reads."""

TABULATE = "TabulateTimes"
"""What the pass is called in reports."""

Key = tuple[tuple[float, ...], ...]
"""The numbers of a step that something depends on."""


def tabulate_times(program: Program) -> Program:
    """Puts the results of products that depend on constants of the step alone into tables.

    Exact: a row is what the graph itself computes from the step's constants, by onnx's reference, whose sums may run in
    another order (1e-6).

    A denoiser is left as it is where nothing depends on such constants alone, or its tables would be larger than the
    weights that they replace.

    Args:
        program: Its graphs stay as they are.

    Returns:
        A program whose tabulated denoisers have an input `ROW`, and no weights that only the time step needs.
    """
    names = denoisers(program)
    found = {name: timed for name in names if (timed := _find(program, name)) is not None}
    # One numbering for all denoisers with the same inputs: versions of a graph stay versions.
    rows: dict[tuple[str, ...], dict[Key, int]] = {timed.inputs: {} for timed in found.values()}
    for step, call in calls_in_steps(program):
        if call.segment in found:
            inputs = found[call.segment].inputs
            rows[inputs].setdefault(_key(step, call, inputs), len(rows[inputs]))
    entries: list[PassEntry] = []
    segments = dict(program.segments)
    for name in names:
        made = 0
        try:
            if name in found:
                model = _tabulated(program.segments[name].model, found[name], list(rows[found[name].inputs]))
                segments[name], made = Segment(name, model), len(found[name].values)
        except PassError as reason:
            logger.info("%s: what the time step decides is computed in every step: %s", name, reason)
            del found[name]
        entries.append(PassEntry(TABULATE, name, made, int(not made)))
    left = {name: {str(value.name) for value in segments[name].model.graph.inputs} for name in found}

    def changed(step: Step) -> Step:
        calls, constants = [], dict(step.constants)
        lost: set[str] = set()
        for call in step.calls:
            if call.segment in found:
                inputs = found[call.segment].inputs
                gone = set(inputs) - left[call.segment]
                lost |= {call.inputs[name] for name in gone}
                row = (float(rows[inputs][_key(step, call, inputs)]),)
                # Another where two calls of a step read different rows.
                names = (f"{ROW}_{index}" if index else ROW for index in itertools.count())
                tensor = next(name for name in names if constants.setdefault(name, row) == row)
                kept = {v: t for v, t in call.inputs.items() if v not in gone}
                call = dataclasses.replace(call, inputs={**kept, ROW: tensor})
            calls.append(call)
        lost -= {tensor for call in calls for tensor in call.inputs.values()}
        constants = {tensor: values for tensor, values in constants.items() if tensor not in lost}
        return dataclasses.replace(step, calls=tuple(calls), constants=constants)

    return dataclasses.replace(
        program,
        segments=segments,
        tasks=map_steps(program.tasks, changed),
        passes=(*program.passes, *entries),
    )


@dataclass(frozen=True)
class _Timed:
    """What depends on constants of the step alone, in one denoiser.

    Attributes:
        inputs: Those of the graph that it depends on.
        values: Names of products that others read.
        named: All values that calls name.
    """

    inputs: tuple[str, ...]
    values: tuple[str, ...]
    named: frozenset[str]


def _find(program: Program, name: str) -> _Timed | None:
    graph = program.segments[name].model.graph
    constant = {str(v.name) for v in graph.inputs if v.shape is not None and v.shape.is_static()}
    named: set[str] = set()
    for step, call in calls_in_steps(program):
        if call.segment == name:
            constant = {value for value in constant if call.inputs.get(value) in step.constants}
            named |= {*call.inputs, *call.outputs}
    local = local_nodes(graph)
    last = last_products(graph, constant, set(), local)[0]
    values = [node.outputs[0] for node in last if node.outputs[0].name not in named]
    makers = reach(values, {}, local)
    if not makers or any(value.dtype is not ir.DataType.FLOAT for value in values):
        return None
    read = {value for node in makers for value in node.inputs}
    inputs = tuple(str(v.name) for v in graph.inputs if v in read and v.name in constant)
    return _Timed(inputs, tuple(str(value.name) for value in values), frozenset(named))


def _key(step: Step, call: Call, inputs: Sequence[str]) -> Key:
    return tuple(step.constants[call.inputs[name]] for name in inputs)


def _tabulated(model: ir.Model, timed: _Timed, keys: Sequence[Key]) -> ir.Model:
    """A copy that looks up what it computed.

    Raises:
        PassError: A result is not the same for every row, the graph does not repeat its time step for the rows, or
            the tables are larger than the weights.
    """
    copy = model.clone()
    graph = copy.graph
    values = {str(value.name): value for node in graph for value in node.outputs}
    products = [values[name] for name in timed.values]
    tables = _tables(graph, products, timed.inputs, keys)
    row = ir.Value(name=ROW, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    counts = [_row_count(graph, product) for product in products]
    makers = reach(products, {}, set())
    graph.inputs.append(row)
    one = add_constant(graph, f"{ROW}/shape", np.array([1], np.int64))
    known: dict[bytes, ir.Value] = {}
    for product, count, table in zip(products, counts, tables, strict=True):
        if table.tobytes() not in known:
            known[table.tobytes()] = add_constant(graph, f"{product.name}/table", table)
        _look_up(graph, product, known[table.tobytes()], row, one, count)
    _drop_unread(graph, makers, timed.named)
    for value in [value for value in graph.inputs if value.name in timed.inputs and not value.uses()]:
        graph.inputs.remove(value)
    if weight_bytes(copy) >= weight_bytes(model):
        raise PassError(f"{len(keys)} rows are larger than the weights that compute them")
    return copy


def _tables(
    graph: ir.Graph, products: Sequence[ir.Value], inputs: Sequence[str], keys: Sequence[Key]
) -> list[Array]:
    """For every product: (keys, channels), or more axes."""
    given = [dict(zip(inputs, key, strict=True)) for key in keys]

    def rows(reference: Reference, numbers: Mapping[str, tuple[float, ...]]) -> list[Array]:
        found = reference.values(numbers)
        reference.forget()  # what leads to Chroma's modulations is 350 MB for each time step
        return [_row(product, result) for product, result in zip(products, found, strict=True)]

    reference = Reference(graph, products, open_size=1)
    tables = [np.stack(every) for every in zip(*(rows(reference, numbers) for numbers in given), strict=True)]
    # An open size may be another than that of the rows, and count for something.
    other = Reference(graph, products, open_size=3)
    for index in (0, len(keys) - 1):
        for product, table, row in zip(products, tables, rows(other, given[index]), strict=True):
            _row(product, np.stack([table[index], row]))
    return tables


def _row(product: ir.Value, found: Array) -> Array:
    """The row of a result, (channels,) or with more axes, whose rows are all the same.

    Raises:
        PassError: They are not.
    """
    row: Array = found[0]
    if np.abs(np.subtract(found, row)).max() > 1e-4 * np.abs(row).max():
        raise PassError(f"{product.name} depends on a size too")
    return row


def _row_count(graph: ir.Graph, product: ir.Value) -> ir.Value:
    """What says how often the time step is repeated for a product: (1,) int64."""
    makers = reach([product], {}, set())
    for node in graph:  # in its order: of several, the same one every time
        # Some multiply the time step by as many ones as there are rows.
        repeats = node.op_type in ("Expand", "ConstantOfShape")
        if repeats and node in makers and node.outputs[0].shape == _rows(product):
            count = node.inputs[-1]
            assert count is not None
            return count
    raise PassError("it does not repeat its time step for every row")


def _look_up(
    graph: ir.Graph, product: ir.Value, table: ir.Value, row: ir.Value, one: ir.Value, count: ir.Value
) -> None:
    """Puts a row of a table in the place of a product."""
    maker = product.producer()
    assert maker is not None
    tape = ir.tape.Tape()
    single = tape.op("Reshape", [row, one])
    rows = tape.op("Expand", [single, count])
    result = tape.op("Gather", [table, rows], {"axis": 0})
    single.type, single.shape = row.type, ir.Shape([1])
    rows.type, rows.shape = row.type, _rows(product)
    result.type, result.shape = product.type, product.shape
    name, product.name = product.name, f"{product.name}/computed"
    single.name, rows.name, result.name = f"{name}/row", f"{name}/rows", name
    for node in tape.nodes:
        node.metadata_props.update(maker.metadata_props)
    graph.insert_before(maker, tape.nodes)
    ir.convenience.replace_all_uses_with(product, result)


def _drop_unread(graph: ir.Graph, nodes: Set[ir.Node], named: Set[str]) -> None:
    """Removes those of some nodes that nothing reads any more, nor a call by name, and what only they read."""
    for node in reversed(list(graph)):
        read = any(value.uses() or value.is_graph_output() or value.name in named for value in node.outputs)
        if node in nodes and not read:
            weights = {value for value in node.inputs if value is not None and value.is_initializer()}
            graph.remove(node, safe=True)
            for value in weights:
                if not value.uses():
                    del graph.initializers[str(value.name)]


def _rows(product: ir.Value) -> ir.Shape:
    """The shape of a value with one number for every row of a product."""
    assert product.shape is not None
    return ir.Shape([product.shape[0]])
