"""One part of a graph as a graph of its own."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Sequence

import onnx_ir as ir

from trimtab.errors import PassError
from trimtab.passes.sizes import canonical, is_size
from trimtab.passes.symbols import own_symbols


def local_nodes(graph: ir.Graph, swapped: Container[str] = ()) -> set[ir.Node]:
    """Nodes that a part may repeat: arithmetic on sizes, and what is computed from constants alone.

    Args:
        graph: The whole.
        swapped: Names of values that some calls read others in the place of: nobody's own, nor is what follows.
    """
    local: set[ir.Node] = set()
    for node in graph:
        if any(str(value.name) in swapped for value in node.outputs):
            continue
        if all(is_size(value) for value in node.outputs) or all(
            value is None or value.is_initializer() or value.producer() in local for value in node.inputs
        ):
            local.add(node)
    return local


def segment_at(
    places: Collection[int], name: str, model: ir.Model, outputs: Iterable[str], local: set[ir.Node]
) -> ir.Model:
    """`build_segment` of what stands at some places in a graph, with values by their names: the same of any version.

    Args:
        places: Of nodes in the graph's order.
        name: For the new graph.
        model: The whole; it is not changed.
        outputs: Values that others read.
        local: Nodes of the whole that are repeated where they are needed.
    """
    graph = model.graph
    values = {str(value.name): value for node in graph for value in node.outputs}
    nodes = [node for index, node in enumerate(graph) if index in places]
    return build_segment(name, model, nodes, [values[other] for other in outputs], local)


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

    copies = _Copies(inputs, made, graph, local)
    for node in nodes:
        copies.add(node)
    part = ir.Graph(
        [copies.get(v) for v in sorted(copies.inputs, key=lambda value: order.get(value, len(order)))],
        [copies.get(value) for value in outputs],
        nodes=copies.body,
        initializers=list(copies.initializers.values()),
        opset_imports=dict(graph.opset_imports),
        name=name,
    )
    own_symbols(name, part)
    called = {node.op_identifier() for node in copies.body}
    return ir.Model(
        part,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        functions=[function for key, function in model.functions.items() if key in called],
        metadata_props=dict(model.metadata_props),
    )


class _Copies:
    """Copies of nodes and values, as one part of a graph has them.

    Args:
        inputs: What the part reads of others.
        made: What it makes.
        graph: The whole.
        local: Nodes that are repeated where they are needed.

    Attributes:
        inputs: The same, and inputs of the whole graph that turn out to be read for their sizes.
        body: Copied nodes, in a running order.
        initializers: Copied ones, by name.
    """

    def __init__(
        self, inputs: Sequence[ir.Value], made: Iterable[ir.Value], graph: ir.Graph, local: Container[ir.Node]
    ) -> None:
        self.inputs = list(inputs)
        self.body: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._graph = graph
        self._local = local
        self._new: dict[ir.Value, ir.Value] = {value: _copy(value) for value in inputs}
        self._sizes = _Sizes([*inputs, *made, *graph.inputs])

    def get(self, value: ir.Value) -> ir.Value:
        """The part's value; what may be repeated is, here."""
        if value not in self._new:
            if value.is_initializer():
                self._new[value] = self.initializers[str(value.name)] = _copy(value)
            elif value.is_graph_input():  # for its size: what has it here is made later
                self._new[value] = _copy(value)
                self.inputs.append(value)
            else:
                node = value.producer()
                assert node is not None
                self.add(node)
        return self._new[value]

    def add(self, node: ir.Node) -> None:
        """Copies a node; a Shape may read another tensor of the same size."""
        sizes = self._sizes
        given = [
            _shape_source(node, value, self._new, sizes, self._graph.inputs, self._local)
            for value in node.inputs
        ]
        copied = [None if value is None else self.get(value) for value in given]
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
        self._new.update(zip(node.outputs, clone.outputs, strict=True))
        self.body.append(clone)


def _measured(read: Iterable[ir.Value], local: set[ir.Node], near: set[ir.Value]) -> Iterator[ir.Value]:
    """Inputs of the whole graph that the part reads for their sizes alone, as nothing at hand has them."""
    sizes = _Sizes(near)
    stack = [node for value in read if (node := value.producer()) in local and node is not None]
    for node in stack:  # grows
        if node.op_type != "Shape":
            stack += [n for v in node.inputs if v is not None and (n := v.producer()) is not None]
        elif (
            (source := node.inputs[0]) is not None
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
    node: ir.Node,
    value: ir.Value | None,
    ready: Container[ir.Value],
    sizes: _Sizes,
    inputs: Container[ir.Value],
    local: Container[ir.Node],
) -> ir.Value | None:
    """What a repeated Shape reads: its own tensor where that is at hand, else another of the same size, else an input
    of the whole graph that has it, else its own tensor once more where it may be repeated (Flux's positions)."""
    if node.op_type != "Shape" or value is None or value in ready or value.is_initializer():
        return value
    other = sizes.substitute(node, ready) or sizes.substitute(node, inputs)
    if other is None and value.producer() in local and not _reads_table(value):
        return value
    if other is None:
        raise PassError(
            f"a part of the graph needs a size of {value.name}, which another part makes, and has no tensor of "
            "that size itself: cut elsewhere"
        )
    return other


def _reads_table(value: ir.Value) -> bool:
    """Whether a value comes of a weight of two axes or more (SD3's positions), which nobody copies for its size."""
    stack, known = [value], set[ir.Value]()
    while stack:
        item = stack.pop()
        node = item.producer()
        if item.is_initializer() and item.shape is not None and item.shape.rank() > 1:
            return True
        if node is not None and node.op_type != "Shape" and item not in known:
            known.add(item)
            stack.extend(read for read in node.inputs if read is not None)
    return False


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
