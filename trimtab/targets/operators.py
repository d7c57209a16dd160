"""What the ONNX parsers of TensorRT take: operators, opsets, and the forms in which they take them.

From the parser's own documents, https://github.com/onnx/onnx-tensorrt: docs/operators.md of 8.5 and of 10.15, and
docs/Changelog.md for what came in between. Where a document does not say when an operator came, the table has it from
the first version whose document lists it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

Version = tuple[int, int]

OLDEST_TENSORRT: Version = (10, 3)
"""JetPack 6.2's."""

_BASE = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip Concat
Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace DequantizeLinear Div Dropout Einsum
Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool
GlobalMaxPool Greater GreaterOrEqual GridSample HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf
IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max
MaxPool Mean MeanVarianceNormalization Min Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow
QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2
ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
ReverseSequence RoiAlign Round Scan ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax
Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze
Upsample Where Xor
"""
"""8.5's table, with IsInf and LayerNormalization (8.6), Hardmax (9.2) and DeformConv (10.1). GroupNormalization, too,
came with 8.6, but in its form before opset 21, which trimtab's graphs do not have."""

_ADDED: Mapping[Version, str] = {
    (10, 4): "BlackmanWindow HammingWindow HannWindow",
    (10, 5): "STFT",
    (10, 9): "GroupNormalization",
    (10, 14): "Attention",
    (10, 15): "RMSNormalization RotaryEmbedding TensorScatter CastLike Gelu Mish",
}

_OPSETS: Mapping[Version, int] = {(10, 0): 19, (10, 6): 22, (10, 11): 23, (10, 15): 24, (11, 0): 25}
"""Of the ONNX version that the parser was made with: at least 1.14 from 9.0 on, 1.17 from 10.6, 1.18 from 10.11; 24 and
25 are said by 10.15's table and by https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/onnx-opset-guide.html"""

IR_VERSIONS: Mapping[int, int] = {19: 9, 22: 10, 23: 11, 24: 12, 25: 13}
"""Opset -> ONNX's IR version of the time: https://github.com/onnx/onnx/blob/main/docs/Versioning.md"""


PLUGINS = (("trimtab", "TrimtabVQMatMul1"), ("trimtab", "TrimtabVQDecode1"))
"""Of trimtab.targets.plugins, for TensorRT from 10.3 on; TensorRT for RTX takes none."""


@dataclass(frozen=True)
class Parser:
    """What one parser takes.

    Attributes:
        name: For messages.
        version: Of TensorRT.
        opset: The newest that it knows.
        operators: What it takes in the form of the newest opset that trimtab writes.
        plugins: Domain and name of the operators that trimtab's own plugins serve.
    """

    name: str
    version: Version
    opset: int
    operators: frozenset[str]
    plugins: frozenset[tuple[str, str]] = frozenset()

    def refuses(self, node: ir.Node) -> str | None:
        """Why the parser cannot take a node, in a few words; None where it can."""
        if (node.domain, node.op_type) in self.plugins:
            return None
        if node.domain != "":
            return "is of a domain that it has no importer for"
        if node.op_type not in self.operators:
            return "is not among its operators"
        form = _FORMS.get(node.op_type)
        return None if form is None else form(node, self)


def tensorrt_parser(version: Version) -> Parser:
    """The parser that comes with a version of TensorRT, 10.3 or later."""
    operators = set(_BASE.split())
    for since, names in _ADDED.items():
        if version >= since:
            operators |= set(names.split())
    opset = max(opset for since, opset in _OPSETS.items() if version >= since)
    name = f"TensorRT {version[0]}.{version[1]}"
    return Parser(name, version, opset, frozenset(operators), frozenset(PLUGINS))


def _attention(node: ir.Node, parser: Parser) -> str | None:
    if any(value is not None for value in node.inputs[4:]) or len(node.outputs) > 1:
        return "keeps keys and values from call to call"
    if (cap := node.attributes.get("softcap")) is not None and cap.value:
        return "has a softcap"
    if any(v is not None and (v.shape is None or len(v.shape) != 4) for v in node.inputs[:4]):
        return "has inputs that are not four-dimensional"
    # TensorRT for RTX 1.7 takes the casts for needless, computes the scores in FP16, and fails at a mask in FP32.
    if len(node.inputs) > 3 and node.inputs[3] is not None and any(map(_is_cast_up, node.inputs[:3])):
        return "has a mask, and reads what is wider than it was computed"
    return None


def _is_cast_up(value: ir.Value | None) -> bool:
    maker = None if value is None else value.producer()
    if value is None or maker is None or maker.op_type != "Cast" or maker.inputs[0] is None:
        return False
    before, after = maker.inputs[0].dtype, value.dtype
    return before is not None and after is not None and before.bitwidth < after.bitwidth


def _einsum(node: ir.Node, parser: Parser) -> str | None:
    equation = node.attributes["equation"].as_string()
    return "has an ellipsis" if "..." in equation and parser.version < (10, 12) else None


def _one_output(node: ir.Node, parser: Parser) -> str | None:
    return "has more than one output" if len(node.outputs) > 1 else None


def _newer_form(since: int) -> Callable[[ir.Node, Parser], str | None]:
    return lambda node, parser: f"has the form of opset {since}" if parser.opset < since else None


def _quantization(node: ir.Node, parser: Parser) -> str | None:
    newer = {"block_size", "output_dtype"} & node.attributes.keys()
    return f"has the attribute {min(newer)} of opset 21" if newer and parser.opset < 21 else None


_FORMS: Mapping[str, Callable[[ir.Node, Parser], str | None]] = {
    "Attention": _attention,
    "Einsum": _einsum,
    "LayerNormalization": _one_output,
    "MaxPool": _one_output,
    "GridSample": _newer_form(20),
    "QuantizeLinear": _quantization,
    "DequantizeLinear": _quantization,
}
"""Operator -> what is wrong with a node of it, beyond what the table of operators says."""

RTX = Parser("TensorRT for RTX", (10, 15), 24, tensorrt_parser((10, 15)).operators - {"DeformConv"})
"""Of TensorRT for RTX 1.x, which has no plugins; DeformConv is one. The parser itself is asked for every operator as
well, before it reads a graph: on a custom operator it ends the process."""
