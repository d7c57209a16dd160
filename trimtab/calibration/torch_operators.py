"""ONNX's operators in torch, with gradients: those that the exporter's denoisers consist of.

Each follows https://onnx.ai/onnx/operators at opset 23.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from trimtab.errors import PassError

Inputs = Sequence[Tensor | None]

Attributes = Mapping[str, Any]
"""Of a node, and "outputs": how many it has."""


def _integers(tensor: Tensor | None) -> list[int]:
    assert tensor is not None
    return [int(n) for n in tensor.reshape(-1).tolist()]


def _together(inputs: Inputs) -> list[Tensor]:
    """Operands on one device: what was computed from sizes follows what was not."""
    tensors = [t for t in inputs if t is not None]
    device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
    return [t.to(device) for t in tensors]


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs, Attributes], Tensor]:
    return lambda inputs, _: function(*_together(inputs))


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Inputs, Attributes], Tensor]:
    return lambda inputs, _: function(*_together(inputs))


def _divide(first: Tensor, second: Tensor) -> Tensor:
    if first.is_floating_point():
        return first / second
    return torch.div(first, second, rounding_mode="trunc")


def _reshape(inputs: Inputs, attributes: Attributes) -> Tensor:
    data = inputs[0]
    assert data is not None
    sizes = _integers(inputs[1])
    if not attributes.get("allowzero"):
        sizes = [data.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return data.reshape(sizes)


def _shape(inputs: Inputs, attributes: Attributes) -> Tensor:
    data = inputs[0]
    assert data is not None
    return torch.tensor(
        list(data.shape)[attributes.get("start", 0) : attributes.get("end")], dtype=torch.int64
    )


def _slice(inputs: Inputs, _: Attributes) -> Tensor:
    data, starts, ends = inputs[0], _integers(inputs[1]), _integers(inputs[2])
    assert data is not None
    axes = _integers(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts)))
    steps = _integers(inputs[4]) if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    index = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 1:
            raise PassError(f"a Slice with the step {step} cannot be run by torch")
        index[axis] = slice(start, end, step)
    return data[tuple(index)]


def _squeeze(inputs: Inputs, _: Attributes) -> Tensor:
    data = inputs[0]
    assert data is not None
    if len(inputs) < 2 or inputs[1] is None:
        return data.squeeze()
    return data.squeeze([n % data.ndim for n in _integers(inputs[1])])


def _unsqueeze(inputs: Inputs, _: Attributes) -> Tensor:
    data, axes = inputs[0], _integers(inputs[1])
    assert data is not None
    rank = data.ndim + len(axes)
    for axis in sorted(n % rank for n in axes):
        data = data.unsqueeze(axis)
    return data


def _split(inputs: Inputs, attributes: Attributes) -> Sequence[Tensor]:
    data, axis = inputs[0], attributes.get("axis", 0)
    assert data is not None
    if len(inputs) > 1 and inputs[1] is not None:
        return torch.split(data, _integers(inputs[1]), axis)
    return torch.split(data, math.ceil(data.shape[axis] / attributes["outputs"]), axis)


def _gather(inputs: Inputs, attributes: Attributes) -> Tensor:
    data, indices = _together(inputs)
    axis = attributes.get("axis", 0) % data.ndim
    flat = (indices.reshape(-1) % data.shape[axis]).to(torch.int64)
    shape = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
    return data.index_select(axis, flat).reshape(shape)


def _expand(inputs: Inputs, _: Attributes) -> Tensor:
    data = inputs[0]
    assert data is not None
    sizes = _integers(inputs[1])
    rank = max(data.ndim, len(sizes))
    own, other = ([1] * (rank - len(n)) + list(n) for n in (data.shape, sizes))
    return data.expand([b if a == 1 else a for a, b in zip(own, other, strict=True)])


def _reduce(function: Callable[..., Tensor]) -> Callable[[Inputs, Attributes], Tensor]:
    def reduced(inputs: Inputs, attributes: Attributes) -> Tensor:
        data = inputs[0]
        assert data is not None
        axes = _integers(inputs[1]) if len(inputs) > 1 else list(range(data.ndim))
        return function(data, axes, keepdim=bool(attributes.get("keepdims", 1)))

    return reduced


def _mod(inputs: Inputs, attributes: Attributes) -> Tensor:
    """With the divisor's sign, or with the dividend's where ``fmod`` is set."""
    return (torch.fmod if attributes.get("fmod") else torch.remainder)(*_together(inputs))


def _range(inputs: Inputs, _: Attributes) -> Tensor:
    start, limit, delta = (t.item() for t in inputs if t is not None)
    assert inputs[0] is not None
    return torch.arange(start, limit, delta, dtype=inputs[0].dtype)


def _cast(inputs: Inputs, attributes: Attributes) -> Tensor:
    data = inputs[0]
    assert data is not None
    kind = ir.DataType(attributes["to"]).numpy()
    return data.to(torch.from_numpy(np.empty(0, kind)).dtype)


def _gemm(inputs: Inputs, attributes: Attributes) -> Tensor:
    first, second, *bias = _together(inputs)
    first = first.T if attributes.get("transA") else first
    second = second.T if attributes.get("transB") else second
    result: Tensor = attributes.get("alpha", 1.0) * (first @ second)
    return result + attributes.get("beta", 1.0) * bias[0] if bias else result


def _conv(inputs: Inputs, attributes: Attributes) -> Tensor:
    data, weight, *bias = _together(inputs)
    rank = data.ndim - 2
    if attributes.get("auto_pad", "NOTSET") != "NOTSET":
        raise PassError(f"a Conv with auto_pad {attributes['auto_pad']} cannot be run by torch")
    pads = list(attributes.get("pads", [0] * 2 * rank))
    if pads[:rank] != pads[rank:]:
        both = [n for axis in reversed(range(rank)) for n in (pads[axis], pads[axis + rank])]
        data, pads = functional.pad(data, both), [0] * rank
    return torch.convolution(
        data,
        weight,
        bias[0] if bias else None,
        list(attributes.get("strides", [1] * rank)),
        pads[:rank],
        list(attributes.get("dilations", [1] * rank)),
        False,
        [0] * rank,
        attributes.get("group", 1),
    )


def _group_norm(inputs: Inputs, attributes: Attributes) -> Tensor:
    data, scale, bias = _together(inputs)
    return functional.group_norm(data, attributes["num_groups"], scale, bias, attributes.get("epsilon", 1e-5))


def _layer_norm(inputs: Inputs, attributes: Attributes) -> Tensor:
    data, scale, *bias = _together(inputs)
    sizes = data.shape[attributes.get("axis", -1) % data.ndim :]
    scale, *bias = (t.expand(sizes) for t in (scale, *bias))
    return functional.layer_norm(
        data, sizes, scale, bias[0] if bias else None, attributes.get("epsilon", 1e-5)
    )


def _rms_norm(inputs: Inputs, attributes: Attributes) -> Tensor:
    data, scale = _together(inputs)
    axes = list(range(attributes.get("axis", -1) % data.ndim, data.ndim))
    square = data.float().square().mean(axes, keepdim=True)
    return (data * torch.rsqrt(square + attributes.get("epsilon", 1e-5))).to(data.dtype) * scale


def _attention(inputs: Inputs, attributes: Attributes) -> Tensor:
    query, key, value, *mask = _together(inputs)
    if attributes.get("softcap") or attributes["outputs"] != 1 or query.ndim != 4:
        raise PassError("an Attention with a soft cap, a cache or three axes cannot be run by torch")
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        mask[0] if mask else None,
        is_causal=bool(attributes.get("is_causal")),
        scale=attributes.get("scale"),
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _resize(inputs: Inputs, attributes: Attributes) -> Tensor:
    data = inputs[0]
    assert data is not None
    how = (
        attributes.get("mode"),
        attributes.get("coordinate_transformation_mode"),
        attributes.get("nearest_mode"),
    )
    if how != ("nearest", "asymmetric", "floor"):
        raise PassError(f"a Resize by {how} cannot be run by torch: only nearest, asymmetric, floor can")
    if len(inputs) > 3 and inputs[3] is not None:
        return functional.interpolate(data, _integers(inputs[3])[2:], mode="nearest")
    assert inputs[2] is not None
    sizes = [math.floor(n * f) for n, f in zip(data.shape, inputs[2].tolist(), strict=True)]
    return functional.interpolate(data, sizes[2:], mode="nearest")


def _pad(inputs: Inputs, attributes: Attributes) -> Tensor:
    data, amounts = inputs[0], _integers(inputs[1])
    assert data is not None
    mode = attributes.get("mode", "constant")
    if mode != "constant":
        raise PassError(f"a Pad by {mode} cannot be run by torch here: only constant can")
    value = inputs[2].item() if len(inputs) > 2 and inputs[2] is not None else 0.0
    axes = _integers(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else list(range(data.ndim))
    ends = {axis % data.ndim: (amounts[k], amounts[len(axes) + k]) for k, axis in enumerate(axes)}
    flat = [
        n for axis in reversed(range(data.ndim)) for n in ends.get(axis, (0, 0))
    ]  # torch: last axis first
    return functional.pad(data, flat, value=value)


def _tile(inputs: Inputs, _: Attributes) -> Tensor:
    data = inputs[0]
    assert data is not None
    return data.repeat(_integers(inputs[1]))


def _gelu(inputs: Inputs, attributes: Attributes) -> Tensor:
    (data,) = _together(inputs)
    return functional.gelu(data, approximate=attributes.get("approximate", "none"))


OPERATORS: Mapping[str, Callable[[Inputs, Attributes], Tensor | Sequence[Tensor]]] = {
    "Add": _binary(torch.add),
    "Attention": _attention,
    "Cast": _cast,
    "Concat": lambda inputs, attributes: torch.cat(_together(inputs), attributes["axis"]),
    "Conv": _conv,
    "Cos": _unary(torch.cos),
    "Div": _binary(_divide),
    "Einsum": lambda inputs, attributes: torch.einsum(attributes["equation"], *_together(inputs)),
    "Expand": _expand,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GroupNormalization": _group_norm,
    "Identity": _unary(lambda data: data),
    "LayerNormalization": _layer_norm,
    "MatMul": _binary(torch.matmul),
    "Mod": _mod,
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "RMSNormalization": _rms_norm,
    "Pad": _pad,
    "Pow": _binary(torch.pow),
    "Range": _range,
    "ReduceMax": _reduce(torch.amax),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _unary(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Sigmoid": _unary(torch.sigmoid),
    "Sin": _unary(torch.sin),
    "Slice": _slice,
    "Split": _split,
    "Sqrt": _unary(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _binary(torch.sub),
    "Tanh": _unary(torch.tanh),
    "Tile": _tile,
    "Transpose": lambda inputs, attributes: _together(inputs)[0].permute(*attributes["perm"]),
    "Unsqueeze": _unsqueeze,
}
"""Operator -> (inputs, attributes) -> one tensor or several."""
