"""Kernels that depend on the time step alone are mixed while compiling: every step then calls plain layers.

A mixture in the graph (`trimtab.passes.experts`, or any model's own) would be mixed again in every step, and a
backend that finds a computed kernel cannot prepare it. A program knows every time step beforehand; so there is one
denoiser for all steps that come to the same kernels, and steps say which they call. Equal weights stand once on disk.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from trimtab.passes.calls import calls_in_steps, map_steps
from trimtab.passes.constants import add_constant
from trimtab.passes.operators import has_graph
from trimtab.passes.reference import Array, Reference
from trimtab.program import DENOISER, Call, PassEntry, Program, Segment, Step
from trimtab.weights import fingerprint

logger = logging.getLogger(__name__)

_KERNELS = {"Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (1, 2), "MatMul": (1,)}
"""Operators with their inputs that are weights and biases."""


def mix_kernels(program: Program) -> Program:
    """Gives every step a denoiser whose kernels are constants.

    Exact: a kernel is what the graph itself computes from the step's constants, by onnx's reference.

    Args:
        program: Its graphs are edited. Kernels that read what is no constant of the steps stay as they are.

    Returns:
        A program with the further segments ``NAME-mix2``, ``NAME-mix3``, ... where steps differ in their kernels.
    """
    for name in [name for name in program.segments if name.startswith(DENOISER)]:
        mixtures = _Mixtures(program, name)
        if mixtures.kernels or mixtures.refused:
            program = mixtures.mixed()
    return program


class _Mixtures:
    """The kernels of one denoiser that are computed from what has the same value at every run of a step."""

    def __init__(self, program: Program, name: str) -> None:
        self._program, self._name = program, name
        self._graph = program.segments[name].model.graph
        # Scalars and vectors: whatever is larger is an activation, whose sizes may be fixed too.
        fixed = [
            v
            for v in self._graph.inputs
            if v.shape is not None and v.shape.is_static() and v.shape.rank() <= 1
        ]
        depends: dict[ir.Value, frozenset[ir.Value]] = {value: frozenset({value}) for value in fixed}
        for node in self._graph:
            read = [v for v in node.inputs if v is not None and v.const_value is None]
            if all(v in depends for v in read) and not has_graph(node):
                above = frozenset[ir.Value]().union(*(depends[v] for v in read))
                depends.update(dict.fromkeys(node.outputs, above))
        known = self._known(fixed)
        found = dict.fromkeys(
            value
            for node in self._graph
            for index in _KERNELS.get(node.op_type, ())
            if index < len(node.inputs) and (value := node.inputs[index]) is not None and depends.get(value)
        )
        self.kernels = [value for value in found if depends[value] <= known]
        self.refused = [value for value in found if not depends[value] <= known]
        for value in self.refused:
            open_inputs = ", ".join(sorted(str(v.name) for v in depends[value] - known))
            logger.warning(
                "%s is mixed at every run: %s is no constant of the steps", value.name, open_inputs
            )
        self._inputs = sorted({str(v.name) for kernel in self.kernels for v in depends[kernel]})
        self._reference = Reference(self._graph, self.kernels)

    def _known(self, inputs: Iterable[ir.Value]) -> frozenset[ir.Value]:
        """The graph's inputs that are a constant of every step."""
        left = {str(value.name): value for value in inputs}
        for step, call in self._calls():
            left = {name: value for name, value in left.items() if call.inputs.get(name) in step.constants}
        return frozenset(left.values())

    def _calls(self) -> Iterable[tuple[Step, Call]]:
        return ((step, call) for step, call in calls_in_steps(self._program) if call.segment == self._name)

    def _key(self, step: Step, call: Call) -> tuple[tuple[float, ...], ...]:
        return tuple(step.constants[call.inputs[name]] for name in self._inputs)

    def mixed(self) -> Program:
        """The program with a denoiser for every set of kernels."""
        program = self._program
        segments: dict[str, Segment] = {}
        by_digest: dict[str, str] = {}
        digests: dict[tuple[int, ...], str] = {}
        chosen: dict[tuple[tuple[float, ...], ...], str] = {}
        for key in dict.fromkeys(self._key(step, call) for step, call in self._calls() if self.kernels):
            computed = self._reference.values(dict(zip(self._inputs, key, strict=True)))
            arrays = dict(zip((str(kernel.name) for kernel in self.kernels), computed, strict=True))
            ones = tuple(map(id, arrays.values()))
            if ones not in digests:
                digests[ones] = fingerprint(sorted(arrays.items()))
            digest = digests[ones]
            if digest not in by_digest:
                taken = (program.segments.keys() - {self._name}) | segments.keys()
                name, number = self._name, 1
                while name in taken:
                    number += 1
                    name = f"{self._name}-mix{number}"
                by_digest[digest] = name
                segments[name] = Segment(name, _with_kernels(program.segments[self._name].model, arrays))
            chosen[key] = by_digest[digest]

        def changed(step: Step) -> Step:
            calls = tuple(
                dataclasses.replace(call, segment=chosen[self._key(step, call)])
                if call.segment == self._name and self.kernels
                else call
                for call in step.calls
            )
            return dataclasses.replace(step, calls=calls)

        entry = PassEntry("MixKernels", self._name, len(self.kernels), len(self.refused))
        order = {
            name: segment
            for old in program.segments
            for name, segment in (
                segments.items() if old == self._name and segments else [(old, program.segments[old])]
            )
        }
        return dataclasses.replace(
            program,
            segments=order,
            tasks=map_steps(program.tasks, changed),
            passes=(*program.passes, entry),
        )


def _with_kernels(model: ir.Model, arrays: Mapping[str, Array]) -> ir.Model:
    """A copy whose kernels are these constants."""
    copy = model.clone()
    values = {str(v.name): v for node in copy.graph for v in node.outputs}
    for name, array in arrays.items():
        computed = values[name]
        computed.name = f"{name}.computed"
        kernel = add_constant(copy.graph, name, np.ascontiguousarray(array))
        ir.convenience.replace_all_uses_with(computed, kernel)
    common.RemoveUnusedNodesPass()(copy)
    return copy
