"""Putting the sampler's update and the guidance combination at the end of the denoiser's graph.

After this pass one call of the engine is one whole evaluation of a table (`trimtab.export.sampler.table`): the
weights come in as small vectors, so one graph serves every scheduler, every number of steps, and runs with or
without classifier-free guidance.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from trimtab.passes.base import Pass, PassResult, Refusal
from trimtab.passes.constants import shared_constant
from trimtab.passes.scopes import SCOPES

SCOPE = "sampler"
"""The module path that the new nodes carry."""

ROWS_BATCH = "rows*batch"
"""What the first axis of the model's own inputs is called afterwards: "batch" alone is the state's."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_OPSET = 15  # Shape with a start attribute


class FuseSampler(Pass):
    """Make one evaluation of the sampler out of one evaluation of the denoiser.

    The graph must have the input ``sample`` and the output ``prediction``, both (rows * batch, *latent) with
    all negative rows first, as diffusers' ``cat([negative, positive])``. Both go, and these come instead, all
    float32:

        inputs   state (slots, batch, *latent), sample_weights (slots,), mix (rows,),
                 next_weights (slots + 1 [+ 1 clipped] [+ 1 noise],) ordered state, output, clipped, noise,
                 clip_weights (slots + 1,) with a clip range, noise (batch, *latent) with noise;
                 then the model's other inputs, their first axis renamed to "rows*batch"
        outputs  next_sample, model_output and, with a clip range, clipped: each (batch, *latent);
                 then the model's other outputs as they are

    ``model_output`` is ``sum_r mix[r] * prediction[r]``: [1] is no guidance, [1 - w, w] is classifier-free
    guidance of scale w (Ho and Salimans, https://arxiv.org/abs/2207.12598, eq. 6 with w = 1 + their w).

    Exact: the same sums as the table's, in float32 whatever the model's own precision. They are written as
    products and ReduceSum and not as MatMul, since TensorRT runs a float32 MatMul in TF32, whose 10 bits of
    mantissa are too few for coefficients up to about 100. Every slot of the state must be finite (zeros at
    the start), used or not: a weight of zero does not hide a NaN.

    Args:
        slots: First axis of the state.
        clip_range: Clip to [-clip_range, clip_range], or None where no table clips.
        noise: Whether any table adds noise.
        sample: The graph's input that is replaced.
        prediction: The graph's output that is replaced.
    """

    def __init__(
        self,
        slots: int,
        clip_range: float | None = None,
        noise: bool = False,
        sample: str = "sample",
        prediction: str = "prediction",
    ) -> None:
        self.slots = slots
        self.clip_range = clip_range
        self.noise = noise
        self.sample = sample
        self.prediction = prediction

    def call(self, model: ir.Model) -> PassResult:
        reason = self._reason_against(model)
        if reason is not None:
            return PassResult(model, False, refused=(Refusal(model.graph.name or "graph", reason),))
        sample = next(value for value in model.graph.inputs if value.name == self.sample)
        prediction = next(value for value in model.graph.outputs if value.name == self.prediction)
        self._make_way(model.graph)
        _rename_dim(model.graph, sample, ROWS_BATCH)
        _Fusion(self, model.graph, sample, prediction).run()
        return PassResult(model, True, applied=(SCOPE,))

    def _names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        clip, noise = self.clip_range is not None, self.noise
        inputs = (
            ("state", "sample_weights", "mix", "next_weights") + ("clip_weights",) * clip + ("noise",) * noise
        )
        return inputs, ("next_sample", "model_output") + ("clipped",) * clip

    def _reason_against(self, model: ir.Model) -> str | None:
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        outputs = {value.name: value for value in graph.outputs}
        if {"state", "sample_weights"} <= inputs.keys() and "next_sample" in outputs:
            return "the sampler is already fused into this graph"
        if self.sample not in inputs:
            return f"the graph has no input {self.sample!r}; its inputs are {', '.join(map(str, inputs))}"
        if self.prediction not in outputs:
            return (
                f"the graph has no output {self.prediction!r}; its outputs are {', '.join(map(str, outputs))}"
            )
        new_inputs, new_outputs = self._names()
        taken = (inputs.keys() | outputs.keys() | graph.initializers.keys()) & {*new_inputs, *new_outputs}
        if taken:
            return f"the graph already uses the names {', '.join(sorted(map(str, taken)))}; rename them"
        sample, prediction = inputs[self.sample], outputs[self.prediction]
        for value in (sample, prediction):
            if value.dtype not in _FLOATS:
                return f"{value.name} is {value.dtype} and a float type is needed"
        if sample.shape is None or sample.shape.rank() < 2:
            return f"{sample.name} needs a known rank of at least 2; its shape is {sample.shape}"
        if isinstance(sample.shape[0], int):
            return (
                f"the first axis of {sample.name} is fixed to {sample.shape[0]}; fuse before fixing the batch"
            )
        if prediction.shape is not None:
            if prediction.shape.rank() != sample.shape.rank():
                return f"{prediction.name} has the shape {prediction.shape} and {sample.name} {sample.shape}"
            for ours, theirs in zip(sample.shape, prediction.shape, strict=True):
                if isinstance(ours, int) and isinstance(theirs, int) and ours != theirs:
                    return (
                        f"{prediction.name} has the shape {prediction.shape} and {sample.name} {sample.shape}"
                    )
        opset = graph.opset_imports.get("", 0)
        if opset < _OPSET:
            return f"the graph's opset is {opset} and at least {_OPSET} is needed"
        return None

    def _make_way(self, graph: ir.Graph) -> None:
        """Rename values inside of the graph that have the names of the new inputs and outputs."""
        new_inputs, new_outputs = self._names()
        reserved = {*new_inputs, *new_outputs}
        for node in graph.all_nodes():
            for value in node.outputs:
                if value.name in reserved:
                    value.name = f"{value.name}.inner"


