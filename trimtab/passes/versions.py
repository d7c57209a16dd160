"""Graphs that differ in weights alone, as `trimtab.passes.mix_kernels` makes them: what they can share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

LEAST_SHARED = 0.1
"""Of a graph's weights: a part that is the same in all versions and holds less costs more by its cut than it saves."""


def versions(models: Mapping[str, ir.Model]) -> list[list[str]]:
    """Names of graphs, those together that have the same nodes, names and attributes; in the order given."""
    found: dict[Hashable, list[str]] = {}
    for name, model in models.items():
        found.setdefault(_structure(model.graph), []).append(name)
    return list(found.values())


def region_of_differences(
    graphs: Sequence[ir.Graph], sources: Callable[[ir.Node], Iterable[ir.Value]]
) -> set[ir.Node]:
    """The nodes of the first graph that every version needs for itself.

    Those that read a weight which is another one elsewhere, and whatever lies on a way from one of them to another: so
    that a graph is cut in front of the differences and behind them, and not around each.

    Args:
        graphs: Of one of the `versions`.
        sources: What a node reads.

    Returns:
        Nodes. What lies before or behind and holds too little to be worth a cut (`LEAST_SHARED`) is among them, so that
        they may be all; none are where no weight differs.
    """
    first, *others = graphs
    differing = {
        name
        for name, value in first.initializers.items()
        if any(not _same(value.const_value, other.initializers[name].const_value) for other in others)
    }
    own = {node for node in first if any(v is not None and v.name in differing for v in node.inputs)}
    behind: set[ir.Value] = set()
    for node in first:
        if node in own or any(value in behind for value in sources(node)):
            behind.update(node.outputs)
    region: set[ir.Node] = set()
    before: set[ir.Value] = set()
    for node in reversed(first):
        leads = any(value in before for value in node.outputs)
        if node in own or (leads and any(value in behind for value in node.outputs)):
            region.add(node)
        if node in own or leads:
            before.update(sources(node))
    if not own:
        return set()
    outside = [node for node in first if node not in region]
    after = {node for node in outside if any(value in behind for value in node.outputs)}
    sides = (after, set(outside) - after)
    least = LEAST_SHARED * _bytes(first)
    for side in sides:
        if _bytes(side) < least:
            region |= side
    # What has no weight above it, such as the sampler's own arithmetic, goes with those that read it.
    heavy: set[ir.Value] = set()
    for node in first:
        if _reads_weight(node) or any(value in heavy for value in sources(node)):
            heavy.update(node.outputs)
    readers: dict[ir.Value, set[ir.Node]] = {}
    for node in first:
        for value in sources(node):
            readers.setdefault(value, set()).add(node)
    for node in reversed(first):
        reading = {reader for value in node.outputs for reader in readers.get(value, ())}
        given = any(value.is_graph_output() or value in heavy for value in node.outputs)
        if reading and reading <= region and not given:
            region.add(node)
    return region


def _reads_weight(node: ir.Node) -> bool:
    """Not of sizes, axes or single numbers."""
    held = (value.const_value for value in node.inputs if value is not None)
    return any(tensor is not None and tensor.size > 1 and tensor.dtype.is_floating_point() for tensor in held)


def _bytes(nodes: Iterable[ir.Node]) -> int:
    """Of the weights that they read."""
    weights = {v for node in nodes for v in node.inputs if v is not None and v.const_value is not None}
    return sum(weight.const_value.nbytes for weight in weights if weight.const_value is not None)


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


def _same(first: ir.TensorProtocol | None, second: ir.TensorProtocol | None) -> bool:
    if first is second or first is None or second is None:
        return first is second
    return np.array_equal(first.numpy(), second.numpy())
