"""The module tree of a foreign graph, where its exporter noted one.

torch's exporter notes a module's path on every node; the one before it (TorchScript) wrote the path into the node's
name. Whoever exports a model from inside of a wrapper has the wrapper's name in front of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from trimtab.passes.scopes import SCOPES, scopes

_WEIGHT = ".weight"

_NOWHERE = "_empty_nn_module_stack_from_metadata_hook"
"""What torch's exporter notes on a node that it made itself."""


def restore_modules(model: ir.Model) -> None:
    """Notes the module paths of all nodes as torch's exporter does, without a wrapper's name; names weights by them.

    Args:
        model: Edited. Weights of linear layers, which exporters transpose and give names of their own, are called
            after their layer, with ``.T`` behind.
    """
    nodes = [*ir.traversal.RecursiveGraphIterator(model.graph)]
    for node in nodes:
        if SCOPES not in node.metadata_props and (node.name or "").startswith("/"):
            node.metadata_props[SCOPES] = repr(_paths(str(node.name)))
        elif _NOWHERE in scopes(node):
            del node.metadata_props[SCOPES]
    while (wrapper := _wrapper(nodes)) is not None and _unwrap(model, nodes, wrapper):
        pass
    _name_transposed(model.graph)


def _paths(name: str) -> list[str]:
    """``/mid/ff/ff.1/Mul_2`` as the paths "", "mid", "mid.ff" and "mid.ff.1", and the operation's own name.

    Layers of a Sequential, and only they, have its name before their own.
    """
    *modules, operation = name.split("/")[1:]
    paths, last = [""], ""
    for module in modules:
        own = module.removeprefix(f"{last}.") if last else module
        paths.append(f"{paths[-1]}.{own}" if paths[-1] else own)
        last = module
    return [*paths, operation]


def _wrapper(nodes: Iterable[ir.Node]) -> str | None:
    """The one module that all others lie in; a block of a list is none."""
    paths = [found for node in nodes if (found := scopes(node))]
    first = {found[0] for found in paths}
    if len(first) != 1 or max(map(len, paths)) == 1:
        return None
    name = first.pop()
    return None if name.rpartition(".")[2].isdecimal() else name


def _unwrap(model: ir.Model, nodes: Iterable[ir.Node], wrapper: str) -> bool:
    """Takes a wrapper's name away from all paths and weights; says no where a weight of the other name is there."""
    start, weights = f"{wrapper}.", model.graph.initializers
    renamed = {name: name.removeprefix(start) for name in weights if name.startswith(start)}
    taken = {str(value.name) for value in model.graph.inputs} | set(weights)
    if taken.intersection(renamed.values()):
        return False
    for node in nodes:
        if found := scopes(node):
            paths = [path.removeprefix(start) for path in found if path != wrapper]
            node.metadata_props[SCOPES] = repr(["", *paths, node.name or node.op_type])
    for name, own in renamed.items():
        weights[name].name = own
    return True


def _name_transposed(graph: ir.Graph) -> None:
    taken = set(graph.initializers)
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" and len(node.inputs) > 1 else None
        path = next(reversed(scopes(node)), "")
        if weight is None or not weight.is_initializer() or not path or weight.is_graph_output():
            continue
        if _WEIGHT in str(weight.name) or weight.shape is None or weight.shape.rank() != 2:
            continue
        if not {name := f"{path}{_WEIGHT}.T", f"{path}{_WEIGHT}"} & taken:
            taken.add(name)
            weight.name = name
