"""Small graphs to cut, and a way to run a Program's steps call by call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from trimtab.bundle import open_bundle
from trimtab.passes.scopes import SCOPES
from trimtab.program import Call, Program, Schedule, Segment, Step, Task, TensorSpec
from trimtab.storage import read_program

Tensors = dict[str, np.ndarray]

WIDTH = 8
_FLOAT = ir.TensorType(ir.DataType.FLOAT)


def whole(folder: Path) -> Program:
    """The program of a bundle."""
    return read_program(open_bundle(folder))


def entries(program: Program, name: str) -> list[tuple[str, int, int]]:
    """What a pass of this name did: segment, places rewritten, places refused."""
    return [(entry.segment, entry.applied, entry.refused) for entry in program.passes if entry.name == name]


def chain(blocks: int) -> ir.Model:
    """``x{k+1} = x{k} + branch{k}`` with ``branch{k} = relu(x{k} @ W{k})``; the module of block k is ``blocks.k``."""
    rng = np.random.default_rng(0)
    source = ir.Value(name="x0", shape=ir.Shape(["n", 1, WIDTH]), type=_FLOAT)
    graph = ir.Graph([source], [], nodes=[], opset_imports={"": 23})
    value = source
    for k in range(blocks):
        weight = ir.tensor(rng.standard_normal((WIDTH, WIDTH)).astype(np.float32), name=f"W{k}")
        w = ir.Value(name=f"W{k}", shape=ir.Shape([WIDTH, WIDTH]), type=_FLOAT, const_value=weight)
        graph.register_initializer(w)
        product = add(graph, f"blocks.{k}", "MatMul", [value, w], f"product{k}")
        branch = add(graph, f"blocks.{k}", "Relu", [product], f"branch{k}")
        value = add(graph, f"blocks.{k}", "Add", [value, branch], f"x{k + 1}")
    graph.outputs.append(value)
    return ir.Model(graph, ir_version=10)


def add(graph: ir.Graph, path: str, op: str, inputs: Sequence[ir.Value], name: str) -> ir.Value:
    """A node of a module whose result is (n, 1, WIDTH)."""
    node = ir.node(op, list(inputs), name=name)
    node.metadata_props[SCOPES] = repr(["", path, name])
    output = node.outputs[0]
    output.name, output.type, output.shape = name, _FLOAT, ir.Shape(["n", 1, WIDTH])
    graph.append(node)
    return output


def program(model: ir.Model, *calls: Call) -> Program:
    """One schedule, "s", of one call a step."""
    steps = tuple(Step((call,)) for call in calls)
    task = Task(
        (TensorSpec("x", "float32", ("batch", 1, WIDTH), {"kind": "noise"}),), (), {"s": Schedule(steps)}
    )
    return Program({"denoiser": Segment("denoiser", model)}, {"t": task}, (), (), (8, 8), 1, None, 1)


def call(model: ir.Model, read: Mapping[str, str] = {}, kept: Mapping[str, str] = {}) -> Call:
    """A call of a `chain` that reads and keeps inner values."""
    return Call("denoiser", {"x0": "x", **read}, {str(model.graph.outputs[0].name): "y", **kept})


def run_model(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> Tensors:
    """One graph in ONNX Runtime, below the level at which it fuses convolutions by what stands around them."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    given = {i.name: feeds[i.name] for i in session.get_inputs()}
    return dict(zip(names, session.run(names, given), strict=True))


def run_step(program: Program, step: Step, tensors: Tensors) -> None:
    """Runs a step's calls on tensors by name, in place."""
    for one in step.calls:
        feeds = {name: tensors[tensor] for name, tensor in one.inputs.items()}
        results = run_model(program.segments[one.segment].model, feeds)
        tensors.update({one.outputs[name]: array for name, array in results.items()})
