"""Forms that TorchScript's exporter writes and that passes do not look for, written as torch's later one does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trimtab.passes.constants import add_constant


def tidy(graph: ir.Graph) -> None:
    """Rewrites a graph in place; every number stays as it is.

    Args:
        graph: Of opset 15 or later, with its constants as initializers.
    """
    for node in list(graph):
        if node.domain or node.outputs[0].is_graph_output():
            continue
        if node.op_type in ("Mul", "Div"):
            _drop_idle(graph, node)
        elif node.op_type == "Gather":
            _take_one_size(graph, node)


def _drop_idle(graph: ir.Graph, node: ir.Node) -> None:
    """Removes a product with 1, or a quotient by 1: behind a sum it hides that the sum is a residual branch's."""
    for index in (1, 0) if node.op_type == "Mul" else (1,):
        factor, other = node.inputs[index], node.inputs[1 - index]
        one = factor.const_value if factor is not None and factor.is_initializer() else None
        if one is not None and other is not None and not one.shape.rank() and one.numpy() == 1:
            ir.convenience.replace_all_uses_with(node.outputs[0], other)
            graph.remove(node, safe=True)
            return


def _take_one_size(graph: ir.Graph, node: ir.Node) -> None:
    """Reads one size of a tensor where all were read: a part of the graph may have a tensor with that one alone."""
    sizes, index = node.inputs
    shape = sizes.producer() if sizes is not None else None
    which = index.const_value if index is not None and index.is_initializer() else None
    if shape is None or shape.op_type != "Shape" or shape.attributes or which is None or which.shape.rank():
        return
    start, result = int(which.numpy()), node.outputs[0]
    bounds = {"start": start} if start == -1 else {"start": start, "end": start + 1}
    one = ir.node("Shape", [shape.inputs[0]], bounds, name=f"{node.name}/size")
    axes = add_constant(graph, f"{result.name}/axes", np.array([0], np.int64))
    scalar = ir.node("Squeeze", [one.outputs[0], axes], name=f"{node.name}/scalar")
    one.outputs[0].name, one.outputs[0].shape = f"{result.name}/size", ir.Shape([1])
    one.outputs[0].type = result.type = ir.TensorType(ir.DataType.INT64)
    scalar.outputs[0].name, scalar.outputs[0].shape = f"{result.name}/scalar", ir.Shape([])
    scalar.outputs[0].type = result.type
    for new in (one, scalar):
        new.metadata_props.update(node.metadata_props)
    graph.insert_before(node, [one, scalar])
    ir.convenience.replace_all_uses_with(result, scalar.outputs[0])
    graph.remove(node, safe=True)
