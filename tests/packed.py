"""Small graphs with weights to pack, and random codes for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from trimtab.passes import vq_op
from trimtab.passes.codebooks import FORMATS, PackedWeight

Array = Any


def graph(inputs: dict[str, tuple[int, ...]], weights: dict[str, Array], *nodes: ir.Node) -> ir.Model:
    """A graph of nodes whose input values are named; its result is the last node's."""
    values = {
        name: ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, shape in inputs.items()
    }
    initializers = [
        ir.Value(
            name=name,
            shape=ir.Shape(w.shape),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=ir.tensor(w, name=name),
        )
        for name, w in weights.items()
    ]
    made = values | {v.name or "": v for v in initializers}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            assert value is not None
            node.replace_input_with(index, made.get(value.name or "", value))
        made[node.outputs[0].name or ""] = node.outputs[0]
    result = nodes[-1].outputs[0]
    result.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Model(
        ir.Graph(
            list(values.values()), [result], nodes=nodes, initializers=initializers, opset_imports={"": 23}
        ),
        ir_version=11,
    )


def node(op_type: str, *inputs: str, **attributes: Any) -> ir.Node:
    made = ir.node(op_type, [ir.Value(name=name) for name in inputs], attributes)
    made.outputs[0].name = f"{inputs[-1]}.{op_type}"
    return made


def random_codes(
    shape: tuple[int, ...], bits: int = 2, scaled: bool = False, seed: int = 0, codewords: int | None = None
) -> PackedWeight:
    """Codes for a weight (O, I / group, *kernel)."""
    random, form = np.random.default_rng(seed), FORMATS[bits]
    columns = int(np.prod(shape[1:]))
    k = codewords or form.codewords
    codes = random.integers(0, k, (shape[0], -(-columns // form.length))).astype(np.uint8)
    codebook = random.standard_normal((k, form.length)).astype(np.float16).astype(np.float32)
    scale = random.uniform(0.5, 2, shape[0]).astype(np.float32) if scaled else None
    return PackedWeight(bits, vq_op.pack_indices(codes, form.index_bits), codebook, scale, columns, 0.0)


def run(model: ir.Model, *, fold: bool = True, **feeds: Array) -> Array:
    session = onnxruntime.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(),
        disabled_optimizers=None if fold else ["ConstantFolding"],
    )
    return session.run(None, feeds)[0]
