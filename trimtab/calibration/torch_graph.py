"""A denoiser's ONNX graph, run by torch with gradients: what is trained is the graph that ships.

So any removal can be trained without surgery on a model's classes, and weights go back by initializer name. Only
operators that the exporter's denoisers consist of are known; each follows https://onnx.ai/onnx/operators at opset 23.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from trimtab.errors import PassError

_LAYERS = (
    "Conv",
    "Gemm",
    "MatMul",
    "Add",
    "Gather",
    "GroupNormalization",
    "LayerNormalization",
    "RMSNormalization",
)
"""Readers of trained weights. Tables that others read (frequencies, position grids) are constants."""

_Inputs = Sequence[Tensor | None]
_Attributes = Mapping[str, Any]


class _Step(NamedTuple):
    """A node: its operator, and names of values."""

    operator: str
    attributes: _Attributes
    inputs: list[str | None]
    outputs: list[str]


class TorchGraph:
    """A graph whose weights are tensors of torch.

    Args:
        model: Not changed, and not needed afterwards. Float32.
        outputs: Names of values, of the graph's outputs or inside of it, that a call gives.
        device: Where weights and activations lie; sizes stay on the CPU.

    Attributes:
        weights: Initializer -> its trained tensor, float32, without gradients until somebody asks for them.

    Raises:
        PassError: An operator that is not known, by name; an output that is none.
    """

    def __init__(self, model: ir.Model, outputs: Sequence[str], device: str = "cpu") -> None:
        steps = [
            _Step(
                node.op_type,
                {name: a.value for name, a in node.attributes.items()} | {"outputs": len(node.outputs)},
                [None if v is None else str(v.name) for v in node.inputs],
                [str(v.name) for v in node.outputs],
            )
            for node in model.graph
        ]
        self._choose(steps, outputs, ())
        if unknown := sorted({step.operator for step in self._steps} - _OPERATORS.keys()):
            raise PassError(
                f"{', '.join(unknown)} cannot be run by torch here: only graphs of the exporter can be trained"
            )
        self._device = torch.device(device)
        used = {name for step in self._steps for name in step.inputs}
        self.weights: dict[str, Tensor] = {}
        self._constants: dict[str, Tensor] = {}
        for value in model.graph.initializers.values():
            if value.name not in used or value.const_value is None:
                continue
            tensor = torch.from_numpy(np.array(value.const_value.numpy()))
            trained = tensor.is_floating_point() and tensor.numel() > 1
            trained = trained and any(user.op_type in _LAYERS for user, _ in value.uses())
            place = self.weights if trained else self._constants
            place[str(value.name)] = tensor.to(self._device) if tensor.is_floating_point() else tensor

    def part(self, outputs: Sequence[str], given: Sequence[str] = ()) -> TorchGraph:
        """The same graph on the same weights, up to other values.

        Args:
            outputs: What a call gives: values on the way to this graph's outputs.
            given: Values that a call is handed, and that are not computed.

        Raises:
            PassError: An output that is none.
        """
        part = copy.copy(self)
        part._choose(self._steps, outputs, given)
        return part

    def __contains__(self, name: str) -> bool:
        """Whether it computes a value of this name on its way."""
        return any(name in step.outputs for step in self._steps)

    def _choose(self, steps: Sequence[_Step], outputs: Sequence[str], given: Sequence[str]) -> None:
        """Keeps the steps that the outputs need, in order, and notes which values nobody reads after each."""
        made = {name for step in steps for name in step.outputs}
        if missing := [name for name in outputs if name not in made]:
            raise PassError(f"the graph computes no {missing[0]}: name a value that it does")
        self._outputs = tuple(outputs)
        wanted = set(outputs) - set(given)
        seen, kept, last = set(outputs), list[_Step](), list[set[str]]()
        for step in reversed(steps):
            if wanted.isdisjoint(step.outputs):
                continue
            read = {name for name in step.inputs if name is not None}
            wanted |= read - set(given)
            # A value is let go after its last reader; torch keeps what gradients need.
            ends = (read | set(step.outputs)) & made - seen
            seen |= ends
            kept.append(step)
            last.append(ends)
        self._steps, self._last = kept[::-1], last[::-1]

    def __call__(
        self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Runs the graph.

        Args:
            inputs: Graph input, or value that is given -> tensor on the device; those that the outputs do not need
                may be missing.
            weights: In the place of `weights`.

        Returns:
            Output -> tensor.
        """
        values: dict[str, Tensor] = {**self._constants, **(weights or self.weights), **inputs}
        for step, last in zip(self._steps, self._last, strict=True):
            read = [None if name is None else values[name] for name in step.inputs]
            results = _OPERATORS[step.operator](read, step.attributes)
            made = (results,) if isinstance(results, Tensor) else results
            values.update(zip(step.outputs, made, strict=True))
            for name in last:
                values.pop(name, None)
        return {name: values[name] for name in self._outputs}


