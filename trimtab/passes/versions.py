"""Graphs that differ in weights alone, as `trimtab.passes.mix_kernels` makes them: what they can share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

LEAST_SHARED = 0.1
"""Of a graph's weights: where less than that is the same in all versions, a cut costs more than it saves."""


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
        Nodes; none where the others hold too little to be worth a cut (`LEAST_SHARED`), or there is one version.
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
    inside = {v.name for node in region for v in node.inputs if v is not None and v.is_initializer()}
    sizes = {
        name: v.const_value.nbytes for name, v in first.initializers.items() if v.const_value is not None
    }
    shared = sum(size for name, size in sizes.items() if name not in inside)
    return region if own and shared >= LEAST_SHARED * sum(sizes.values()) else set()


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
