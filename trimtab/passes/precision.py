"""FP16 and BF16 as a rewrite of the graph: strongly typed engines compute in the types that are written there."""

from __future__ import annotations

from collections.abc import Mapping, Set

import onnx_ir as ir
import onnx_ir.passes.common as common

from trimtab.errors import PassError
from trimtab.passes.base import Pass, PassResult, Refusal
from trimtab.passes.narrowing import FILL, LARGEST, narrowed, why_wide
from trimtab.passes.operators import FLOAT, HEAVY, MOVES, TYPELESS, Ports, ports
from trimtab.passes.sampler import SCOPE as SAMPLER
from trimtab.passes.scopes import SCOPES, place, scopes
from trimtab.program import PRECISION
from trimtab.weights import INLINE_BYTES

DTYPES: Mapping[str, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}

MARGIN = 16.0
"""What a measured maximum is multiplied by before it is held against the largest number of the type: the power of two
above 8.7, which is the most that a maximum grew in pictures beyond those measured (docs/precision.md)."""

SCORES = "/scores"
"""Behind the name of an attention's result: a range of its scores, which the graph has no tensor of."""

_POSITIONS = frozenset(("Sin", "Cos"))
"""Angles of time steps and positions reach thousands, where FP16 steps by whole numbers."""

_SUMS = frozenset(
    [
        "ReduceMean",
        "ReduceSum",
        "ReduceSumSquare",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSumExp",
        "ReduceProd",
        "CumSum",
        "GlobalAveragePool",
        "InstanceNormalization",
        "MeanVarianceNormalization",
        "LpNormalization",
    ]
)
"""Sums over many elements without the standard's promise of FP32 statistics, which LayerNormalization,
GroupNormalization and RMSNormalization give by their stash_type."""


class ConvertPrecision(Pass):
    """Turns a float32 graph into one that computes in FP16 or BF16.

    The interface stays float32, and so do: the fused sampler (its coefficients reach 157, and its state lives from
    step to step); what leads to Sin and Cos; sums without FP32 statistics of their own, with the small arithmetic on
    their results; and every node that reads or makes a tensor which the ranges say may overflow, or a weight that
    the type cannot hold. The last two are named in the result, by module path, or by node in foreign graphs.

    A tensor is cast once for all its readers. Nodes that only move or reshape data between two float32 places stay
    there. A weight is stored in one type: where readers of both types share it, the float32 ones cast it.

    Not exact: every result is rounded to 11 (FP16) or 8 (BF16) bits.

    Args:
        precision: "fp16" or "bf16".
        ranges: Tensor -> the largest magnitude that was measured, as `trimtab.calibration.ranges` gives it; None
            where none was measured, and then FP16 is refused.
    """

    def __init__(self, precision: str, ranges: Mapping[str, float] | None) -> None:
        if precision not in DTYPES:
            raise PassError(f"the precision {precision!r} is not one of {', '.join(DTYPES)}")
        self.precision = precision
        self.ranges = ranges

    def call(self, model: ir.Model) -> PassResult:
        reason = self._reason_against(model)
        if reason is not None:
            return PassResult(model, False, refused=(Refusal(model.graph.name or "graph", reason),))
        if any(node.op_type == "Constant" for node in model.graph):
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        choice = _Choice(model, self)
        _Rewrite(model, DTYPES[self.precision], choice).run()
        model.metadata_props[PRECISION] = self.precision
        return PassResult(model, True, tuple(map(place, choice.low)), choice.refusals())

    def _reason_against(self, model: ir.Model) -> str | None:
        values = [v for node in model.graph for v in node.outputs] + list(model.graph.inputs)
        weights = [
            v.const_value.dtype for v in model.graph.initializers.values() if v.const_value is not None
        ]
        if {*weights, *(v.dtype for v in values)} & set(DTYPES.values()):
            return "the graph computes in a half precision already"
        if not any(node.op_type in HEAVY for node in model.graph):
            return "the graph has no product of matrices: there is nothing to gain"
        if self.precision == "fp16" and self.ranges is None:
            return "its ranges were not measured, and FP16 may overflow"
        if untyped := [v.name for v in values if v.dtype is None and v.name]:
            return f"the type of {untyped[0]} is not known"
        return None


def convert(model: ir.Model, precision: str, ranges: Mapping[str, float] | None = None) -> PassResult:
    """A copy of a graph in another precision, and what was said of it; weights are read when they are written.

    Args:
        model: Stays as it was.
        precision: "fp32" (a copy alone), "fp16" or "bf16".
        ranges: As `ConvertPrecision` takes them.
    """
    copy = model.clone()
    return PassResult(copy, False) if precision == "fp32" else ConvertPrecision(precision, ranges)(copy)


