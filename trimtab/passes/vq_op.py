"""The operator trimtab::VQDequantize: what it means in numpy, and as an ONNX function of standard operators.

    VQDequantize(codes, codebook[, scale]) -> W

A weight is seen as rows, one an output channel, and every row is cut into sub-vectors of d neighbours along the
input channels. ``codes`` holds the index of each sub-vector's codeword, ``codebook`` (k, d) the codewords, ``scale``
(O,) a factor for every row. The row of a convolution (O, I / group, kh, kw) is its kernel positions one after another,
each with all its input channels: (kh, kw, I / group), so that neighbours are input channels there too. Where a row's
length is no multiple of d, its end is padded with zeros that are cut off again.

Attribute ``shape`` is W's, with the output channels first: (O, I), or (O, kh, kw, I / group); the graph turns W to
what the node wants with a Transpose. Attribute ``index_bits`` is 8 for codes (O, S) uint8, one a byte, or 6 for
codes (O, 3 * ceil(S / 4)) uint8: four codes in three bytes, little-endian, the first code in the lowest bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimtab.manifest import OPERATORS, OPERATORS_DOMAIN

DOMAIN = OPERATORS_DOMAIN
NAME = "VQDequantize"
VERSION = OPERATORS

SIX_BIT_OPSET = 18
"""The first with operators on bits, which codes of six bits are taken apart by."""

_INT32 = ir.DataType.INT32.value

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def to_rows(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A weight (O, I) or (O, I / group, *kernel) as rows (O, n), the input channels innermost."""
    return np.moveaxis(weight, 1, -1).reshape(weight.shape[0], -1)


def from_rows(rows: npt.NDArray[Any], shape: Sequence[int]) -> npt.NDArray[Any]:
    """The weight of a torch shape, (O, I) or (O, I / group, *kernel), from its rows: undoes `to_rows`."""
    return np.moveaxis(rows.reshape(shape[0], *shape[2:], shape[1]), -1, 1)


