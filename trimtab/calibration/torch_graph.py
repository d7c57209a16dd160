"""A denoiser's ONNX graph, run by torch with gradients: what is trained is the graph that ships.

So any removal can be trained without surgery on a model's classes, and weights go back by initializer name. Only
operators of `trimtab.calibration.torch_operators` are known.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from trimtab.calibration.torch_operators import OPERATORS, Attributes
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


class _Step(NamedTuple):
    """A node: its operator, and names of values."""

    operator: str
    attributes: Attributes
    inputs: list[str | None]
    outputs: list[str]


def check_operators(model: ir.Model, outputs: Sequence[str]) -> None:
    """Whether torch can compute values of a graph, before any weight is read.

    Raises:
        PassError: An operator that is not known, by name; an output that is none.
    """
    needed, _ = _needed(_steps(model), outputs, ())
    _check_known(needed)


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
        self._choose(_steps(model), outputs, ())
        _check_known(self._steps)
        self._device = torch.device(device)
        used = {name for step in self._steps for name in step.inputs}
        self.weights: dict[str, Tensor] = {}
        self._constants: dict[str, Tensor] = {}
        for value in model.graph.initializers.values():
            if value.name not in used or value.const_value is None:
                continue
            tensor = torch.from_numpy(np.array(value.const_value.numpy()))
            # A norm without weights has ones for them in ONNX, the same for all: they are nobody's parameters.
            trained = tensor.is_floating_point() and tensor.numel() > 1 and not bool((tensor == 1).all())
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
        """Keeps the steps that the outputs need."""
        self._outputs = tuple(outputs)
        self._steps, self._last = _needed(steps, outputs, given)

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
            results = OPERATORS[step.operator](read, step.attributes)
            made = (results,) if isinstance(results, Tensor) else results
            values.update(zip(step.outputs, made, strict=True))
            for name in last:
                values.pop(name, None)
        return {name: values[name] for name in self._outputs}


def _steps(model: ir.Model) -> list[_Step]:
    return [
        _Step(
            node.op_type,
            {name: a.value for name, a in node.attributes.items()} | {"outputs": len(node.outputs)},
            [None if v is None else str(v.name) for v in node.inputs],
            [str(v.name) for v in node.outputs],
        )
        for node in model.graph
    ]


def _check_known(steps: Sequence[_Step]) -> None:
    if unknown := sorted({step.operator for step in steps} - OPERATORS.keys()):
        raise PassError(
            f"{', '.join(unknown)} cannot be run by torch here: only graphs of the exporter can be trained"
        )


def _needed(
    steps: Sequence[_Step], outputs: Sequence[str], given: Sequence[str]
) -> tuple[list[_Step], list[set[str]]]:
    """The steps on the way to some outputs, in order, and the values that nobody reads after each."""
    made = {name for step in steps for name in step.outputs}
    if missing := [name for name in outputs if name not in made]:
        raise PassError(f"the graph computes no {missing[0]}: name a value that it does")
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
    return kept[::-1], last[::-1]