def _rename_dim(graph: ir.Graph, sample: ir.Value, new: str) -> None:
    """Give the symbol of the sample's first axis another name in the whole graph.

    The old one may well be "batch", and would then stand for two sizes in one graph.
    """
    assert sample.shape is not None
    first = sample.shape[0]
    old = first.value if isinstance(first, ir.SymbolicDim) else None
    if old is None:
        return
    values = {id(value): value for value in (*graph.inputs, *graph.outputs)}
    for node in graph.all_nodes():
        values.update((id(value), value) for value in node.outputs)
    word = re.compile(rf"\b{re.escape(old)}\b")

    def renamed(dim: int | ir.SymbolicDim) -> int | str | ir.SymbolicDim:
        if isinstance(dim, int) or dim.value is None:
            return dim
        return new if dim.value == old else word.sub(f"({new})", dim.value)

    for value in values.values():
        if value.shape is not None:
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])


class _Fusion:
    """One application of `FuseSampler`: what it needs to build nodes."""

    def __init__(self, options: FuseSampler, graph: ir.Graph, sample: ir.Value, prediction: ir.Value) -> None:
        assert sample.shape is not None
        self.options = options
        self.graph = graph
        self.sample = sample
        self.prediction = prediction
        self.latent: tuple[int | ir.SymbolicDim, ...] = tuple(sample.shape)[1:]
        self.nodes: list[ir.Node] = []

    def run(self) -> None:
        options = self.options
        ones = [1] * (len(self.latent) + 1)
        extra = (options.clip_range is not None) + options.noise

        state = self._input("state", options.slots, "batch", *self.latent)
        sample_weights = self._input("sample_weights", options.slots)
        mix = self._input("mix", "rows")
        next_weights = self._input("next_weights", options.slots + 1 + extra)
        inputs = [state, sample_weights, mix, next_weights]

        # What the model sees: a sum over the state, once for every row.
        rows = self._node("Shape", [mix], "row_count")
        batch_latent = self._node("Shape", [state], "latent_shape", start=1)
        model_input = self._weigh(state, sample_weights, "model_input", keepdims=True)
        in_rows = self._node("Concat", [rows, self._ints("ones", ones)], "row_shape", axis=0)
        expanded = self._node("Expand", [model_input, in_rows], "rows")
        latent = self._node("Shape", [state], "element_shape", start=2)
        merged = self._node("Concat", [self._ints("infer", [-1]), latent], "sample_shape", axis=0)
        flat = self._node("Reshape", [expanded, merged], "sample_float")
        assert self.sample.dtype is not None and self.prediction.dtype is not None
        flat = self._cast(flat, self.sample.dtype, "sample_cast")
        flat.shape = self.sample.shape
        before, self.nodes = self.nodes, []

        # What the model said: rows mixed into one prediction, then the update.
        prediction = self._cast(self.prediction, ir.DataType.FLOAT, "prediction_float")
        split = self._node("Concat", [rows, batch_latent], "prediction_shape", axis=0)
        by_row = self._node("Reshape", [prediction, split], "prediction_rows")
        output = self._weigh(by_row, mix, "model_output")
        parts = self._split(next_weights, 1 + extra, "next")
        next_sample = self._node(
            "Add", [self._weigh(state, parts[0], "kept"), self._of(output, parts[1])], "sum"
        )
        outputs = [output]
        if options.clip_range is not None:
            clip_weights = self._input("clip_weights", options.slots + 1)
            inputs.append(clip_weights)
            kept, own = self._split(clip_weights, 1, "clip")
            unclipped = self._node(
                "Add", [self._weigh(state, kept, "clip_kept"), self._of(output, own)], "unclipped"
            )
            bounds = [
                self._float(name, sign * options.clip_range) for name, sign in (("low", -1), ("high", 1))
            ]
            clipped = self._node("Clip", [unclipped, *bounds], "clipped")
            next_sample = self._node("Add", [next_sample, self._of(clipped, parts[2])], "sum_clipped")
            outputs.append(clipped)
        if options.noise:
            noise = self._input("noise", "batch", *self.latent)
            inputs.append(noise)
            next_sample = self._node("Add", [next_sample, self._of(noise, parts[-1])], "sum_noise")
        outputs.insert(0, next_sample)
        for name, value in zip(options._names()[1], outputs, strict=True):
            value.name = name
            value.shape = ir.Shape(["batch", *self.latent])

        self._splice(before, flat, inputs, outputs)

    def _splice(
        self, before: list[ir.Node], flat: ir.Value, inputs: list[ir.Value], outputs: list[ir.Value]
    ) -> None:
        graph = self.graph
        ir.convenience.replace_all_uses_with(self.sample, flat)
        first = next(iter(graph), None)
        if first is None:
            graph.extend(before)
        else:
            graph.insert_before(first, before)
        graph.extend(self.nodes)
        others = [value for value in graph.inputs if value is not self.sample]
        kept = [value for value in graph.outputs if value is not self.prediction]
        graph.inputs[:] = [*inputs, *others]
        graph.outputs[:] = [*outputs, *kept]

    def _input(self, name: str, *shape: int | str | ir.SymbolicDim) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))

    def _node(self, op: str, inputs: Sequence[ir.Value], name: str, **attributes: int) -> ir.Value:
        node = ir.node(op, list(inputs), attributes, name=f"{SCOPE}/{name}")
        node.metadata_props[SCOPES] = repr(["", SCOPE, name])
        output = node.outputs[0]
        output.name = f"{SCOPE}/{name}"
        output.type = ir.TensorType(ir.DataType.INT64 if op in ("Shape", "Concat") else ir.DataType.FLOAT)
        self.nodes.append(node)
        return output

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        if value.dtype == dtype:
            return value
        cast = self._node("Cast", [value], name, to=int(dtype))
        cast.type = ir.TensorType(dtype)
        return cast

    def _weigh(self, values: ir.Value, weights: ir.Value, name: str, keepdims: bool = False) -> ir.Value:
        """The sum of values (k, batch, *latent) with weights (k,)."""
        column = self._ints("column", [-1, *[1] * (len(self.latent) + 1)])
        across = self._node("Reshape", [weights, column], f"{name}_weights")
        products = self._node("Mul", [values, across], f"{name}_products")
        return self._node(
            "ReduceSum", [products, self._ints("first_axis", [0])], name, keepdims=int(keepdims)
        )

    def _of(self, value: ir.Value, weight: ir.Value) -> ir.Value:
        return self._node("Mul", [value, weight], f"{weight.name}_part".removeprefix(f"{SCOPE}/"))

    def _split(self, weights: ir.Value, singles: int, name: str) -> list[ir.Value]:
        """The weights of the state, then one weight each."""
        sizes = self._ints(f"{name}_sizes", [self.options.slots, *[1] * singles])
        node = ir.node(
            "Split", [weights, sizes], {"axis": 0}, num_outputs=1 + singles, name=f"{SCOPE}/{name}"
        )
        node.metadata_props[SCOPES] = repr(["", SCOPE, name])
        for index, output in enumerate(node.outputs):
            output.name = f"{SCOPE}/{name}_weight_{index}"
            output.type = ir.TensorType(ir.DataType.FLOAT)
        self.nodes.append(node)
        return list(node.outputs)

    def _ints(self, name: str, values: list[int]) -> ir.Value:
        return self._constant(name, np.array(values, np.int64))

    def _float(self, name: str, value: float) -> ir.Value:
        return self._constant(name, np.array(value, np.float32))

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        return shared_constant(self.graph, f"{SCOPE}/{name}", array)
