"""Opening .onnx files that others exported, and giving them an interface that the runtime can bind.

Foreign graphs name their open sizes as they like, or not at all, and often share one name between sizes that
differ. So every open axis of an input gets a name of its own here, and every output that is wired must have
sizes that follow from those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from trimtab.errors import BundleError, ExportError, InputError, first_line, nearest
from trimtab.export.onnx.modules import restore_modules
from trimtab.export.onnx.tidy import tidy
from trimtab.passes.scopes import SCOPES
from trimtab.shapes import FUNCTIONS, evaluate
from trimtab.silence import errors_alone
from trimtab.weights import INLINE_BYTES, external_tensors, load_model

OLDEST_OPSET = 15
"""What trimtab's own nodes need (Shape with a start). Older graphs are converted."""

CONVERTED_OPSET = 18
IR_VERSION = 8
"""Of the ONNX releases that brought opset 18, the first in which weights can be packed to 3 bits."""

ROWS = "prompts"
"""The first axis of whatever has one entry for each guidance row of each picture."""

TRIAL = 16
"""For sizes that a trial says nothing of: even, and larger than what a layer may cut off."""

SYMBOL = re.compile(r"[A-Za-z_]\w*")

_MULTIPLE = re.compile(r"(\d+)\*([A-Za-z_]\w*)")
"""What torch's exporter calls a size that is known to be a multiple."""


@dataclass(frozen=True)
class Foreign:
    """An opened .onnx file.

    Attributes:
        name: Of its table.
        file: Where it lies.
        model: The graph, with functions inlined, at opset `OLDEST_OPSET` or later.
    """

    name: str
    file: Path
    model: ir.Model

    def input(self, name: str) -> ir.Value:
        """The graph input of this name (Raises InputError with the nearest names)."""
        return _named(self.model.graph.inputs, name, f"{self.file} has no input {name!r}")

    def output(self, name: str) -> ir.Value:
        """The graph output of this name (Raises InputError with the nearest names)."""
        return _named(self.model.graph.outputs, name, f"{self.file} has no output {name!r}")


def _named(values: Iterable[ir.Value], name: str, problem: str) -> ir.Value:
    known = {str(value.name): value for value in values}
    if name not in known:
        raise InputError(f"{problem}: {nearest(name, known)}")
    return known[name]


