"""How much memory a graph's tensors hold at once: liveness over the order in which it runs.

A tensor lives from the node that makes it to the last one that reads it. What a backend never writes to memory, since
it computes it on the way to something else, is told to it by `Rules`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from trimtab.passes.propagation import Extents
from trimtab.targets.cost import VIEWS

_POINTWISE = """
Abs Add And Cast Ceil Clip Cos Div Elu Equal Erf Exp Expand Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish
LeakyRelu Less LessOrEqual Log Max Min Mish Mod Mul Neg Not Or Pow PRelu Reciprocal Relu Round Sigmoid Sign Sin Softplus
Sqrt Sub Tanh Where Xor
"""
POINTWISE = frozenset(_POINTWISE.split())
"""Operators whose every element follows from one element of each input."""

MOVES = frozenset(("Transpose", "Gather"))
"""Operators that only put elements elsewhere: a kernel that fuses them writes them there at once."""

PARTS = frozenset(("Split", "Slice"))
"""Operators that give a part: a kernel that fuses them reads it where the whole lies."""

SHAPES = frozenset(("Shape", "Size", "Constant", "ConstantOfShape", "Range"))
"""Operators whose results are sizes and constants, which backends fold."""


@dataclass(frozen=True)
class Rules:
    """What a backend does to memory.

    Attributes:
        fuses: Chains of `POINTWISE` and `MOVES` run inside the kernel that makes their first tensor, and `PARTS` are
            views.
        joins: What `Concat` joins is written where the whole lies, and never twice.
        in_place: A pointwise result takes the place of an input of its size that nobody reads later; where kernels
            are fused, of a larger one too.
        scores: How often attention holds its scores, rows x heads x queries x keys, while it runs.
        fused_heads: In 16 bits, heads of these sizes are attended to by one kernel, which holds no scores.
    """

    fuses: bool = False
    joins: bool = False
    in_place: bool = True
    scores: int = 1
    fused_heads: range = range(0)


@dataclass(frozen=True)
class Peak:
    """The moment at which most memory is held.

    Attributes:
        bytes: All that is held; inputs and outputs of the graph aside, which whoever calls it holds.
        node: What runs then; None where nothing is ever held.
        held: The node that made a tensor -> its bytes, largest first; the running node with its scratch.
    """

    bytes: int
    node: ir.Node | None
    held: Mapping[ir.Node, int]


def peak(model: ir.Model, extents: Extents, rules: Rules) -> Peak:
    """The most memory that a graph's tensors hold while it runs in its own order.

    Args:
        model: Not changed.
        extents: From `trimtab.passes.propagation.propagate`.
        rules: The backend's.
    """
    return _Walk(model, extents, rules).run()


@dataclass(frozen=True)
class Kernel:
    """Nodes that run as one.

    Attributes:
        nodes: In order.
        bytes: Of the tensors that it reads and writes, weights and what stays inside aside; with an attention's
            scores, written and read again, as often as the backend holds them.
    """

    nodes: tuple[ir.Node, ...]
    bytes: int


def kernels(model: ir.Model, extents: Extents, rules: Rules) -> list[Kernel]:
    """What runs together, in order.

    Args:
        model: Not changed.
        extents: From `trimtab.passes.propagation.propagate`.
        rules: The backend's.
    """
    return _Walk(model, extents, rules).kernels()


class _Walk:
    def __init__(self, model: ir.Model, extents: Extents, rules: Rules) -> None:
        self.nodes = [node for node in model.graph if node.op_type not in SHAPES]
        self.extents, self.rules = extents, rules
        self.outside = {*model.graph.inputs, *model.graph.initializers.values(), *model.graph.outputs}
        self.home: dict[ir.Value, ir.Value] = {}
        self.readers: dict[ir.Value, list[ir.Node]] = {}
        self.tail: dict[ir.Node, ir.Node] = {}
        self.divided: set[ir.Value] = set()
        for node in self.nodes:
            for value in dict.fromkeys(v for v in node.inputs if v is not None):
                if not self._is_view(node):
                    self.readers.setdefault(self._home(value), []).append(node)
            if self._is_view(node) and node.inputs[0] is not None:
                self.home |= dict.fromkeys(node.outputs, self._home(node.inputs[0]))
                if node.op_type in PARTS:
                    self.divided.add(self._home(node.inputs[0]))
        for value in model.graph.outputs:  # a view that leaves the graph takes its tensor with it
            self.outside.add(self._home(value))
        self._group()

    def run(self) -> Peak:
        when = {node: index for index, node in enumerate(self.nodes)}
        births: dict[int, list[tuple[ir.Value, ir.Node]]] = {}
        deaths: dict[int, list[ir.Value]] = {}
        for node in self.nodes:
            if self._is_view(node):
                continue
            for value in node.outputs:
                if value in self.outside or value not in self.extents or self._is_size(value):
                    continue
                readers = self.readers.get(value, [])
                if readers and all(self.tail[reader] is self.tail[node] for reader in readers):
                    continue  # inside a kernel
                born = when[self.tail[node]]
                last = max((when[self.tail[reader]] for reader in readers), default=born)
                births.setdefault(born, []).append((value, node))
                deaths.setdefault(max(last, born), []).append(value)
        return self._sweep(births, deaths)

    def kernels(self) -> list[Kernel]:
        groups: dict[ir.Node, list[ir.Node]] = {}
        for node in self.nodes:
            if not self._is_view(node):
                groups.setdefault(self.tail[node], []).append(node)
        return [Kernel(tuple(nodes), self._traffic(nodes)) for nodes in groups.values()]

    def _traffic(self, nodes: list[ir.Node]) -> int:
        inside = {value for node in nodes for value in node.outputs}
        read = {
            self._home(v) for node in nodes for v in node.inputs if v is not None and not v.is_initializer()
        }
        members = set(nodes)
        written = {
            value
            for value in inside & self.extents.keys()
            if value in self.outside or any(r not in members for r in self.readers.get(value, ()))
        }
        scores = sum(self._extra(node) for node in nodes)
        return sum(self.extents[v].bytes for v in (read - inside) | written if v in self.extents) + 2 * scores

    def _sweep(
        self, births: Mapping[int, list[tuple[ir.Value, ir.Node]]], deaths: Mapping[int, list[ir.Value]]
    ) -> Peak:
        live: dict[ir.Value, tuple[ir.Node, int]] = {}
        total, best = 0, Peak(0, None, {})
        scratch: dict[ir.Node, tuple[ir.Node, int]] = {}
        for node in self.nodes:
            if extra := self._extra(node):  # a kernel has at most one such node
                scratch[self.tail[node]] = (node, extra)
        for index, node in enumerate(self.nodes):
            if self.tail[node] is not node or self._is_view(node):
                continue
            dying = deaths.get(index, [])
            if self.rules.in_place and node.op_type in POINTWISE:
                own = {self._home(value) for value in node.inputs if value is not None}
                places = [value for value in dying if value in own]  # not a product's, which it still reads
                total -= self._give_place(births.get(index, []), places, live)
            if node.op_type == "Concat" and self.rules.joins:
                for value in dying:
                    total -= live.pop(value, (node, 0))[1]
            for value, maker in births.get(index, []):
                live[value] = (maker, self.extents[value].bytes)
                total += live[value][1]
            heavy, extra = scratch.get(node, (node, 0))
            if total + extra > best.bytes:
                held: dict[ir.Node, int] = {heavy: extra} if extra else {}
                for maker, size in live.values():
                    held[maker] = held.get(maker, 0) + size
                best = Peak(
                    total + extra, node, dict(sorted(held.items(), key=lambda entry: entry[1], reverse=True))
                )
            for value in dying:
                total -= live.pop(value, (node, 0))[1]
        return best

    def _give_place(
        self,
        born: list[tuple[ir.Value, ir.Node]],
        dying: Iterable[ir.Value],
        live: dict[ir.Value, tuple[ir.Node, int]],
    ) -> int:
        """Takes a dying tensor of the newborn's size out of ``live``, and gives its bytes."""
        for value, _ in born:
            for old in dying:
                if old not in live:
                    continue
                size, wanted = live[old][1], self.extents[value].bytes
                if size == wanted or (self.rules.fuses and size > wanted):
                    return live.pop(old)[1]
        return 0

    def _extra(self, node: ir.Node) -> int:
        """What a node holds while it runs, beside its inputs and outputs: an attention's scores, or nothing."""
        if node.op_type != "Attention":
            return 0
        query, key = (self.extents[v] for v in node.inputs[:2] if v is not None)
        heads = query.shape[1] if len(query.shape) == 4 else node.attributes.get_int("q_num_heads", 1)
        size = query.shape[-1] if len(query.shape) == 4 else query.shape[-1] // heads
        if query.dtype.bitwidth == 16 and size in self.rules.fused_heads:
            return 0
        scores = query.shape[0] * heads * query.shape[-2] * key.shape[-2]
        return self.rules.scores * scores * query.dtype.bitwidth // 8

    def _group(self) -> None:
        """Node -> the last node of the kernel that it runs in.

        Against the order: a tensor that only one kernel reads, pointwise, is made in that kernel as well. A kernel
        holds at most one node that is neither pointwise nor a move.
        """
        light = POINTWISE | MOVES
        heavy: set[ir.Node] = set()
        for node in reversed(self.nodes):
            self.tail[node] = node
            # The parts of a tensor are far from each other: they meet only once it is whole.
            kept = (self.outside | self.divided) & set(node.outputs)
            readers = [] if kept else self._readers(node)
            if not self.rules.fuses or self._is_view(node) or not readers:
                continue
            kernels = {self.tail[reader] for reader in readers}
            if len(kernels) == 1 and all(reader.op_type in light for reader in readers):
                kernel = kernels.pop()
                if node.op_type not in light:
                    if kernel in heavy or node.op_type == "Concat":
                        continue
                    heavy.add(kernel)
                self.tail[node] = kernel

    def _readers(self, node: ir.Node) -> list[ir.Node]:
        return [reader for value in node.outputs for reader in self.readers.get(value, ())]

    def _home(self, value: ir.Value) -> ir.Value:
        return self.home.get(value, value)

    def _is_view(self, node: ir.Node) -> bool:
        return node.domain == "" and (node.op_type in VIEWS or (self.rules.fuses and node.op_type in PARTS))

    def _is_size(self, value: ir.Value) -> bool:
        """Arithmetic on sizes, which is folded."""
        extent = self.extents[value]
        return extent.dtype is ir.DataType.INT64 and len(extent.shape) <= 1
