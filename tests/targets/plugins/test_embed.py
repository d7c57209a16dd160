"""Kernels in a graph: each text stands once, whatever launches it, and a parser reads all of a node's in the node."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from trimtab.errors import BundleError
from trimtab.targets.key import graph_digest
from trimtab.targets.network import write_graph
from trimtab.targets.plugins.aot import Kernel, read_kernels
from trimtab.targets.plugins.embed import embed, embedded, spell_out

SMALL, LARGE, OTHER = (
    Kernel("vq_matmul", rows, 64, 128, 0, "fp16", f"// {rows}\n.entry vq_matmul(\n)\n" + "nop;\n" * 1000)
    for rows in (16, 64, 128)
)


def model(*layers: tuple[Kernel, ...]) -> ir.Model:
    """A chain of packed layers."""
    x = ir.Value(name="x", shape=ir.Shape((1, 4)), type=ir.TensorType(ir.DataType.FLOAT16))
    made = ir.Model(
        ir.Graph([x], [], nodes=[], opset_imports={"": 23, "trimtab": 1}, name="g"), ir_version=11
    )
    value = x
    for number, kernels in enumerate(layers):
        attributes = {"kernels": embed(made, kernels), "plugin_namespace": "trimtab"}
        node = ir.node("TrimtabVQMatMul1", [value], attributes, domain="trimtab", name=f"layer{number}")
        value = node.outputs[0]
        value.name, value.shape, value.type = f"v{number}", x.shape, x.type
        made.graph.append(node)
    made.graph.outputs.append(value)
    return made


def test_layers_with_the_same_kernels_share_their_texts(tmp_path: Path) -> None:
    ir.save(model((SMALL, LARGE)), tmp_path / "one")
    ir.save(model(*[(SMALL, LARGE)] * 20), tmp_path / "twenty")
    more = (tmp_path / "twenty").stat().st_size - (tmp_path / "one").stat().st_size
    assert more < 19 * 300 < len(SMALL.ptx) * 2
    read = ir.load(tmp_path / "twenty")
    assert all(embedded(read, node) == (SMALL, LARGE) for node in read.graph)


def test_a_parser_finds_a_layers_kernels_in_its_node_and_nowhere_else(tmp_path: Path) -> None:
    before = model((SMALL, LARGE), (OTHER,))
    (tmp_path / "out").mkdir()
    written = ir.load(write_graph(before, tmp_path / "out"))
    texts = [node.attributes["kernels"].as_string() for node in written.graph]
    assert [read_kernels(text) for text in texts] == [(SMALL, LARGE), (OTHER,)]
    assert not written.metadata_props
    assert [embedded(before, node) for node in before.graph] == [(SMALL, LARGE), (OTHER,)]  # stays as it was


def test_graphs_of_different_kernels_have_different_digests() -> None:
    assert graph_digest(model((SMALL,))) == graph_digest(model((SMALL,))) != graph_digest(model((LARGE,)))


@pytest.mark.parametrize("text", [None, LARGE.text(), "nothing"], ids=["missing", "another's", "none at all"])
def test_a_kernel_that_is_not_what_its_name_says_is_refused_in_one_line(text: str | None) -> None:
    spoiled = model((SMALL,))
    (key,) = spoiled.metadata_props
    del spoiled.metadata_props[key]
    if text is not None:
        spoiled.metadata_props[key] = text
    with pytest.raises(
        BundleError, match=r"^the packed layer layer0 names a kernel .* compile the bundle again$"
    ):
        spell_out(spoiled)
