"""Small graphs by hand, and how to run them: for tests of passes and lowerings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

Feeds = dict[str, np.ndarray]


def parsed(text: str) -> ir.Model:
    """A graph in ONNX's text form, without the head."""
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 23]>\n{text}')


def value(name: str, shape: Sequence[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def model(
    inputs: Sequence[ir.Value],
    nodes: Sequence[ir.Node],
    outputs: Sequence[ir.Value],
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 23,
) -> ir.Model:
    """A model of these nodes; an input of a node that is named as a weight is that weight."""
    initializers = {}
    for name, array in (weights or {}).items():
        tensor = ir.tensor(array, name=name)
        initializers[name] = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    for node in nodes:
        for index, given in enumerate(node.inputs):
            if given is not None and given.name in initializers:
                node.replace_input_with(index, initializers[given.name])
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=list(initializers.values()),
        opset_imports={"": opset},
        name="graph",
    )
    return ir.Model(graph, ir_version=10)


def single(
    op: str, shapes: dict[str, Sequence[int | str]], out: Sequence[int | str], **attributes: object
) -> ir.Model:
    """A model of one node whose inputs are those of the model; names that end in _ids are integers."""
    inputs = [
        value(name, shape, ir.DataType.INT64 if name.endswith("_ids") else ir.DataType.FLOAT)
        for name, shape in shapes.items()
    ]
    node = ir.node(op, inputs, attributes, name=op.lower())  # type: ignore[arg-type]
    node.metadata_props["pkg.torch.onnx.name_scopes"] = repr(["", "block.0", op])
    result = node.outputs[0]
    result.name, result.shape, result.type = "y", ir.Shape(out), ir.TensorType(ir.DataType.FLOAT)
    return model(inputs, [node], [result])


def run(graph: ir.Model, feeds: Feeds) -> Feeds:
    """What ONNX Runtime makes of it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def feeds_for(graph: ir.Model, shapes: dict[str, Sequence[int]] | None = None, seed: int = 0) -> Feeds:
    """Standard normals, and small integers."""
    random = np.random.default_rng(seed)
    feeds = {}
    for given in graph.graph.inputs:
        name = given.name or ""
        sizes = tuple(shapes[name] if shapes is not None else given.shape.numpy())  # type: ignore[union-attr]
        if given.dtype is ir.DataType.INT64:
            feeds[name] = random.integers(0, 3, sizes).astype(np.int64)
        elif given.dtype is ir.DataType.BOOL:
            feeds[name] = random.random(sizes) < 0.7
        else:
            feeds[name] = random.standard_normal(sizes).astype(np.float32)
    return feeds
