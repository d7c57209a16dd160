"""Products of weights with what is known before the steps: what can be taken out of them."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass

import onnx_ir as ir

from trimtab.passes.calls import step_calls
from trimtab.passes.operators import has_graph
from trimtab.passes.partition import reach
from trimtab.passes.segments import build_segment, local_nodes
from trimtab.program import SLICE, STATE, Program
from trimtab.weights import parameter_count

LEAST_SHARE = 0.05
"""Of a denoiser's weights: less is not worth a segment and its tensors."""


@dataclass(frozen=True)
class KnownProducts:
    """Those of one denoiser that no call names yet.

    Attributes:
        model: The denoiser's graph.
        local: Sizes and constants in it.
        times: Inputs that are known beforehand and change with the step.
        timed: Products that the time decides, alone or with a condition: (rows, ...) each, of which rows are open.
        fixed: Products that conditions decide alone.
    """

    model: ir.Model
    local: set[ir.Node]
    times: Set[str]
    timed: Sequence[ir.Node]
    fixed: Sequence[ir.Node]

    @classmethod
    def of(cls, program: Program, name: str) -> KnownProducts:
        """Those of the denoiser of this name."""
        model = program.segments[name].model
        times, conditions = known_inputs(program, name)
        local = local_nodes(model.graph)
        named = {value for call in step_calls(program) if call.segment == name for value in call.inputs}
        timed, fixed = (
            [node for node in found if node.outputs[0].name not in named]
            for found in last_products(model.graph, times, conditions, local)
        )
        return cls(model, local, times, timed, fixed)

    def share(self, products: Sequence[ir.Node]) -> float:
        """How much of the denoiser's weights some of them read."""
        return sum(map(_factor, products)) / max(1, parameter_count(self.model))

    def segment(self, name: str, products: Sequence[ir.Node]) -> ir.Model:
        """A graph that computes some of them.

        Raises:
            PassError: As `build_segment` does.
        """
        values = [node.outputs[0] for node in products]
        needed = reach(values, {}, self.local)
        nodes = [node for node in self.model.graph if node in needed]
        return build_segment(name, self.model, nodes, values, self.local)


def known_inputs(program: Program, name: str) -> tuple[set[str], set[str]]:
    """Inputs of a denoiser that are known before the first step: those that change with it, and those that do not.

    Known is what is a constant of the step or made before the steps, whole or as a row of a table; the sampler's state
    and noise that is drawn are not, nor is what two calls of a step, or of a schedule, give differently.
    """
    kinds: dict[str, set[str]] = {}
    for task in program.tasks.values():
        for schedule in task.schedules.values():
            first = (*task.prologue, *schedule.prologue)
            made = {tensor for call in first for tensor in call.outputs.values()}
            made |= {spec.name for spec in task.inputs if spec.source.get("kind") != "noise"}
            made = {tensor for tensor in made if not _is_state(tensor)}
            written = {
                tensor for step in schedule.steps for call in step.calls for tensor in call.outputs.values()
            }
            fixed: dict[str, str] = {}
            for step in schedule.steps:
                timed: dict[str, str] = {}
                for call in (call for call in step.calls if call.segment == name):
                    for value, tensor in call.inputs.items():
                        row = SLICE.match(tensor)
                        if tensor in step.constants or (row and row[1] in made):
                            kind = "timed" if timed.setdefault(value, tensor) == tensor else "neither"
                        elif tensor in made - written:
                            kind = "fixed" if fixed.setdefault(value, tensor) == tensor else "neither"
                        else:
                            kind = "neither"
                        kinds.setdefault(value, set()).add(kind)
    timed_ones = {value for value, found in kinds.items() if found == {"timed"}}
    return timed_ones, {value for value, found in kinds.items() if found == {"fixed"}}


def _is_state(tensor: str) -> bool:
    row = SLICE.match(tensor)
    return tensor == STATE or (row is not None and row[1] == STATE)


def _factor(product: ir.Node) -> int:
    """Numbers of the weight that a product reads."""
    factor = product.inputs[1]
    assert factor is not None
    dims = factor.shape.numpy() if factor.shape is not None and factor.shape.is_static() else ()
    return math.prod(dims) if dims else 0


def last_products(
    graph: ir.Graph, timed: Set[str], fixed: Set[str], local: Set[ir.Node]
) -> tuple[list[ir.Node], list[ir.Node]]:
    """The last such products: between their results and whatever is not known before the steps there is no other.

    Args:
        graph: Where they are looked for.
        timed: Its inputs that are known beforehand and change with the step.
        fixed: Its inputs that are known beforehand and do not.
        local: Sizes and constants, from `trimtab.passes.segments.local_nodes`.

    Returns:
        MatMul and Gemm nodes in running order: those that the time decides, whose result is (rows, ...), and
        those that ``fixed`` decides alone, of any shape.
    """
    known = {value for value in graph.inputs if value.name in timed | fixed}
    times = {value for value in graph.inputs if value.name in timed}
    products: set[ir.Node] = set()
    inner: set[ir.Node] = set()
    for node in graph:
        read = [value for value in node.inputs if value is not None and not _is_constant(value, local)]
        if node in local or not read or not known.issuperset(read) or has_graph(node):
            continue
        inner.add(node)
        known.update(node.outputs)
        if times.intersection(read):
            times.update(node.outputs)
        product = node.op_type in ("MatMul", "Gemm") and read == [node.inputs[0]]
        if product and (node.outputs[0] not in times or _is_rows(node.outputs[0])):
            products.add(node)
    stack = [
        value
        for node in inner
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in inner for use in value.uses())
    ]
    last: set[ir.Node] = set()
    seen: set[ir.Value] = set()
    while stack:
        value = stack.pop()
        maker = value.producer()
        if value in seen or maker is None:
            continue
        seen.add(value)
        if maker in products:
            last.add(maker)
        else:
            stack.extend(read for read in maker.inputs if read in known)
    found = [node for node in graph if node in last]
    return [n for n in found if n.outputs[0] in times], [n for n in found if n.outputs[0] not in times]


def _is_constant(value: ir.Value, local: Set[ir.Node]) -> bool:
    """Whether a value is a weight or comes of sizes and constants alone."""
    return value.is_initializer() or value.producer() in local


def _is_rows(value: ir.Value) -> bool:
    """Whether a value is (rows, channels), or has more axes, of which only the rows are open."""
    if value.shape is None or value.shape.rank() < 2:
        return False
    rows, *channels = value.shape
    return not isinstance(rows, int) and all(isinstance(size, int) for size in channels)
