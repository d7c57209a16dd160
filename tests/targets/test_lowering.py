"""What reaches a parser is what it takes, and computes what the graph does."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import feeds_for, model, run, single, value

from trimtab.errors import UnsupportedOp
from trimtab.targets.lowering import lower
from trimtab.targets.operators import OLDEST_TENSORRT, RTX, Parser, tensorrt_parser

JETPACK6 = tensorrt_parser(OLDEST_TENSORRT)
HEADS = (1, 2, 5, 4)


def block() -> ir.Model:
    """Every operator above opset 19 that the exporter writes, one after the other."""
    x = value("x", HEADS)
    normal = ir.node("GroupNormalization", [x, value("scale", [2]), value("bias", [2])], {"num_groups": 1})
    root = ir.node("RMSNormalization", [normal.outputs[0], value("root_scale", [4])])
    turned = ir.node("RotaryEmbedding", [root.outputs[0], value("cos", []), value("sin", [])])
    seen = ir.node("Attention", [turned.outputs[0], turned.outputs[0], x])
    bent = ir.node("Gelu", [seen.outputs[0]])
    nodes = [normal, root, turned, seen, bent]
    for node in nodes:
        node.name = node.op_type
        node.outputs[0].name = f"{node.op_type}_y"
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(HEADS), ir.TensorType(ir.DataType.FLOAT)
    random = np.random.default_rng(1)
    sizes = {"scale": 2, "bias": 2, "root_scale": 4, "cos": (1, 5, 2), "sin": (1, 5, 2)}
    weights = {name: random.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    return model([x], nodes, [bent.outputs[0]], weights)


@pytest.mark.parametrize("version", [(10, 3), (10, 7), (10, 9), (10, 13), (10, 14), (10, 16), (11, 4)])
def test_every_parser_gets_what_it_takes(version: tuple[int, int]) -> None:
    whole, parser = block(), tensorrt_parser(version)
    lowered = lower(whole, parser)
    assert [parser.refuses(node) for node in lowered.graph.all_nodes() if parser.refuses(node)] == []
    assert lowered.opset_imports[""] == min(parser.opset, 23)
    feeds = feeds_for(whole)
    expected, found = run(whole, feeds), run(lowered, feeds)
    assert all(np.abs(found[name] - expected[name]).max() <= 1e-5 for name in expected)


def test_the_oldest_parser_gets_a_graph_that_is_valid_at_its_opset() -> None:
    lowered = lower(block(), JETPACK6)
    assert lowered.opset_imports == {"": 19} and lowered.ir_version <= 9
    onnx.checker.check_model(ir.to_proto(lowered), full_check=True)


def test_what_a_parser_takes_is_left_whole() -> None:
    kept = {node.op_type for node in lower(block(), RTX).graph}
    assert kept == {"GroupNormalization", "RMSNormalization", "RotaryEmbedding", "Attention", "Gelu"}
    kept = {node.op_type for node in lower(block(), tensorrt_parser((10, 13))).graph}
    assert "GroupNormalization" in kept and not {"Attention", "RMSNormalization"} & kept


def test_the_graph_itself_stays_as_it_was() -> None:
    whole = block()
    before = ir.to_proto(whole).SerializeToString()
    lower(whole, JETPACK6)
    assert ir.to_proto(whole).SerializeToString() == before


def test_a_form_that_a_parser_does_not_know_is_decomposed_though_it_knows_the_operator() -> None:
    flat = single("Attention", dict.fromkeys("qkv", (2, 5, 32)), (2, 5, 32), q_num_heads=4, kv_num_heads=4)
    assert "Attention" not in {node.op_type for node in lower(flat, RTX).graph}


@pytest.mark.parametrize(
    ("cast", "mask", "whole"), [(True, True, False), (True, False, True), (False, True, True)]
)
def test_attention_with_a_mask_behind_casts_from_fp16_is_decomposed(
    cast: bool, mask: bool, whole: bool
) -> None:
    sizes = ir.TensorType(ir.DataType.FLOAT)
    parts = [value(name, HEADS, ir.DataType.FLOAT16 if cast else ir.DataType.FLOAT) for name in "qkv"]
    casts = [ir.node("Cast", [part], {"to": 1}) for part in parts] if cast else []
    read = [node.outputs[0] for node in casts] if cast else list(parts)
    bias = [value("bias", (1, 1, 5, 5))] if mask else []
    seen = ir.node("Attention", [*read, *bias])
    for number, node in enumerate([*casts, seen]):
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = (
            f"y{number}",
            ir.Shape(HEADS),
            sizes,
        )
    graph = model([*parts, *bias], [*casts, seen], seen.outputs)
    assert ("Attention" in {node.op_type for node in lower(graph, RTX).graph}) == whole
    feeds = feeds_for(graph)
    feeds |= {part.name: feeds[part.name].astype(part.dtype.numpy()) for part in parts}
    expected, found = run(graph, feeds), run(lower(graph, RTX), feeds)
    assert all(np.abs(found[name] - expected[name]).max() <= 1e-5 for name in expected)


def test_functions_are_written_out() -> None:
    x = value("x", [3])
    inner = ir.node("Relu", [ir.Value(name="a")])
    function = ir.Function(
        "trimtab",
        "Bend",
        graph=ir.Graph(inner.inputs, inner.outputs, nodes=[inner], opset_imports={"": 23}),  # type: ignore[arg-type]
        attributes=[],
    )
    call = ir.node("Bend", [x], domain="trimtab")
    call.outputs[0].name, call.outputs[0].shape = "y", ir.Shape([3])
    call.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    whole = model([x], [call], call.outputs)
    whole.functions[function.identifier()] = function
    whole.opset_imports["trimtab"] = 1
    for parser in (JETPACK6, RTX):
        lowered = lower(whole, parser)
        assert [node.op_identifier() for node in lowered.graph] == [("", "Relu", "")]
        assert "trimtab" not in lowered.opset_imports


def test_embedders_that_are_equal_are_computed_once() -> None:
    x = value("x", [2, 4])
    weight = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    nodes, ends = [], []
    for block in range(3):
        embedded = ir.node("MatMul", [x, value(f"blocks.{block}.embedder", [])], name=f"embed{block}")
        bent = ir.node("Tanh", embedded.outputs, name=f"bend{block}")
        own = ir.node("Mul", [bent.outputs[0], value(f"blocks.{block}.own", [])], name=f"own{block}")
        nodes += [embedded, bent, own]
        ends.append(own.outputs[0])
    total = ir.node("Sum", ends, name="total")
    for node in (*nodes, total):
        node.outputs[0].name, node.outputs[0].shape = f"{node.name}_y", ir.Shape([2, 4])
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    weights = {f"blocks.{block}.embedder": weight.copy() for block in range(3)}
    weights |= {f"blocks.{block}.own": np.full(4, block + 1, np.float32) for block in range(3)}
    whole = model([x], [*nodes, total], total.outputs, weights)
    lowered = lower(whole, RTX)
    assert sorted(node.op_type for node in lowered.graph) == ["MatMul", "Mul", "Mul", "Mul", "Sum", "Tanh"]
    assert sum(name.endswith("embedder") for name in lowered.graph.initializers) == 1
    feeds = feeds_for(whole)
    for name, expected in run(whole, feeds).items():
        assert np.array_equal(run(lowered, feeds)[name], expected)


@pytest.mark.parametrize("parser", [JETPACK6, RTX], ids=lambda parser: parser.name)
def test_an_operator_of_a_domain_of_its_own_is_refused_and_never_reaches_the_parser(parser: Parser) -> None:
    x = value("x", [3])
    node = ir.node("Magic", [x], domain="our.plugins", name="magic")
    node.outputs[0].name = "y"
    with pytest.raises(UnsupportedOp, match=r"our\.plugins::Magic of magic is of a domain") as error:
        lower(model([x], [node], node.outputs), parser)
    assert "\n" not in str(error.value)


def test_an_operator_that_can_be_replaced_but_not_here_says_why() -> None:
    capped = single("Attention", dict.fromkeys("qkv", HEADS), HEADS, softcap=2.0)
    with pytest.raises(UnsupportedOp, match=r"Attention of block\.0 .*TensorRT 10\.3.*it has a softcap"):
        lower(capped, JETPACK6)
    ellipsis = single("Einsum", {"a": (2, 3), "b": (3, 2)}, (2, 2), equation="...j,jk->...k")
    with pytest.raises(UnsupportedOp, match="has an ellipsis"):
        lower(ellipsis, JETPACK6)
    assert lower(ellipsis, tensorrt_parser((10, 13)))
