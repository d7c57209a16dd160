"""The module tree of a graph, on a compiled U-Net."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from trimtab.passes.scopes import blocks, module_tree

pytestmark = pytest.mark.xdist_group("dit")


@pytest.fixture
def graph(bundle_folder: Callable[[str], Path]) -> ir.Graph:
    return ir.load(bundle_folder("dit") / "graphs" / "denoiser.onnx").graph


def test_modules_have_the_names_that_torch_gave_them(graph: ir.Graph) -> None:
    tree = module_tree(graph)
    assert {"transformer_blocks.0", "transformer_blocks.1.attn1.to_q", "pos_embed.proj", "sampler"} <= set(
        tree
    )
    assert not [path for path in tree if path.startswith("model")]


def test_parameters_have_the_names_that_torch_gave_them(
    graph: ir.Graph, pipeline_folder: Callable[[str], Path]
) -> None:
    from diffusers import DiTTransformer2DModel

    state = DiTTransformer2DModel.from_pretrained(pipeline_folder("dit") / "transformer").state_dict()
    weights = {str(name): value.const_value.numpy() for name, value in graph.initializers.items()}
    for name, parameter in state.items():
        stored = weights[f"{name}.T"].T if f"{name}.T" in weights else weights[name]
        assert (stored == parameter.numpy()).all()


def test_a_module_holds_its_children_s_nodes(graph: ir.Graph) -> None:
    tree = module_tree(graph)
    whole, part = set(tree["transformer_blocks.0"].nodes), set(tree["transformer_blocks.0.attn1"].nodes)
    assert part < whole


def test_a_block_reads_what_the_one_before_it_wrote(graph: ir.Graph) -> None:
    tree = module_tree(graph)
    written = set(tree["transformer_blocks.0"].outputs) & set(tree["transformer_blocks.1"].inputs)
    assert written
    assert not [value for value in tree["transformer_blocks.1"].inputs if value.is_initializer()]


def test_blocks_are_the_modules_with_modules_inside(graph: ir.Graph) -> None:
    paths = [block.path for block in blocks(module_tree(graph))]
    assert "transformer_blocks.0.attn1" in paths and "transformer_blocks.0.attn1.to_q" not in paths


def test_a_graph_of_another_exporter_has_no_modules(graph: ir.Graph) -> None:
    for node in graph:
        node.metadata_props.clear()
    assert module_tree(graph) == {}
