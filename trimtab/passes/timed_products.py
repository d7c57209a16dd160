"""Products of weights with rows that the time step decides, and nothing that is not known before the steps."""

from __future__ import annotations

from collections.abc import Set

import onnx_ir as ir


def timed_products(graph: ir.Graph, timed: Set[str], fixed: Set[str], local: Set[ir.Node]) -> list[ir.Node]:
    """The last such products: between their results and whatever is not known before the steps there is no other.

    Args:
        graph: Where they are looked for.
        timed: Its inputs that change with the step.
        fixed: Its inputs that are known before the steps and do not.
        local: Sizes and constants, from `trimtab.passes.segments.local_nodes`.

    Returns:
        MatMul and Gemm nodes whose result is (rows, channels), in running order.
    """
    known = {value for value in graph.inputs if value.name in timed | fixed}
    times = {value for value in graph.inputs if value.name in timed}
    products: set[ir.Node] = set()
    inner: set[ir.Node] = set()
    for node in graph:
        read = [value for value in node.inputs if value is not None and not is_constant(value, local)]
        if node in local or not read or not known.issuperset(read) or _has_graph(node):
            continue
        known.update(node.outputs)
        if times.intersection(read):
            times.update(node.outputs)
            inner.add(node)
            product = node.op_type in ("MatMul", "Gemm") and read == [node.inputs[0]]
            if product and _is_rows(node.outputs[0]):
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
            stack.extend(read for read in maker.inputs if read in times)
    return [node for node in graph if node in last]


def is_constant(value: ir.Value, local: Set[ir.Node]) -> bool:
    """Whether a value is a weight or comes of sizes and constants alone."""
    return value.is_initializer() or value.producer() in local


def _has_graph(node: ir.Node) -> bool:
    """Whether a node, such as If, may read what its inputs do not say."""
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in graphs for attribute in node.attributes.values())


def _is_rows(value: ir.Value) -> bool:
    """Whether a value is (rows, channels), of which only the rows are open."""
    return (
        value.shape is not None
        and value.shape.rank() == 2
        and isinstance(value.shape[1], int)
        and not isinstance(value.shape[0], int)
    )
