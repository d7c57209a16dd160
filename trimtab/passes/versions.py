"""Graphs that differ in weights alone, as `trimtab.passes.mix_kernels` makes them: what they can share."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence

import onnx_ir as ir

from trimtab.weights import same_tensor

LEAST_SHARED = 0.1
"""Of a graph's weights: a part that is the same in all versions and holds less costs more by its cut than it saves."""


def versions(models: Mapping[str, ir.Model]) -> list[list[str]]:
    """Names of graphs, those together that have the same nodes, names and attributes; in the order given."""
    found: dict[Hashable, list[str]] = {}
    for name, model in models.items():
        found.setdefault(_structure(model.graph), []).append(name)
    return list(found.values())


def differences(graphs: Sequence[ir.Graph]) -> frozenset[str]:
    """Names of the weights that are not the same in all versions. Those that lie in several places are read."""
    first, *others = graphs
    return frozenset(
        name
        for name, value in first.initializers.items()
        if any(not same_tensor(value.const_value, other.initializers[name].const_value) for other in others)
    )


def region_of_differences(
    graph: ir.Graph, differing: Container[str], sources: Callable[[ir.Node], Iterable[ir.Value]]
) -> set[ir.Node]:
    """The nodes of a graph that every version needs for itself.

    Those that read a weight which is another one elsewhere, and whatever lies on a way from one of them to another: so
    that a graph is cut in front of the differences and behind them, and not around each.

    Args:
        graph: One of the `versions`.
        differing: What `differences` found among them.
        sources: What a node reads.

    Returns:
        Nodes. What lies before or behind and holds too little to be worth a cut (`LEAST_SHARED`) is among them, so that
        they may be all; none are where no weight differs.
    """
    weights = _Weights(graph)
    own = {node for node in weights.readers if any(w.name in differing for w in weights.of(node))}
    if not own:
        return set()
    behind: set[ir.Value] = set()
    for node in weights.readers:
        if node in own or any(value in behind for value in sources(node)):
            behind.update(node.outputs)
    region: set[ir.Node] = set()
    before: set[ir.Value] = set()
    for node in reversed(weights.readers):
        leads = any(value in before for value in node.outputs)
        if node in own or (leads and any(value in behind for value in node.outputs)):
            region.add(node)
        if node in own or leads:
            before.update(sources(node))
    outside = [node for node in weights.readers if node not in region]
    after = {node for node in outside if any(value in behind for value in node.outputs)}
    least = LEAST_SHARED * weights.bytes(weights.readers)
    for side in (after, set(outside) - after):
        if weights.bytes(side) < least:
            region |= side
    # What has no weight above it, such as the sampler's own arithmetic, goes with those that read it.
    heavy: set[ir.Value] = set()
    for node in weights.readers:
        if any(_is_weight(w) for w in weights.of(node)) or any(value in heavy for value in sources(node)):
            heavy.update(node.outputs)
    reading: dict[ir.Value, set[ir.Node]] = {}
    for node in graph:
        for value in (*node.inputs, *sources(node)):
            if value is not None:
                reading.setdefault(value, set()).add(node)
    for node in reversed(graph):
        those = {reader for value in node.outputs for reader in reading.get(value, ())}
        bound = any(value.is_graph_output() or value in heavy for value in node.outputs)
        if those and those <= region and not bound:
            region.add(node)
    return region


class _Weights:
    """Which weights nodes read, themselves or as what is computed from constants alone (decoded, turned).

    Attributes:
        readers: The nodes that compute something else than that, in the graph's order.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._of: dict[ir.Value, frozenset[ir.Value]] = {
            value: frozenset({value}) for value in graph.initializers.values()
        }
        self.readers: list[ir.Node] = []
        for node in graph:
            if all(value is None or value in self._of for value in node.inputs):
                self._of.update(dict.fromkeys(node.outputs, self.of(node)))
            else:
                self.readers.append(node)

    def of(self, node: ir.Node) -> frozenset[ir.Value]:
        """The initializers that a node's numbers come from."""
        held = (self._of.get(value, frozenset()) for value in node.inputs if value is not None)
        return frozenset[ir.Value]().union(*held)

    def bytes(self, nodes: Iterable[ir.Node]) -> int:
        """Of all that they read."""
        read = frozenset[ir.Value]().union(*(self.of(node) for node in nodes))
        return sum(value.const_value.nbytes for value in read if value.const_value is not None)


def _is_weight(value: ir.Value) -> bool:
    """And no size, axis or single number."""
    tensor = value.const_value
    return tensor is not None and tensor.size > 1 and tensor.dtype.is_floating_point()


def _structure(graph: ir.Graph) -> Hashable:
    def names(values: Iterable[ir.Value | None]) -> tuple[str | None, ...]:
        return tuple(None if value is None else value.name for value in values)

    def attribute(value: ir.Attr) -> Hashable:
        content = value.value
        if isinstance(content, ir.TensorProtocol):
            return content.tobytes()
        return tuple(content) if isinstance(content, (list, tuple)) else str(content)

    nodes = tuple(
        (
            node.domain,
            node.op_type,
            names(node.inputs),
            names(node.outputs),
            tuple(sorted((name, attribute(a)) for name, a in node.attributes.items())),
        )
        for node in graph
    )
    held = tuple(
        (name, value.const_value.dtype, tuple(value.const_value.shape.numpy()))
        for name, value in sorted(graph.initializers.items())
        if value.const_value is not None
    )
    return names(graph.inputs), names(graph.outputs), nodes, held
