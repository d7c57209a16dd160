"""One torch module in, one ONNX graph out, with sizes left open and the model's own names kept."""

from __future__ import annotations

import ast
import contextlib
import functools
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import TracedOnnxFunction
from onnxscript.rewriter.rules.common import slice_split_rule
from onnxscript.rewriter.rules.fusion._rotary_embedding import rotary_embedding_rules

from trimtab.errors import ExportError, first_line
from trimtab.export.decomposition import TRANSLATIONS, decompose_only_if_needed
from trimtab.passes.neutral import exact_neutral_elements
from trimtab.passes.scopes import SCOPES
from trimtab.silence import errors_alone
from trimtab.weights import same_numbers

OPSET = 23
"""Keeps Attention and GroupNormalization whole: 1.7 times as fast as opset 20 on ONNX Runtime's CPU (SD 1.5)."""

_WRAPPED = "model"
"""The attribute under which every wrapper of `trimtab.export.modules` holds the user's model."""


@dataclass(frozen=True)
class Example:
    """An example input for tracing.

    Attributes:
        tensor: Values of the right dtype; the sizes only serve the trace.
        dims: A name for every axis whose size stays open, None for the others.
        multiples: Name of an open size -> what every size that is given will be a multiple of. Said, where sizes are
            halved, halves stay simple: torch.export finds no end among floors of floors.
    """

    tensor: torch.Tensor
    dims: tuple[str | None, ...] = ()
    multiples: Mapping[str, int] = field(default_factory=dict)


def trace(module: torch.nn.Module, inputs: Mapping[str, Example], outputs: Sequence[str]) -> ir.Model:
    """Exports a module as one ONNX graph of opset 23.

    Every node keeps the module path it came from (the wrapper's own prefix dropped), every initializer its
    parameter name (with ``.T`` behind where the exporter transposed it for a MatMul), and every open size the
    name given in ``inputs``; sizes that follow from them are expressions over those names. Weights are shared
    with the module's tensors, not copied.

    Args:
        module: In eval mode; takes the inputs by keyword.
        inputs: Name -> example.
        outputs: Names for the results, in order.

    Raises:
        ExportError: The exporter failed; the message holds its first line.
    """
    # One tensor behind two names is one input to torch.export: the graph would read the first in the place of both.
    assert len({id(example.tensor) for example in inputs.values()}) == len(inputs)
    units: dict[str, Any] = {}
    dynamic = {name: _open_sizes(example, units) for name, example in inputs.items()}
    try:
        with (
            _quiet(),
            _without_rules(),
            exact_neutral_elements(),
            _with_translations_read_once(),
            torch.no_grad(),
        ):
            # Traced here and not by the exporter, whose fallbacks would lose the module names.
            exported = torch.export.export(
                module.eval(),
                args=(),
                kwargs={name: example.tensor for name, example in inputs.items()},
                dynamic_shapes=dynamic,
                strict=False,
            )
            decompose_only_if_needed(exported)
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                output_names=list(outputs),
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever went wrong in types of its own
        raise ExportError(
            f"torch could not export {type(module).__name__}: {first_line(error.__cause__ or error)}; run with --debug "
            "for the whole story"
        ) from error
    assert program is not None
    model = program.model
    _drop_idle_squeezes(model.graph)
    _name_sizes(model.graph, inputs)
    _restore_names(model)
    _name_transposed(model.graph, module)
    return model


