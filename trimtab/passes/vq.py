"""Packs weights: MatMul, Gemm and Conv read codes and a codebook in the place of numbers. docs/vq.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimtab.errors import PassError
from trimtab.passes import vq_op
from trimtab.passes.base import Pass, PassResult, Refusal
from trimtab.passes.codebooks import Codebooks, PackedWeight
from trimtab.passes.constants import add_constant
from trimtab.program import DENOISER, PassEntry, Program, Segment

_READERS = frozenset(("MatMul", "Gemm", "Conv"))
"""Operators whose second input is the weight."""


@dataclass(frozen=True)
class Site:
    """A weight that could be packed.

    Attributes:
        name: The initializer's.
        value: The initializer.
        inputs_first: It lies as (I, O), as a MatMul reads it.
    """

    name: str
    value: ir.Value
    inputs_first: bool

    @property
    def module(self) -> str:
        """The module that the parameter belongs to, or the whole name where it follows no convention."""
        return self.name.removesuffix(".T").removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, ...]:
        """With the output channels first: (O, I) or (O, I / group, *kernel)."""
        assert self.value.const_value is not None
        shape = tuple(self.value.const_value.shape.numpy())
        return shape[::-1] if self.inputs_first else shape

    def rows(self) -> npt.NDArray[Any]:
        """The weight's numbers as rows (O, n), the input channels innermost."""
        assert self.value.const_value is not None
        array = self.value.const_value.numpy()
        return vq_op.to_rows(array.T if self.inputs_first else array)

    def laid_out(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rows as the graph reads them: undoes `rows`."""
        weight = vq_op.from_rows(rows, self.shape)
        return np.ascontiguousarray(weight.T if self.inputs_first else weight)


def sites(model: ir.Model) -> Iterator[Site]:
    """The weights of a graph that only MatMul, Gemm and Conv read, as their weight.

    A MatMul's must be a matrix: a stack of them, as of experts, has no output channel that comes first.
    """
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2:
            continue
        uses = list(value.uses())
        fits = bool(uses) and all(
            node.op_type in _READERS
            and index == 1
            and node.domain == ""
            and node.graph is model.graph
            and (node.op_type == "Conv" or len(tensor.shape) == 2)
            for node, index in uses
        )
        if fits and not value.is_graph_output():
            yield Site(name, value, _reads_inputs_first(uses[0][0]))


class PackWeights(Pass):
    """Replaces weights by `trimtab::VQDequantize` of their codes.

    The graph then computes what it would with the decoded weights, bit for bit on a backend whose products do not
    depend on where a weight comes from. One weight that several nodes read is packed once. A second run finds
    nothing left to do.

    Args:
        codebooks: From `trimtab.calibration`.
    """

    def __init__(self, codebooks: Codebooks) -> None:
        self.codebooks = codebooks

    def call(self, model: ir.Model) -> PassResult:
        """Packs the weights that the codebooks name.

        Raises:
            PassError: A weight has another shape than its codes.
        """
        applied, refused = [], []
        for site in list(sites(model)):
            packed = self.codebooks.layers.get(site.name)
            if packed is not None:
                _pack(model, site, packed)
                applied.append(site.name)
            elif site.name in self.codebooks.kept:
                refused.append(Refusal(site.name, self.codebooks.kept[site.name]))
        if applied:
            _add_functions(model)
            for name, array in self.codebooks.parameters.items():
                if name in model.graph.initializers:
                    model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
        return PassResult(model, bool(applied), tuple(applied), tuple(refused))


def pack_weights(program: Program, codebooks: Codebooks) -> Program:
    """Packs the weights of every segment of the denoiser."""
    segments, entries = dict(program.segments), list(program.passes)
    for name, segment in program.segments.items():
        if name.startswith(DENOISER):
            result = PackWeights(codebooks.of(name))(segment.model)
            segments[name] = Segment(name, result.model)
            entries.append(PassEntry("PackWeights", name, len(result.applied), len(result.refused)))
    return dataclasses.replace(program, segments=segments, passes=tuple(entries))


def _reads_inputs_first(node: ir.Node) -> bool:
    """Whether a node reads its weight as (I, O)."""
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not node.attributes.get_int("transB", 0))


def _pack(model: ir.Model, site: Site, packed: PackedWeight) -> None:
    shape = site.shape
    columns = int(np.prod(shape[1:]))
    if packed.codes.shape[0] != shape[0] or packed.columns != columns:
        raise PassError(
            f"{site.name} is {shape} and its codes are for {packed.codes.shape[0]} rows of {packed.columns}: "
            "make the codebooks again from this model"
        )
    graph, users = model.graph, [node for node, _ in site.value.uses()]
    codes = add_constant(graph, f"{site.name}.codes", packed.codes)
    codebook = add_constant(graph, f"{site.name}.codebook", packed.codebook)
    scale = None if packed.scale is None else add_constant(graph, f"{site.name}.scale", packed.scale)
    # Where the kernel is one position, the order of the axes does not matter, and nothing need be turned.
    kernel = shape[2:]
    turned = bool(kernel) and int(np.prod(kernel)) > 1
    decoded = vq_op.node(
        codes,
        codebook,
        scale,
        shape=(shape[0], *kernel, shape[1]) if turned else shape,
        index_bits=packed.index_bits,
        name=f"{site.name}.decoded",
    )
    first = next(node for node in graph if node in set(users))
    new = [decoded]
    if turned:
        axes = len(shape)
        new.append(_transposed(decoded.outputs[0], (0, axes - 1, *range(1, axes - 1)), f"{site.name}.turned"))
    elif site.inputs_first:
        new.append(_transposed(decoded.outputs[0], (1, 0), f"{site.name}.turned"))
    for node in users:
        node.replace_input_with(1, new[-1].outputs[0])
    for node in new:
        node.metadata_props.update(first.metadata_props)
    graph.insert_before(first, new)
    del graph.initializers[site.name]


def _transposed(value: ir.Value, perm: tuple[int, ...], name: str) -> ir.Node:
    node = ir.node("Transpose", [value], {"perm": list(perm)}, name=name)
    assert value.shape is not None
    node.outputs[0].name = name
    node.outputs[0].shape = ir.Shape([value.shape[axis] for axis in perm])
    node.outputs[0].type = value.type
    return node


def _add_functions(model: ir.Model) -> None:
    """Adds the bodies of all overloads that the graph's nodes name."""
    model.opset_imports[vq_op.DOMAIN] = vq_op.VERSION
    for node in model.graph:
        identifier = (vq_op.DOMAIN, vq_op.NAME, node.overload)
        if vq_op.is_packed(node) and identifier not in model.functions:
            model.functions[identifier] = vq_op.function(node.overload, model.opset_imports[""])