class _Choice:
    """Which nodes compute in the lower type.

    Attributes:
        low: Those nodes, in the graph's order.
        ports: Node -> what its operator lets be converted.
    """

    def __init__(self, model: ir.Model, options: ConvertPrecision) -> None:
        self.graph = model.graph
        self.options = options
        self._ranges: dict[ir.Value, float] = {}
        self._exact = _of_masks(model.graph)
        self._kept: dict[ir.Node, str] = {}  # and why: an empty text where that is by design
        self.ports: dict[ir.Node, Ports] = {}
        for node in self.graph:
            found = ports(node, model, DTYPES[options.precision])
            if found is not None:
                self.ports[node] = found
        for node in self.ports:
            if SAMPLER in scopes(node) or node.op_type in _SUMS:
                self._kept[node] = ""
        self._keep_positions()
        self._keep_statistics()
        self._keep_wide()
        self._keep_between()
        self.low = tuple(node for node in self.ports if node not in self._kept)

    def refusals(self) -> tuple[Refusal, ...]:
        """The places kept against the rule, each once, in the graph's order."""
        reasons: dict[str, str] = {}
        for node in self.graph:
            if reason := self._kept.get(node):
                reasons.setdefault(place(node), reason)
        return tuple(Refusal(where, reason) for where, reason in reasons.items())

    def _keep_positions(self) -> None:
        """Sin and Cos, and what leads to them, up to the network's own products and the graph's inputs."""
        stack = [node for node in self.graph if node.op_type in _POSITIONS]
        while stack:
            node = stack.pop()
            if node in self._kept or node not in self.ports:
                continue
            self._kept[node] = ""
            stack.extend(n for n in _producers(node) if n.op_type not in HEAVY)

    def _keep_statistics(self) -> None:
        """The square before a sum, and the arithmetic on sums: adding an epsilon, a root, a division by a count."""
        statistics = {node for node in self._kept if node.op_type in _SUMS}
        for node in self.ports:
            if node in self._kept or node.op_type in HEAVY:
                continue
            readers = [user for user, _ in node.outputs[0].uses()]
            if node.op_type in ("Pow", "Mul") and readers and all(r.op_type in _SUMS for r in readers):
                self._kept[node] = ""
                continue
            makers = [
                v.producer() for v in node.inputs if v is not None and v.dtype == FLOAT and not _is_one(v)
            ]
            if makers and all(maker in statistics for maker in makers):
                self._kept[node] = ""
                statistics.add(node)

    def _keep_wide(self) -> None:
        """Nodes around a tensor or a weight that the type cannot hold."""
        dtype = DTYPES[self.options.precision]
        limit = LARGEST[dtype]
        for node in self.ports:
            for value in (*node.inputs, *node.outputs):
                if value is None or value.dtype != FLOAT or node in self._kept:
                    continue
                if value.is_initializer():
                    reason = why_wide(value, node, dtype)
                    if reason is not None:
                        self._kept[node] = reason
                elif limit < self._range(value) * (1 if value in self._exact else MARGIN):
                    self._kept[node] = self._too_large(value.name, self._range(value))
            scores = (self.options.ranges or {}).get(f"{node.outputs[0].name}{SCORES}", 0.0)
            if node not in self._kept and limit < scores * MARGIN:
                self._kept[node] = self._too_large("a score", scores)

    def _too_large(self, what: str | None, size: float) -> str:
        limit = LARGEST[DTYPES[self.options.precision]]
        return (
            f"{what} reaches {size:.3g}, {MARGIN:g} times that is too much for "
            f"{self.options.precision}, which ends at {limit:.5g}"
        )

    def _range(self, value: ir.Value) -> float:
        """The largest magnitude of a tensor: measured, or that of what it was moved from."""
        if value not in self._ranges:
            self._ranges[value] = 0.0
            node = value.producer()
            found = (self.options.ranges or {}).get(value.name or "")
            if found is None and node is not None and node.op_type in MOVES:
                moved = (
                    v for v in node.inputs if v is not None and v.dtype == FLOAT and not v.is_initializer()
                )
                found = max(map(self._range, moved), default=0.0)
            self._ranges[value] = 0.0 if found is None or found >= FILL else found
        return self._ranges[value]

    def _keep_between(self) -> None:
        """Groups of light nodes that only float32 feeds and reads: casting there and back gains nothing."""
        seen: set[ir.Node] = set()
        for first in self.ports:
            if first in seen or not self._is_light(first):
                continue
            group, stack, border = {first}, [first], True
            while stack:
                node = stack.pop()
                near = [*_producers(node), *(user for v in node.outputs for user, _ in v.uses())]
                for other in near:
                    if self._is_light(other) and other not in group:
                        group.add(other)
                        stack.append(other)
                border = border and all(
                    other in group or other in self._kept or other not in self.ports for other in near
                )
            seen |= group
            if border:
                self._kept.update((node, "") for node in group)

    def _is_light(self, node: ir.Node) -> bool:
        return node in self.ports and node not in self._kept and node.op_type not in HEAVY


