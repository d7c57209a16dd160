"""The open sizes of a part of a graph, in names of its own.

A part does not see the whole graph's inputs: what was ``(latent_height - 1)//2 + 1`` there is a size of its own here,
and another number in a call that puts a value of another size in its place.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from trimtab.errors import PassError
from trimtab.shapes import FUNCTIONS


def own_symbols(name: str, graph: ir.Graph) -> None:
    """Makes every open size of the outputs follow from plain names in the inputs' shapes.

    Args:
        name: The part's, for messages.
        graph: The part; shapes of its values are rewritten.

    Raises:
        PassError: An output's size does not follow from any input's.
    """
    plain = {
        dim.value
        for value in graph.inputs
        for dim in value.shape or ()
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value.isidentifier()
    }
    fresh = (name for index in itertools.count() if (name := f"size_{index}") not in plain)
    known: dict[str, ast.expr] = {}
    for value in graph.inputs:
        for dim in value.shape or ():
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and not dim.value.isidentifier():
                key = _key(dim.value)
                if key not in known:
                    known[key] = ast.Name(next(fresh), ast.Load())
    names = {name.id for name in known.values() if isinstance(name, ast.Name)}
    _learn_parts(known, graph.inputs)
    rename = _Rename(known)
    for value in graph.inputs:
        rename.apply(value)
    for node in graph:
        if node.op_type == "Conv":
            _learn_strides(node, known)
        elif node.op_type == "Identity":
            _learn_copy(node, known)
        elif node.op_type == "Concat":
            _learn_sum(node, known)
        for value in node.outputs:
            rename.apply(value)
    missing = _symbols(graph.outputs) - plain - names
    if missing:
        raise PassError(
            f"{name} gives a tensor whose size depends on {min(missing)}, and nothing that it reads says that: "
            "cut elsewhere"
        )


def _symbols(values: Iterable[ir.Value]) -> set[str]:
    dims = [d.value for v in values for d in v.shape or () if isinstance(d, ir.SymbolicDim) and d.value]
    names = {node.id for dim in dims for node in ast.walk(ast.parse(dim)) if isinstance(node, ast.Name)}
    return names - FUNCTIONS.keys()


def _key(expression: str) -> str:
    return ast.dump(ast.parse(expression, mode="eval").body)


def _learn_parts(known: dict[str, ast.expr], inputs: Iterable[ir.Value]) -> None:
    """Adds what a size of the inputs was made of by multiplying with a number or adding one.

    ``n//4 + 1`` is ``2*(n//4) + 2`` once it is doubled and multiplied out, and ``2*(n//4)`` is ``4*(n//4)``.
    """
    for dim in (dim for value in inputs for dim in value.shape or ()):
        if not isinstance(dim, ir.SymbolicDim) or dim.value is None:
            continue
        whole = ast.parse(dim.value, mode="eval").body
        while isinstance(whole, ast.BinOp):
            same = known[ast.dump(whole)]
            if isinstance(whole.op, ast.Add) and isinstance(whole.right, ast.Constant):
                part, same = whole.left, ast.BinOp(same, ast.Sub(), whole.right)
            elif isinstance(whole.op, ast.Mult) and isinstance(whole.left, ast.Constant):
                part, same = whole.right, ast.BinOp(same, ast.FloorDiv(), whole.left)
            else:
                break
            if isinstance(part, ast.Name):
                break  # n + 0 is another size than n: see `alternatives.relabel`
            known.setdefault(ast.dump(part), same)
            whole = part


def _learn_strides(node: ir.Node, known: dict[str, ast.expr]) -> None:
    """Adds what a convolution makes of its input's sizes, which are already the part's own."""
    source, result, kernel = node.inputs[0], node.outputs[0], node.inputs[1]
    if (
        source is None
        or kernel is None
        or source.shape is None
        or result.shape is None
        or kernel.shape is None
    ):
        return
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return
    axes = result.shape.rank() - 2
    strides, dilations = (node.attributes.get_ints(name, [1] * axes) for name in ("strides", "dilations"))
    pads = node.attributes.get_ints("pads", [0] * (2 * axes))
    for axis in range(axes):
        before, after, width = (shape[axis + 2] for shape in (source.shape, result.shape, kernel.shape))
        if isinstance(before, int) or isinstance(after, int) or not isinstance(width, int):
            continue
        if after.value is None or before.value is None or after.value.isidentifier():
            continue
        rest = pads[axis] + pads[axis + axes] - dilations[axis] * (width - 1) - 1
        text = f"(({before.value}) + {rest}) // {strides[axis]} + 1"
        known.setdefault(_key(after.value), ast.parse(text, mode="eval").body)


def _learn_copy(node: ir.Node, known: dict[str, ast.expr]) -> None:
    """Adds that a copy has the sizes of what it copies, whatever they are called."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None:
        return
    for before, after in zip(source.shape, result.shape, strict=True):
        if isinstance(before, int) or isinstance(after, int):
            continue
        if before.value is not None and after.value is not None and not after.value.isidentifier():
            known.setdefault(_key(after.value), ast.parse(before.value, mode="eval").body)


def _learn_sum(node: ir.Node, known: dict[str, ast.expr]) -> None:
    """Adds that what is joined is as long as its parts together, however that sum was written out."""
    shapes = [value.shape for value in (*node.inputs, *node.outputs) if value is not None]
    axis = node.attributes["axis"].as_int()
    *parts, whole = (None if shape is None else shape[axis] for shape in shapes)
    if not isinstance(whole, ir.SymbolicDim) or whole.value is None or whole.value.isidentifier():
        return
    texts = [part.value if isinstance(part, ir.SymbolicDim) else part for part in parts]
    if None not in texts:
        text = " + ".join(f"({text})" for text in texts)
        known.setdefault(_key(whole.value), ast.parse(text, mode="eval").body)


class _Rename(ast.NodeTransformer):
    """Replaces the largest known expressions."""

    def __init__(self, known: Mapping[str, ast.expr]) -> None:
        self._known = known

    def apply(self, value: ir.Value) -> None:
        """Rewrites a value's shape."""
        if value.shape is not None:
            value.shape = ir.Shape([self._dim(dim) for dim in value.shape])

    def _dim(self, dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int) or dim.value is None:
            return dim if isinstance(dim, int) else None
        return ast.unparse(self.visit(ast.parse(dim.value, mode="eval").body))

    def visit(self, node: ast.AST) -> ast.AST:
        found = self._known.get(ast.dump(node))
        return super().visit(node) if found is None else found
