"""One part of a graph as a graph of its own."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from trimtab.errors import PassError
from trimtab.passes.sizes import canonical, is_size


def local_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that a part may repeat: arithmetic on sizes, and what is computed from constants alone."""
    local: set[ir.Node] = set()
    for node in graph:
        if all(is_size(value) for value in node.outputs) or all(
            value is None or value.is_initializer() or value.producer() in local for value in node.inputs
        ):
            local.add(node)
    return local


def build_segment(
    name: str,
    model: ir.Model,
    nodes: Sequence[ir.Node],
    outputs: Sequence[ir.Value],
    local: set[ir.Node],
) -> ir.Model:
    """Copies some nodes of a graph into a graph of its own; weights are shared, not copied.

    Args:
        name: For the new graph.
        model: The whole; it is not changed.
        nodes: In a running order.
        outputs: Values that others read.
        local: Nodes that are repeated where they are needed.

    Raises:
        PassError: The shape or type of a value at a cut is not known, or does not follow from the part's inputs.
    """
    graph = model.graph
    made = {value for node in nodes for value in node.outputs}
    read = [
        value
        for node in nodes
        for value in node.inputs
        if value is not None and value not in made and not value.is_initializer()
    ]
    entering = dict.fromkeys(value for value in read if value.producer() not in local)
    entering |= dict.fromkeys(_measured(read, local, made | entering.keys()))
    order = {value: index for index, value in enumerate(graph.inputs)}
    inputs = sorted(entering, key=lambda value: order.get(value, len(order)))
    for value in (*inputs, *outputs):
        _check_known(name, value)

    new: dict[ir.Value, ir.Value] = {value: _copy(value) for value in inputs}
    sizes = _Sizes([*inputs, *made])
    body: list[ir.Node] = []
    initializers: dict[str, ir.Value] = {}

    def get(value: ir.Value) -> ir.Value:
        """The new graph's value; what may be repeated is, here."""
        if value not in new:
            if value.is_initializer():
                new[value] = initializers[str(value.name)] = _copy(value)
            else:
                node = value.producer()
                assert node is not None
                add(node)
        return new[value]

    def add(node: ir.Node) -> None:
        given = [_shape_source(node, value, new, sizes) for value in node.inputs]
        copied = [None if value is None else get(value) for value in given]
        attributes = dict(node.attributes)
        if node.op_type == "Shape" and given[0] is not node.inputs[0]:
            axis = sizes.axis(node, given[0])
            attributes = {"start": ir.AttrInt64("start", axis), "end": ir.AttrInt64("end", axis + 1)}
        clone = ir.Node(
            node.domain,
            node.op_type,
            copied,
            attributes,
            overload=node.overload,
            outputs=[_copy(value) for value in node.outputs],
            version=node.version,
            name=node.name,
            metadata_props=dict(node.metadata_props),
        )
        new.update(zip(node.outputs, clone.outputs, strict=True))
        body.append(clone)

    for node in nodes:
        add(node)
    part = ir.Graph(
        [new[value] for value in inputs],
        [new[value] for value in outputs],
        nodes=body,
        initializers=list(initializers.values()),
        opset_imports=dict(graph.opset_imports),
        name=name,
    )
    _own_symbols(name, part)
    called = {node.op_identifier() for node in body}
    return ir.Model(
        part,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        functions=[function for key, function in model.functions.items() if key in called],
        metadata_props=dict(model.metadata_props),
    )


def _measured(read: Iterable[ir.Value], local: set[ir.Node], near: set[ir.Value]) -> Iterator[ir.Value]:
    """Inputs of the whole graph that the part reads for their sizes alone, as nothing at hand has them."""
    sizes = _Sizes(near)
    stack = [node for value in read if (node := value.producer()) in local and node is not None]
    for node in stack:  # grows
        source = node.inputs[0]
        if node.op_type != "Shape":
            stack += [n for v in node.inputs if v is not None and (n := v.producer()) is not None]
        elif (
            source is not None
            and source.is_graph_input()
            and source not in near
            and sizes.substitute(node, near) is None
        ):
            yield source


class _Sizes:
    """Which values of a part have which open sizes."""

    def __init__(self, values: Iterable[ir.Value]) -> None:
        self._where: dict[str, list[tuple[ir.Value, int]]] = {}
        for value in values:
            for axis, dim in enumerate(value.shape or ()):
                if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                    self._where.setdefault(canonical(dim.value), []).append((value, axis))

    def wanted(self, node: ir.Node) -> str | None:
        """The single open size that a Shape reads, if it is one."""
        source = node.inputs[0]
        start, end = (node.attributes.get(key) for key in ("start", "end"))
        if source is None or source.shape is None or start is None or end is None:
            return None
        if end.as_int() - start.as_int() != 1:
            return None
        dim = source.shape[start.as_int()]
        return canonical(dim.value) if isinstance(dim, ir.SymbolicDim) and dim.value is not None else None

    def substitute(self, node: ir.Node, ready: Container[ir.Value]) -> ir.Value | None:
        """A value at hand that has the size."""
        wanted = self.wanted(node)
        found = (value for value, _ in self._where.get(wanted or "", ()) if value in ready)
        return next(found, None)

    def axis(self, node: ir.Node, value: ir.Value | None) -> int:
        """Where the substitute has it."""
        return next(axis for v, axis in self._where[self.wanted(node) or ""] if v is value)


