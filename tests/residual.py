"""A small denoiser of residual branches, built by hand: no exporter, no module names unless asked for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trimtab.passes.sampler import FuseSampler
from trimtab.passes.scopes import SCOPES

CHANNELS = 6


def denoiser(widths: tuple[int, ...] = (4, 8, 12), *, named: bool = True, fused: bool = True) -> ir.Model:
    """x + W2 relu(W1 x), once for each width; the k-th branch is 10 ** -k as strong as the first.

    Reads ``sample`` (rows, 6, 5); with the sampler fused, what `FuseSampler` says.
    """
    generator = np.random.default_rng(0)
    weights: list[ir.Value] = []
    nodes: list[ir.Node] = []

    def weight(name: str, shape: tuple[int, int], scale: float) -> ir.Value:
        array = (scale * generator.normal(size=shape)).astype(np.float32)
        value = ir.Value(
            name=name,
            shape=ir.Shape(shape),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=ir.tensor(array, name=name),
        )
        weights.append(value)
        return value

    def node(op: str, inputs: list[ir.Value], path: str, width: int) -> ir.Value:
        made = ir.node(op, inputs)
        if named:
            made.metadata_props[SCOPES] = repr(["", *_parents(path), op])
        nodes.append(made)
        output = made.outputs[0]
        output.name = f"v{len(nodes)}"
        output.shape = ir.Shape(["rows*batch", width, 5])
        output.type = ir.TensorType(ir.DataType.FLOAT)
        return output

    sample = ir.Value(
        name="sample", shape=ir.Shape(["prompts", CHANNELS, 5]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    running = node("Tanh", [sample], "stem", CHANNELS)
    for index, width in enumerate(widths):
        block = f"blocks.{index}"
        first = weight(f"{block}.first.weight", (width, CHANNELS), 1.0)
        second = weight(f"{block}.second.weight", (CHANNELS, width), 10.0**-index)
        hidden = node("MatMul", [first, running], f"{block}.first", width)
        hidden = node("Relu", [hidden], block, width)
        branch = node("MatMul", [second, hidden], f"{block}.second", CHANNELS)
        running = node("Add", [branch, running], block, CHANNELS)
    running = node("Tanh", [running], "head", CHANNELS)
    running.name, running.shape = "prediction", sample.shape
    graph = ir.Graph([sample], [running], nodes=nodes, initializers=weights, opset_imports={"": 23}, name="g")
    model = ir.Model(graph, ir_version=10)
    if fused:
        FuseSampler(2)(model)
    return model


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def inputs(batch: int = 1, rows: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """What the fused graph reads."""
    generator = np.random.default_rng(seed)
    return {
        "state": generator.normal(size=(2, batch, CHANNELS, 5)).astype(np.float32),
        "sample_weights": np.float32([1.0, 0.0]),
        "mix": np.float32([-1.0, 2.0][:rows]),
        "next_weights": np.float32([1.0, 0.0, 0.5]),
    }