# ---- operators: (inputs, attributes) -> one tensor or several ----


def _integers(tensor: Tensor | None) -> list[int]:
    assert tensor is not None
    return [int(n) for n in tensor.reshape(-1).tolist()]


def _together(inputs: _Inputs) -> list[Tensor]:
    """Operands on one device: what was computed from sizes follows what was not."""
    tensors = [t for t in inputs if t is not None]
    device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
    return [t.to(device) for t in tensors]


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[_Inputs, _Attributes], Tensor]:
    return lambda inputs, _: function(*_together(inputs))


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[_Inputs, _Attributes], Tensor]:
    return lambda inputs, _: function(*_together(inputs))


def _divide(first: Tensor, second: Tensor) -> Tensor:
    if first.is_floating_point():
        return first / second
    return torch.div(first, second, rounding_mode="trunc")


def _reshape(inputs: _Inputs, attributes: _Attributes) -> Tensor:
    data = inputs[0]
    assert data is not None
    sizes = _integers(inputs[1])
    if not attributes.get("allowzero"):
        sizes = [data.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return data.reshape(sizes)


def _shape(inputs: _Inputs, attributes: _Attributes) -> Tensor:
    data = inputs[0]
    assert data is not None
    return torch.tensor(
        list(data.shape)[attributes.get("start", 0) : attributes.get("end")], dtype=torch.int64
    )


def _slice(inputs: _Inputs, _: _Attributes) -> Tensor:
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


def _squeeze(inputs: _Inputs, _: _Attributes) -> Tensor:
    data = inputs[0]
    assert data is not None
    if len(inputs) < 2 or inputs[1] is None:
        return data.squeeze()
    return data.squeeze([n % data.ndim for n in _integers(inputs[1])])


def _unsqueeze(inputs: _Inputs, _: _Attributes) -> Tensor:
    data, axes = inputs[0], _integers(inputs[1])
    assert data is not None
    rank = data.ndim + len(axes)
    for axis in sorted(n % rank for n in axes):
        data = data.unsqueeze(axis)
    return data


def _split(inputs: _Inputs, attributes: _Attributes) -> Sequence[Tensor]:
    data, axis = inputs[0], attributes.get("axis", 0)
    assert data is not None
    if len(inputs) > 1 and inputs[1] is not None:
        return torch.split(data, _integers(inputs[1]), axis)
    return torch.split(data, math.ceil(data.shape[axis] / attributes["outputs"]), axis)


def _gather(inputs: _Inputs, attributes: _Attributes) -> Tensor:
    data, indices = _together(inputs)
    axis = attributes.get("axis", 0) % data.ndim
    flat = (indices.reshape(-1) % data.shape[axis]).to(torch.int64)
    shape = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
    return data.index_select(axis, flat).reshape(shape)


def _expand(inputs: _Inputs, _: _Attributes) -> Tensor:
    data = inputs[0]
    assert data is not None
    sizes = _integers(inputs[1])
    rank = max(data.ndim, len(sizes))
    own, other = ([1] * (rank - len(n)) + list(n) for n in (data.shape, sizes))
    return data.expand([b if a == 1 else a for a, b in zip(own, other, strict=True)])


def _reduce_sum(inputs: _Inputs, attributes: _Attributes) -> Tensor:
    data = inputs[0]
    assert data is not None
    axes = _integers(inputs[1]) if len(inputs) > 1 else list(range(data.ndim))
    return data.sum(axes, keepdim=bool(attributes.get("keepdims", 1)))


def _range(inputs: _Inputs, _: _Attributes) -> Tensor:
    start, limit, delta = (t.item() for t in inputs if t is not None)
    assert inputs[0] is not None
    return torch.arange(start, limit, delta, dtype=inputs[0].dtype)


def _cast(inputs: _Inputs, attributes: _Attributes) -> Tensor:
    data = inputs[0]
    assert data is not None
    kind = ir.DataType(attributes["to"]).numpy()
    return data.to(torch.from_numpy(np.empty(0, kind)).dtype)


def _gemm(inputs: _Inputs, attributes: _Attributes) -> Tensor:
    first, second, *bias = _together(inputs)
    first = first.T if attributes.get("transA") else first
    second = second.T if attributes.get("transB") else second
    result: Tensor = attributes.get("alpha", 1.0) * (first @ second)
    return result + attributes.get("beta", 1.0) * bias[0] if bias else result


def _conv(inputs: _Inputs, attributes: _Attributes) -> Tensor:
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


def _group_norm(inputs: _Inputs, attributes: _Attributes) -> Tensor:
    data, scale, bias = _together(inputs)
    return functional.group_norm(data, attributes["num_groups"], scale, bias, attributes.get("epsilon", 1e-5))


def _layer_norm(inputs: _Inputs, attributes: _Attributes) -> Tensor:
    data, scale, *bias = _together(inputs)
    sizes = data.shape[attributes.get("axis", -1) % data.ndim :]
    scale, *bias = (t.expand(sizes) for t in (scale, *bias))
    return functional.layer_norm(
        data, sizes, scale, bias[0] if bias else None, attributes.get("epsilon", 1e-5)
    )


def _rms_norm(inputs: _Inputs, attributes: _Attributes) -> Tensor:
    data, scale = _together(inputs)
    axes = list(range(attributes.get("axis", -1) % data.ndim, data.ndim))
    square = data.float().square().mean(axes, keepdim=True)
    return (data * torch.rsqrt(square + attributes.get("epsilon", 1e-5))).to(data.dtype) * scale


def _attention(inputs: _Inputs, attributes: _Attributes) -> Tensor:
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


def _resize(inputs: _Inputs, attributes: _Attributes) -> Tensor:
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


def _pad(inputs: _Inputs, attributes: _Attributes) -> Tensor:
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


def _tile(inputs: _Inputs, _: _Attributes) -> Tensor:
    data = inputs[0]
    assert data is not None
    return data.repeat(_integers(inputs[1]))


def _gelu(inputs: _Inputs, attributes: _Attributes) -> Tensor:
    (data,) = _together(inputs)
    return functional.gelu(data, approximate=attributes.get("approximate", "none"))


_OPERATORS: Mapping[str, Callable[[_Inputs, _Attributes], Tensor | Sequence[Tensor]]] = {
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
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "RMSNormalization": _rms_norm,
    "Pad": _pad,
    "Range": _range,
    "ReduceSum": _reduce_sum,
    "Relu": _unary(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Sigmoid": _unary(torch.sigmoid),
    "Sin": _unary(torch.sin),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _binary(torch.sub),
    "Tanh": _unary(torch.tanh),
    "Tile": _tile,
    "Transpose": lambda inputs, attributes: _together(inputs)[0].permute(*attributes["perm"]),
    "Unsqueeze": _unsqueeze,
}