def _shape_source(
    node: ir.Node, value: ir.Value | None, ready: Container[ir.Value], sizes: _Sizes
) -> ir.Value | None:
    """What a repeated Shape reads: its own tensor where that is at hand, else another of the same size."""
    if node.op_type != "Shape" or value is None or value in ready or value.is_initializer():
        return value
    other = sizes.substitute(node, ready)
    if other is None:
        raise PassError(
            f"a part of the graph needs a size of {value.name}, which another part makes, and has no tensor of "
            "that size itself: cut elsewhere"
        )
    return other


def _copy(value: ir.Value) -> ir.Value:
    return ir.Value(
        name=value.name,
        shape=None if value.shape is None else ir.Shape(list(value.shape)),
        type=value.type,
        const_value=value.const_value,
    )


def _check_known(name: str, value: ir.Value) -> None:
    dims = None if value.shape is None else list(value.shape)
    if value.dtype is None or dims is None or any(not isinstance(d, int) and d.value is None for d in dims):
        raise PassError(
            f"{name} is to be cut at {value.name}, and its type is {value.dtype} and its shape {value.shape}: "
            "cut at a value whose shape is known"
        )


def _own_symbols(name: str, graph: ir.Graph) -> None:
    """Makes every open size of the outputs follow from names in the inputs' shapes.

    A part does not see the whole graph's inputs: what was ``(latent_height - 1)//2 + 1`` there is a size of its
    own here, and has another value in a call that puts a value of another size in its place.
    """
    dims = [
        dim.value
        for value in graph.inputs
        for dim in value.shape or ()
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None
    ]
    plain = {dim for dim in dims if dim.isidentifier()}
    wide = [dim for dim in dict.fromkeys(dims) if not dim.isidentifier()]
    names: dict[str, str] = {}
    for dim in wide:
        names.setdefault(ast.dump(_parsed(dim)), f"size_{len(names)}")
    # In a copy of a value sizes are what they are there, whatever they are called (`alternatives.relabel`).
    copies = {
        ast.dump(_bare(_parsed(dim))): names[ast.dump(_parsed(dim))] for dim in reversed(wide) if not plain
    }
    rename = _Rename(names)
    values = [*graph.inputs, *(v for node in graph for v in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([rename.dim(dim) for dim in value.shape])
    known = plain | set(names.values())
    if not _symbols(graph.outputs) <= known:
        rename = _Rename(copies, _bare)
        for value in graph.outputs:
            value.shape = ir.Shape([rename.dim(dim) for dim in value.shape or ()])
    missing = _symbols(graph.outputs) - known
    if missing:
        raise PassError(
            f"{name} gives a tensor whose size depends on {min(missing)}, and nothing that it reads says that: "
            "cut elsewhere"
        )


def _symbols(values: Iterable[ir.Value]) -> set[str]:
    dims = [d.value for v in values for d in v.shape or () if isinstance(d, ir.SymbolicDim) and d.value]
    return {node.id for dim in dims for node in ast.walk(ast.parse(dim)) if isinstance(node, ast.Name)} - {
        "Max",
        "Min",
        "Mod",
        "FloorDiv",
    }


def _parsed(dim: str) -> ast.AST:
    return ast.parse(dim, mode="eval").body


class _WithoutZeros(ast.NodeTransformer):
    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        added = (
            isinstance(node.op, ast.Add) and isinstance(node.right, ast.Constant) and node.right.value == 0
        )
        return node.left if added else node


def _bare(node: ast.AST) -> ast.AST:
    """An expression without the zeros that are added to tell sizes apart."""
    return _WithoutZeros().visit(copy.deepcopy(node))


class _Rename(ast.NodeTransformer):
    """Replaces the largest known expressions by names."""

    def __init__(
        self, names: Mapping[str, str], form: Callable[[ast.AST], ast.AST] = lambda node: node
    ) -> None:
        self._names = names
        self._form = form

    def dim(self, dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int) or dim.value is None:
            return dim if isinstance(dim, int) else None
        return ast.unparse(self.visit(ast.parse(dim.value, mode="eval").body))

    def visit(self, node: ast.AST) -> ast.AST:
        name = self._names.get(ast.dump(self._form(node)))
        return ast.Name(name, ast.Load()) if name is not None else super().visit(node)
