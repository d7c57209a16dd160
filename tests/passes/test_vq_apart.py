"""What several blocks read is handed to each as a tensor of its own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from packed import graph, node, random_codes, run

from trimtab.passes.codebooks import Codebooks
from trimtab.passes.scopes import SCOPES
from trimtab.passes.vq import PackWeights
from trimtab.passes.vq_apart import KeepBlocksApart

Array = np.ndarray


def products(modules: list[str], x: tuple[int | str, ...] = (3, 8), packed: bool = True) -> ir.Model:
    """sum over modules of x @ w, each weight its own."""
    weights = {f"{module}.w": random_codes((8, 8), seed=i) for i, module in enumerate(modules)}
    nodes, last = [], ""
    for module in modules:
        nodes.append(node("MatMul", "x", f"{module}.w"))
        nodes[-1].metadata_props[SCOPES] = repr(["", *([module] if module[0] != "_" else []), "matmul"])
        if last:
            nodes.append(node("Add", last, nodes[-1].outputs[0].name or ""))
            nodes[-1].outputs[0].name = f"sum{len(nodes)}"
        last = nodes[-1].outputs[0].name or ""
    model = graph({"x": x}, {name: w.rows().T.copy() for name, w in weights.items()}, *nodes)
    if packed:
        PackWeights(Codebooks("", weights))(model)
    return model


def inputs(model: ir.Model) -> list[str]:
    """What every product reads."""
    return [n.inputs[0].name or "" for n in model.graph if n.op_type == "MatMul"]


def test_blocks_read_parts_of_one_tensor_and_the_result_stays_bit_for_bit() -> None:
    model = products(["blocks.0.q", "blocks.0.k", "blocks.1.q", "blocks.2.q"])
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    before = run(model, x=x)
    assert KeepBlocksApart()(model).applied == ("x",)
    first, second, third, fourth = inputs(model)
    assert first == second and len({first, third, fourth}) == 3 and "x" not in (first, third, fourth)
    (split,) = [n for n in model.graph if n.op_type == "Split"]
    assert len(split.outputs) == 3
    assert np.array_equal(run(model, x=x), before)
    assert not KeepBlocksApart()(model).modified


def test_a_graph_without_modules_keeps_every_product_apart() -> None:
    model = products(["_a", "_b"])
    assert KeepBlocksApart()(model).modified and len(set(inputs(model))) == 2


def test_products_of_one_block_and_dense_ones_keep_their_value() -> None:
    for model in (
        products(["blocks.0.q", "blocks.0.k"]),
        products(["blocks.0.q", "blocks.1.q"], packed=False),
    ):
        result = KeepBlocksApart()(model)
        assert not result.modified and not result.refused and set(inputs(model)) == {"x"}


def test_open_sizes_are_refused() -> None:
    model = products(["blocks.0.q", "blocks.1.q"], x=("rows", 8))
    result = KeepBlocksApart()(model)
    assert not result.modified and [r.reason for r in result.refused] == ["its sizes are open"]