def open_graph(name: str, file: Path) -> Foreign:
    """Opens an .onnx file; its weights stay on disk until they are asked for.

    Raises:
        InputError: Not an ONNX file, or one of a graph that is none; its external data are missing or cut short.
        ExportError: Of an opset that cannot be converted.
    """
    try:
        model = load_model(file)
    except Exception as error:  # protobuf's errors and onnx_ir's share no base
        raise InputError(f"{file} cannot be read as ONNX ({_cause(error)}): export it again") from error
    if not model.graph.outputs or not len(model.graph):
        raise InputError(f"{file} holds no ONNX graph: give a file that an ONNX exporter wrote")
    if lost := _read_and_not_made(model):
        raise InputError(f"{file} reads {lost!r}, which nothing in it makes: export it again")
    passes: list[ir.passes.PassBase] = [
        common.TopologicalSortPass(),
        *([common.InlinePass()] if model.functions else []),
        common.RemoveInitializersFromInputsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
    ]
    try:
        for step in passes:
            model = step(model).model
    except Exception as error:  # onnx_ir's errors share no base
        raise InputError(f"{file} cannot be taken apart ({_cause(error)}): export it again") from error
    _find_weights(model, file)  # here, where the Constants of functions and branches are among them
    model = _convert(model, file)
    tidy(model.graph)
    # Version 3 demands that weights be inputs, too.
    model.ir_version = max(model.ir_version or 0, IR_VERSION)
    _forget_notes(model)
    restore_modules(model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype is None or not isinstance(value.type, ir.TensorType):
            raise ExportError(
                f"{file}: {value.name} is no tensor of a known type: export it with tensors only"
            )
    return Foreign(name, file, model)


def _cause(error: BaseException) -> str:
    """The first line of what went wrong first: onnx_ir tells of each graph and node around it as well."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error).rstrip(".")


def _read_and_not_made(model: ir.Model) -> str | None:
    """The name of a value that a node or an output reads, and no node, input or weight is."""
    graphs = list(model.graphs())
    given = {value for graph in graphs for value in (*graph.inputs, *graph.initializers.values())}
    read = (value for graph in graphs for node in graph for value in node.inputs)
    results = (value for graph in graphs for value in graph.outputs)
    for value in (*read, *results):
        if value is not None and value.producer() is None and value not in given:
            return value.name or ""
    return None


def _find_weights(model: ir.Model, file: Path) -> None:
    """Refuses weights that are missing or out of the folder, and reads those that stay in the graph.

    The others, of `INLINE_BYTES` and more, are named by the path that links lead to: a hub's cache is made of links,
    and onnx_ir follows none.
    """
    for tensor in external_tensors(model):
        path, location = Path(tensor.path), PurePath(tensor.location)
        if location.is_absolute() or ".." in location.parts:
            raise InputError(f"{file} reads weights at {location}, out of its folder: export it again")
        if not path.is_file():
            raise InputError(
                f"{path}, which holds weights of {file.name}, is missing: copy it beside the graph"
            )
        needed = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        size = path.stat().st_size
        if size < needed:
            raise InputError(f"{path} is cut short: {size} of {needed} bytes for {file.name}; copy it again")
    for value in (value for graph in model.graphs() for value in graph.initializers.values()):
        if isinstance(value.const_value, ir.ExternalTensor):
            found = _resolved(value.const_value, value.name or "")
            value.const_value = _inside(found) if found.nbytes < INLINE_BYTES else found
    for node in model.graph.all_nodes():  # a branch may give a Constant as its result
        for name, attribute in [*node.attributes.items()]:
            if isinstance(attribute.value, ir.ExternalTensor):
                node.attributes[name] = ir.AttrTensor(name, _inside(_resolved(attribute.value, name)))


def _resolved(tensor: ir.ExternalTensor, name: str) -> ir.ExternalTensor:
    path = Path(tensor.path).resolve()
    return ir.ExternalTensor(path, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name)


def _inside(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)


def _convert(model: ir.Model, file: Path) -> ir.Model:
    found = model.opset_imports.get("")
    if found is None:
        model.graph.opset_imports[""] = CONVERTED_OPSET  # only operators of other domains: nothing to convert
        return model
    if found >= OLDEST_OPSET:
        return model
    from onnxscript import version_converter

    reason = "the converter gave up"
    try:
        with errors_alone("onnxscript"):  # it warns where it succeeds, too
            version_converter.convert_version(model, CONVERTED_OPSET, fallback=True)
    except Exception as error:  # the converter's errors share no base
        reason = first_line(error)
    if model.graph.opset_imports.get("", 0) < OLDEST_OPSET:
        raise ExportError(
            f"{file} has opset {found}, and it cannot be converted to {CONVERTED_OPSET} ({reason}): "
            f"export it again with opset {CONVERTED_OPSET} or later"
        )
    return model


def _forget_notes(model: ir.Model) -> None:
    """Drops what the exporter noted beside module names: its stack traces hold another machine's paths."""
    model.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    model.graph.metadata_props.clear()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        scopes = node.metadata_props.get(SCOPES)
        node.metadata_props.clear()
        if scopes:
            node.metadata_props[SCOPES] = scopes
        node.doc_string = None


def name_sizes(graph: ir.Graph, chosen: Mapping[str, Sequence[str | None]]) -> None:
    """Names every open axis of every input, and rewrites all other shapes in those names.

    Args:
        graph: Edited in place. Sizes that do not follow from the inputs' become unknown.
        chosen: Input -> a name for each of its axes where one is wanted. Those inputs come first in deciding
            what a name of the exporter's stands for.
    """
    names: dict[str, str] = {}
    taken: set[str] = {name for axes in chosen.values() for name in axes if name}
    for value in sorted(graph.inputs, key=lambda value: value.name not in chosen):
        if value.shape is None:
            continue
        wanted = chosen.get(str(value.name), ())
        dims: list[int | str] = []
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, int):
                dims.append(dim)
                continue
            name = wanted[axis] if axis < len(wanted) else None
            name = name or _fresh(f"{value.name}_{axis}", taken)
            if dim.value:
                names.setdefault(str(dim.value), name)
            if multiple := _MULTIPLE.fullmatch(str(dim.value)):
                names.setdefault(multiple[2], f"({name}//{multiple[1]})")
            dims.append(name)
        value.shape = ir.Shape(dims)
    own = set(map(id, graph.inputs))
    for value in (*graph.outputs, *(output for node in graph.all_nodes() for output in node.outputs)):
        if value.shape is not None and id(value) not in own:
            own.add(id(value))
            value.shape = ir.Shape([_translated(dim, names) for dim in value.shape])


def _fresh(name: str, taken: set[str]) -> str:
    clean = re.sub(r"\W", "_", name)
    clean = clean if clean.isidentifier() else f"size_{clean}"
    while clean in taken:
        clean += "_"
    taken.add(clean)
    return clean