def _open_sizes(example: Example, units: dict[str, Any]) -> dict[int, Any]:
    """Axis -> what torch.export takes for its size; ``units`` keeps what sizes of one name are multiples of."""
    sizes: dict[int, Any] = {}
    for axis, dim in enumerate(example.dims):
        if dim and (multiple := example.multiples.get(dim, 1)) > 1:
            sizes[axis] = multiple * units.setdefault(dim, torch.export.Dim(f"{dim}_unit"))
        elif dim:
            sizes[axis] = torch.export.Dim.DYNAMIC
    return sizes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's chatter about packages that it would like to have."""
    # It logs the traceback of what fails, which becomes an ExportError of one line.
    fake = logging.getLogger("torch._subclasses.fake_tensor")
    fake.addFilter(_nothing)
    try:
        with errors_alone("torch.onnx", "torch.export", "onnxscript", "onnx_ir"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        fake.removeFilter(_nothing)


@contextlib.contextmanager
def _without_rules() -> Iterator[None]:
    """Has the exporter leave out two rules of its rewriter.

    One looks for two Slices that one Split would do for, and walks the whole graph for each node to find the second of
    them: the square of the nodes, and three quarters of its time on a U-Net of four million parameters. The other makes
    RotaryEmbedding of positions that all rows share, as language models have them; the operator wants one for each.
    """
    rules = [slice_split_rule, *rotary_embedding_rules]
    for rule in rules:
        rule.try_rewrite = lambda *_, **__: None
    try:
        yield
    finally:
        for rule in rules:
            del rule.try_rewrite  # the method of its class is back


_read_translation = functools.cache(TracedOnnxFunction.function_ir.fget)


@contextlib.contextmanager
def _with_translations_read_once() -> Iterator[None]:
    """Has onnxscript parse the sources of its 500 translations for the first graph, and not for each anew.

    The exporter asks every translation for its domain whenever it starts: most of what a small graph takes.
    """
    original = TracedOnnxFunction.function_ir
    TracedOnnxFunction.function_ir = property(_read_translation)
    try:
        yield
    finally:
        TracedOnnxFunction.function_ir = original


def _nothing(_: logging.LogRecord) -> bool:
    return False


def _drop_idle_squeezes(graph: ir.Graph) -> None:
    """Removes every Squeeze of an axis that is not 1: to torch it does nothing, in ONNX it is an error."""
    for node in list(graph):
        if node.op_type != "Squeeze" or len(node.inputs) < 2 or node.inputs[1] is None:
            continue
        source, axes = node.inputs[0], ir.convenience.get_const_tensor(node.inputs[1])
        if source is None or source.shape is None or axes is None:
            continue
        if all(source.shape[int(axis)] != 1 for axis in axes.numpy().reshape(-1)):
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            graph.remove(node, safe=True)


def _name_sizes(graph: ir.Graph, inputs: Mapping[str, Example]) -> None:
    """Gives torch's symbols (s53) the names that the caller chose, in every shape of the graph."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        example, shape = inputs[value.name or ""], value.shape or ir.Shape(())
        for axis, (size, name) in enumerate(zip(shape, example.dims, strict=False)):
            if not name or not isinstance(size, ir.SymbolicDim) or not size.value:
                continue
            if (multiple := example.multiples.get(name, 1)) > 1:
                names.setdefault(size.value.removeprefix(f"{multiple}*"), f"({name}//{multiple})")
                shape[axis] = name
            else:
                names.setdefault(size.value, name)
    if not names:
        return
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")

    def renamed(shape: ir.Shape | None) -> ir.Shape | None:
        if shape is None:
            return None
        return ir.Shape(
            [d if isinstance(d, int) else symbol.sub(lambda m: names[m[1]], str(d.value)) for d in shape]
        )

    for value in graph.inputs:
        value.shape = renamed(value.shape)
    for node in graph:
        for value in node.outputs:
            value.shape = renamed(value.shape)


def _restore_names(model: ir.Model) -> None:
    """Drops the wrapper's prefix from module paths and parameters, and whatever else the exporter noted.

    Its stack traces hold the paths of the machine that ran it.
    """
    graph = model.graph
    graph.metadata_props.clear()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        kept = {}
        if scopes := node.metadata_props.get(SCOPES):
            paths = [_without_prefix(path) for path in ast.literal_eval(scopes)]
            # The wrapper and the model inside it now share the empty path.
            kept[SCOPES] = repr(paths[1:] if len(paths) > 1 and paths[1] == "" else paths)
        node.metadata_props.clear()
        node.metadata_props.update(kept)
    for value in list(graph.initializers.values()):
        name = value.name or ""
        if name.startswith(_WRAPPED + "."):
            value.name = _without_prefix(name)


def _name_transposed(graph: ir.Graph, module: torch.nn.Module) -> None:
    """Names the weights of linear layers, which the exporter transposes and gives names of its own.

    A weight trained in torch goes back by name, so a name must say which parameter it is, and how it lies.
    """
    parameters = {_without_prefix(name): value for name, value in module.named_parameters()}
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        if weight is None or weight.const_value is None or len(scopes) < 2:
            continue
        name = f"{scopes[-2]}.weight"
        parameter = parameters.get(name)
        if parameter is None or weight.name in (name, f"{name}.T") or not weight.is_initializer():
            continue
        if same_numbers(weight.const_value.numpy(), parameter.detach().T.numpy()):
            weight.name = f"{name}.T"


def _without_prefix(path: str) -> str:
    if path == _WRAPPED:
        return ""
    return path.removeprefix(_WRAPPED + ".")
