"""Keeps TensorRT for RTX from decoding the packed weights of many blocks at once.

Its builder makes one product of all that read the same value, and for that it lays their weights side by side: those
that are constants while it builds, packed ones decoded whenever the engine runs. The 28 blocks of a DiT-XL/2 all read
the one conditioning; their modulation took 1.79 GB of activations in FP32, where the largest weight has 32 MB. The
builder sees through copies of a value, but not through the parts of one:

    x -> Expand(n, *x) -> Split -> n parts -> Reshape
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from trimtab.passes import vq_op
from trimtab.passes.base import Pass, PassResult, Refusal
from trimtab.passes.constants import add_constant
from trimtab.passes.scopes import scopes


class KeepBlocksApart(Pass):
    """Hands a value that packed products of several blocks read to each block as a tensor of its own. Exact.

    A block is a module whose name is a number; products of one block keep their common value. Convolutions read what
    they read: the builder does not join them.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrites a graph of fixed sizes whose packed weights are still `trimtab::VQDequantize`."""
        readers: dict[ir.Value, list[ir.Node]] = {}
        for product in _packed_products(model.graph):
            if (value := product.inputs[0]) is not None:
                readers.setdefault(value, []).append(product)
        applied, refused = [], []
        for value, products in readers.items():
            blocks: dict[str, list[ir.Node]] = {}
            for number, product in enumerate(products):
                blocks.setdefault(_block(product) or f"product {number}", []).append(product)
            if len(blocks) < 2:
                continue
            name = value.name or ""
            if value.shape is None or not value.shape.is_static():
                refused.append(Refusal(name, "its sizes are open"))
                continue
            _separate(model.graph, value, list(blocks.values()))
            applied.append(name)
        return PassResult(model, bool(applied), tuple(applied), tuple(refused))


def _packed_products(graph: ir.Graph) -> Iterator[ir.Node]:
    """In the graph's order."""
    for node in graph:
        if node.domain != "" or node.op_type not in ("MatMul", "Gemm") or node.inputs[1] is None:
            continue
        maker = node.inputs[1].producer()
        if maker is not None and maker.op_type == "Transpose" and maker.inputs[0] is not None:
            maker = maker.inputs[0].producer()
        if maker is not None and vq_op.is_packed(maker):
            yield node


def _block(node: ir.Node) -> str:
    """The path of the outermost numbered module that a node lies in; empty where there is none."""
    parts = next(reversed(scopes(node)), "").split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def _separate(graph: ir.Graph, value: ir.Value, blocks: list[list[ir.Node]]) -> None:
    assert value.shape is not None
    shape, count, name = list(value.shape.numpy()), len(blocks), value.name or ""
    tape = ir.tape.Tape()

    def sizes(part: str, numbers: list[int]) -> ir.Value:
        return add_constant(graph, f"{name}.{part}", np.array(numbers, np.int64))

    spread = tape.op("Expand", [value, sizes("spread", [count, *shape])])
    parts = tape.op_multi_out(
        "Split", [spread, sizes("parts", [1] * count)], attributes={"axis": 0}, num_outputs=count
    )
    whole = sizes("whole", shape)
    for products, part in zip(blocks, parts, strict=True):
        own = tape.op("Reshape", [part, whole])
        for product in products:
            product.replace_input_with(0, own)
    for number, node in enumerate(tape.nodes):
        node.metadata_props.update(blocks[0][0].metadata_props)
        for index, output in enumerate(node.outputs):
            output.name, output.type = f"{name}.apart.{number}.{index}", value.type
        node.outputs[0].shape = value.shape if node.op_type == "Reshape" else None
    graph.insert_before(blocks[0][0], tape.nodes)
