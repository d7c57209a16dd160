"""The module tree of a graph: the user's own module names, back from the exporter's notes on every node."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
"""On every node: the module paths from the outermost to the innermost, then the operation's own name."""


def scopes(node: ir.Node) -> tuple[str, ...]:
    """The module paths that a node lies in, outermost first, without the root; empty for foreign graphs."""
    return _paths(node.metadata_props.get(SCOPES, ""))


@functools.lru_cache(1 << 16)  # a pass asks for its graph's module tree more than once
def _paths(text: str) -> tuple[str, ...]:
    try:
        paths = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return ()
    return tuple(path for path in paths[:-1] if path)


def place(node: ir.Node) -> str:
    """How a report calls a node: by its module, or by its own name."""
    return next(reversed(scopes(node)), "") or node.name or node.outputs[0].name or node.op_type


@dataclass(frozen=True)
class Module:
    """One module of a graph.

    Attributes:
        path: As in torch, "down_blocks.1.attentions.0".
        nodes: Its nodes and those of the modules inside, in the graph's order.
    """

    path: str
    nodes: tuple[ir.Node, ...]

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """Values that its nodes read and others make; weights are not among them."""
        own = {output for node in self.nodes for output in node.outputs}
        read = (value for node in self.nodes for value in node.inputs if value is not None)
        return tuple(dict.fromkeys(v for v in read if v not in own and not v.is_initializer()))

    @property
    def outputs(self) -> tuple[ir.Value, ...]:
        """Values that its nodes make and that others, or the graph's outputs, read."""
        own = set(self.nodes)
        return tuple(
            value
            for node in self.nodes
            for value in node.outputs
            if value.is_graph_output() or any(user not in own for user, _ in value.uses())
        )


def module_tree(graph: ir.Graph) -> dict[str, Module]:
    """All modules of a graph by path, in the order in which they start; empty for foreign graphs."""
    nodes: dict[str, list[ir.Node]] = {}
    for node in graph:
        for path in scopes(node):
            nodes.setdefault(path, []).append(node)
    return {path: Module(path, tuple(members)) for path, members in nodes.items()}


def expose_blocks(model: ir.Model) -> dict[str, str]:
    """Makes the results of all `blocks` graph outputs, in place.

    Returns:
        Module path -> name of its first floating-point output.
    """
    names = {}
    for block in blocks(module_tree(model.graph)):
        floats = [v for v in block.outputs if v.dtype is not None and v.dtype.is_floating_point()]
        if floats and floats[0].name:
            names[block.path] = floats[0].name
            if not floats[0].is_graph_output():
                model.graph.outputs.append(floats[0])
    return names


def blocks(tree: dict[str, Module]) -> Iterator[Module]:
    """Modules that have modules inside: what a report names, short of every single layer."""
    paths = set(tree)
    parents = {path.rpartition(".")[0] for path in paths}
    for path, module in tree.items():
        if path in parents:
            yield module