def _of_masks(graph: ir.Graph) -> set[ir.Value]:
    """What is computed of masks and constants alone: those reach in every picture what they reach in one.

    Masks are inputs whose names end so, as diffusers' do. PixArt makes -10000 of theirs, which no margin can be held
    against, and all of its attention to the text would stay in float32.
    """
    found = {value for value in graph.inputs if (value.name or "").endswith("mask")}
    for node in graph:
        read = [
            v for v in node.inputs if v is not None and v.const_value is None and v.dtype != ir.DataType.INT64
        ]
        if read and node.op_type not in HEAVY and found.issuperset(read):
            found.update(node.outputs)
    return found


def _is_one(value: ir.Value) -> bool:
    """A constant of one element."""
    return value.const_value is not None and value.const_value.size == 1


def _producers(node: ir.Node) -> list[ir.Node]:
    makers = (v.producer() for v in node.inputs if v is not None and v.dtype == FLOAT)
    return [maker for maker in makers if maker is not None]


class _Rewrite:
    """One application of `ConvertPrecision`: types and weights changed, casts put in."""

    def __init__(self, model: ir.Model, dtype: ir.DataType, choice: _Choice) -> None:
        self.graph, self.dtype, self.choice = model.graph, dtype, choice
        self.suffix = next(name for name, kind in DTYPES.items() if kind == dtype)

    def run(self) -> None:
        lower: dict[ir.Value, set[tuple[ir.Node, int]]] = {}
        made: list[ir.Value] = []
        for node in self.choice.low:
            ports = self.choice.ports[node]
            for index in ports.inputs:
                value = node.inputs[index]
                assert value is not None
                lower.setdefault(value, set()).add((node, index))
            made += [node.outputs[index] for index in ports.outputs]
            if ports.attribute is not None and ports.attribute in node.attributes:
                node.attributes[ports.attribute] = ir.AttrInt64(ports.attribute, int(self.dtype))
        born = set(made)
        for value, places in lower.items():
            if value.is_initializer() and not value.is_graph_input():
                self._weight(value, places)
            elif value not in born:
                self._read_by(self._cast(value, self.dtype, self.suffix), places)
        for value in made:
            low = lower.get(value, set())
            others = {use for use in value.uses() if use not in low and use.node.op_type not in TYPELESS}
            value.type = ir.TensorType(self.dtype)
            if value.is_graph_output():
                self._give_as_float(value, others)
            elif others:
                self._read_by(self._cast(value, FLOAT, "fp32"), others)

    def _weight(self, value: ir.Value, places: Set[tuple[ir.Node, int]]) -> None:
        tensor = value.const_value
        assert tensor is not None and value.name is not None
        others = set(value.uses()) - places
        if (others or value.is_graph_output()) and (tensor.nbytes < INLINE_BYTES or value.is_graph_output()):
            name = f"{value.name}.{self.suffix}"
            own = ir.Value(name=name, shape=value.shape, type=ir.TensorType(self.dtype))
            own.const_value = narrowed(tensor, self.dtype, name)
            self.graph.register_initializer(own)
            self._read_by(own, places)
            return
        value.const_value = narrowed(tensor, self.dtype, value.name)
        value.type = ir.TensorType(self.dtype)
        if others:
            self._read_by(self._cast(value, FLOAT, "fp32"), others)

    def _give_as_float(self, value: ir.Value, others: Set[tuple[ir.Node, int]]) -> None:
        """A graph's output keeps its name and type; what is inside gets another name."""
        name, value.name = value.name, f"{value.name}.{self.suffix}"
        given = self._cast(value, FLOAT, "fp32")
        given.name = name
        for index, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[index] = given
        self._read_by(given, others)

    def _cast(self, value: ir.Value, dtype: ir.DataType, suffix: str) -> ir.Value:
        """The value in another type, made where the value is."""
        name = f"{value.name}.{suffix}"
        node = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
        output = node.outputs[0]
        output.name, output.type, output.shape = name, ir.TensorType(dtype), value.shape
        maker = value.producer()
        if maker is not None:
            self.graph.insert_after(maker, node)
        else:
            self.graph.insert_before(self.graph[0], node)
        near = (
            maker if maker is not None else next((user for user, _ in value.uses() if user is not node), None)
        )
        if near is not None and (note := near.metadata_props.get(SCOPES)):
            node.metadata_props[SCOPES] = note
        return output

    def _read_by(self, value: ir.Value, places: Set[tuple[ir.Node, int]]) -> None:
        for node, index in places:
            node.replace_input_with(index, value)