def _translated(dim: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    text = str(dim.value)
    if text in names:
        return names[text]
    if any(word not in names and word not in FUNCTIONS for word in SYMBOL.findall(text)):
        return None
    text = SYMBOL.sub(lambda match: names.get(match[0], match[0]), text)
    try:
        evaluate(text, dict.fromkeys(filter(str.isidentifier, names.values()), 2))
    except BundleError:
        return None
    return text


def keep_outputs(graph: ir.Graph, wanted: Iterable[ir.Value]) -> None:
    """Drops every other output, and the nodes and weights that only they needed."""
    kept = {id(value) for value in wanted}
    graph.outputs[:] = [value for value in graph.outputs if id(value) in kept]


def drop_unused(foreign: Foreign) -> None:
    """Removes nodes and weights that nothing reads."""
    common.RemoveUnusedNodesPass()(foreign.model)


def infer(foreign: Foreign) -> None:
    """Infers the shapes that the exporter left out, as far as onnx can."""
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(foreign.model)


def settle_outputs(foreign: Foreign, like: ir.Value | None, text: bool) -> None:
    """Gives every output sizes that follow from the inputs', or refuses.

    Args:
        foreign: Its outputs are those that something reads.
        like: The input that has the graph's rows along its first axis.
        text: It reads tokens, so that an output's second axis, where it is not known, counts tokens too.

    Raises:
        ExportError: An output's sizes are not known.
    """
    outputs = foreign.model.graph.outputs
    if any(_unknown(value) for value in outputs):
        infer(foreign)
        known = {
            str(dim.value): str(dim.value)
            for value in foreign.model.graph.inputs
            for dim in value.shape or ()
            if isinstance(dim, ir.SymbolicDim) and dim.value
        }
        for value in outputs:
            if value.shape is not None:
                value.shape = ir.Shape([_translated(dim, known) for dim in value.shape])
    for value in outputs:
        where = f"{foreign.file}: the output {value.name}"
        if value.shape is None:
            raise ExportError(f"{where} has no known shape: export it with shapes")
        dims: list[int | str] = []
        for axis, dim in enumerate(value.shape):
            known_axes = (2 if text else 1) if like is not None else 0
            if isinstance(dim, ir.SymbolicDim) and dim.value is None:
                if like is None or like.shape is None or axis >= min(known_axes, like.shape.rank()):
                    raise ExportError(
                        f"{where} has an open size along axis {axis} that follows from no input: "
                        "export it with dynamic axes that have the inputs' names, or with fixed sizes"
                    )
                dim = like.shape[axis]
            dims.append(dim if isinstance(dim, int) else str(dim.value))
        value.shape = ir.Shape(dims)


def _unknown(value: ir.Value) -> bool:
    return value.shape is None or any(
        isinstance(dim, ir.SymbolicDim) and dim.value is None for dim in value.shape
    )


def check_outputs(foreign: Foreign, trial: Mapping[str, int], advice: str) -> None:
    """Compares the outputs' sizes with those that onnx infers once the inputs' are numbers.

    With numbers the inference follows almost any graph, where with names it gives up at the first Reshape. The
    first axes are left out: a fixed batch may disagree with the trial's.

    Args:
        foreign: Its weights must lie outside of the graph, which is copied.
        trial: Name of a size -> a number that the graph can take; others become `TRIAL`.
        advice: How the error ends.

    Raises:
        InputError: An output has another size than it is said to have.
    """
    proto = ir.to_proto(foreign.model)
    del proto.graph.value_info[:]

    def tried(dim: int | ir.SymbolicDim) -> int:
        names = {name: trial.get(name, TRIAL) for name in SYMBOL.findall(str(dim))}
        return evaluate(dim if isinstance(dim, int) else str(dim.value), names)

    for value, info in zip(foreign.model.graph.inputs, proto.graph.input, strict=True):
        for dim, entry in zip(value.shape or (), info.type.tensor_type.shape.dim, strict=True):
            entry.Clear()
            entry.dim_value = tried(dim)
    for info in proto.graph.output:
        info.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return  # an operator that onnx does not know: the backend will say what it thinks of the graph
    for value, info in zip(foreign.model.graph.outputs, inferred.graph.output, strict=True):
        for axis, entry in enumerate(info.type.tensor_type.shape.dim):
            said = None if value.shape is None else tried(value.shape[axis])
            if axis and entry.HasField("dim_value") and said not in (None, entry.dim_value):
                raise InputError(
                    f"{foreign.file}: the output {value.name} comes out with {entry.dim_value} along axis {axis}, and "
                    f"{said} was expected: {advice}"
                )