def cut(rows: npt.NDArray[Any], d: int) -> npt.NDArray[Any]:
    """Rows (O, n) as sub-vectors (O, ceil(n / d), d), the last of a row padded with zeros."""
    count = -(-rows.shape[1] // d)
    padded = np.pad(rows, ((0, 0), (0, count * d - rows.shape[1])))
    return padded.reshape(rows.shape[0], count, d)


def pack_indices(codes: Codes, index_bits: int) -> Codes:
    """Codes (O, S), one a byte, as the operator stores them.

    Args:
        codes: Below ``2**index_bits``.
        index_bits: 8 or 6.

    Returns:
        (O, S), or (O, 3 * ceil(S / 4)) for six bits.
    """
    if index_bits == 8:
        return codes
    groups = cut(codes, 4).astype(np.uint32)
    words = (groups << np.arange(0, 24, 6, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    parts = (words[..., None] >> np.arange(0, 24, 8, dtype=np.uint32)) & 255
    return np.ascontiguousarray(parts.astype(np.uint8).reshape(codes.shape[0], -1))


def unpack_indices(packed: Codes, index_bits: int) -> Codes:
    """What `pack_indices` packed: (O, S), with S rounded up to a multiple of 4 for six bits."""
    if index_bits == 8:
        return packed
    parts = packed.reshape(packed.shape[0], -1, 3).astype(np.uint32)
    words = (parts << np.arange(0, 24, 8, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    codes: Codes = ((words[..., None] >> np.arange(0, 24, 6, dtype=np.uint32)) & 63).astype(np.uint8)
    return codes.reshape(packed.shape[0], -1)


def decode(
    packed: Codes, codebook: Floats, scale: Floats | None, columns: int, index_bits: int = 8
) -> Floats:
    """What the operator computes, before it is given W's shape: rows (O, columns) float32. Exact."""
    codes = unpack_indices(packed, index_bits)
    rows = codebook[codes].reshape(len(codes), -1)[:, :columns]
    return np.ascontiguousarray(rows if scale is None else rows * scale[:, None])


def decoded(packed: ir.Node) -> Floats:
    """W of a node of the operator whose inputs are constants, in the shape that it says. Exact."""
    codes, codebook, *scale = (
        v.const_value.numpy() for v in packed.inputs if v is not None and v.const_value
    )
    shape = packed.attributes["shape"].as_ints()
    bits = packed.attributes["index_bits"].as_int()
    rows = decode(codes, codebook, scale[0] if scale else None, math.prod(shape[1:]), bits)
    return rows.reshape(shape)


def node(
    codes: ir.Value,
    codebook: ir.Value,
    scale: ir.Value | None,
    *,
    shape: Sequence[int],
    index_bits: int,
    name: str,
) -> ir.Node:
    """A node of the operator. Its overload names the function in `function` that is its body.

    Args:
        codes: (O, S), or (O, 3 * ceil(S / 4)) for six bits, uint8.
        codebook: (k, d).
        scale: (O,), or None.
        shape: W's, output channels first: (O, I) or (O, kh, kw, I / group).
        index_bits: 8 or 6.
        name: Of W.
    """
    assert codes.const_value is not None and codebook.const_value is not None
    stored, d = codes.const_value.shape.numpy()[1], codebook.const_value.shape.numpy()[1]
    count = stored * 4 // 3 if index_bits == 6 else stored
    cuts = count * d != math.prod(shape[1:])
    made = ir.node(
        NAME,
        [codes, codebook] if scale is None else [codes, codebook, scale],
        {"shape": list(shape), "index_bits": index_bits},
        domain=DOMAIN,
        overload=_overload(index_bits, scale is not None, cuts),
        name=name,
    )
    made.outputs[0].name = name
    made.outputs[0].shape = ir.Shape(shape)
    made.outputs[0].type = codebook.type
    return made


def is_packed(candidate: ir.Node) -> bool:
    """Whether a node is of this operator."""
    return candidate.domain == DOMAIN and candidate.op_type == NAME


def function(overload: str, opset: int) -> ir.Function:
    """The operator's body for nodes of this overload.

    An ONNX function cannot ask whether an input is there or how long a row is, so there is a body for each case: its
    name lists what it does beside the look-up, out of "index6", "scale" and "cut".

    Args:
        overload: Of the nodes.
        opset: The model's.
    """
    parts = set(overload.split("_"))
    # An attribute can reach a body only through a Constant.
    shape = ir.Attr("shape", ir.AttributeType.INTS, None)
    tape = _Tape()
    inputs = [ir.Value(name="codes"), ir.Value(name="codebook")]
    codes, codebook = inputs
    sizes = tape("Constant", [], value_ints=ir.RefAttr("value_ints", "shape", ir.AttributeType.INTS))
    codes = _unpacked(tape, codes) if "index6" in parts else tape("Cast", [codes], to=_INT32)
    # (O, S, d), and as few results as large as W as can be: constant folding keeps each, of all weights, until its end.
    rows = tape("Gather", [codebook, codes], axis=0)
    if "scale" in parts:
        inputs.append(ir.Value(name="scale"))
        rows = tape("Mul", [rows, tape("Reshape", [inputs[2], tape.ints(-1, 1, 1)])])
    if "cut" in parts:
        rows = tape("Reshape", [rows, tape.ints(0, -1)])
        row = tape("Slice", [sizes, tape.ints(1), tape.ints(2**31 - 1), tape.ints(0)])
        columns = tape("ReduceProd", [row], keepdims=1)
        rows = tape("Slice", [rows, tape.ints(0), columns, tape.ints(1)])
    weight = tape("Reshape", [rows, sizes])
    weight.name = "weight"
    graph = ir.Graph(inputs, [weight], nodes=tape.nodes, opset_imports={"": opset}, name=NAME)
    bits = ir.Attr("index_bits", ir.AttributeType.INT, None)
    return ir.Function(DOMAIN, NAME, overload, graph=graph, attributes=[shape, bits])


def _overload(index_bits: int, scaled: bool, cuts: bool) -> str:
    parts = (("index6", index_bits == 6), ("scale", scaled), ("cut", cuts))
    return "_".join(name for name, there in parts if there)


def _unpacked(tape: _Tape, packed: ir.Value) -> ir.Value:
    """Six-bit indices, (O, 3 * G) bytes -> (O, S) int32."""
    wide = tape("Cast", [packed], to=ir.DataType.UINT32.value)
    bytes_ = tape("Reshape", [wide, tape.ints(0, -1, 3)])
    first, second, third = tape.split(bytes_, 3, axis=2)
    word = tape(
        "BitwiseOr",
        [
            tape("BitwiseOr", [first, tape("BitShift", [second, tape.uints(8)], direction="LEFT")]),
            tape("BitShift", [third, tape.uints(16)], direction="LEFT"),
        ],
    )
    fields = tape("BitShift", [word, tape.uints(0, 6, 12, 18)], direction="RIGHT")
    codes = tape("Cast", [tape("BitwiseAnd", [fields, tape.uints(63)])], to=_INT32)
    return tape("Reshape", [codes, tape.ints(0, -1)])


class _Tape:
    """Nodes in order, each with the one result that the next ones read."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def __call__(self, op_type: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        made = ir.node(op_type, inputs, attributes)
        made.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(made)
        return made.outputs[0]

    def ints(self, *values: int) -> ir.Value:
        return self("Constant", [], value_ints=list(values))

    def uints(self, *values: int) -> ir.Value:
        return self("Constant", [], value=ir.tensor(np.array(values, np.uint32)))

    def split(self, value: ir.Value, parts: int, axis: int) -> Sequence[ir.Value]:
        made = ir.node("Split", [value], {"axis": axis, "num_outputs": parts}, num_outputs=parts)
        for index, output in enumerate(made.outputs):
            output.name = f"v{len(self.nodes)}_{index}"
        self.nodes.append(made)
        return made.outputs
