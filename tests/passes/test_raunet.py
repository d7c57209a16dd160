"""What HiDiffusion needs of graphs that others exported."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from trimtab.errors import PassError
from trimtab.passes import raunet
from trimtab.passes.scopes import SCOPES, module_tree


def test_an_upsampler_that_doubles_says_so_in_sizes_as_foreign_ones_do_not() -> None:
    path = "up_blocks.0.upsamplers.0"

    def graph(factor: float) -> ir.Model:
        body = f'<float[4] by = {{1, 1, {factor}, {factor}}}> {{ y = Resize<mode = "nearest">(x, , by) }}'
        text = f'<ir_version: 8, opset_import: ["" : 18]> g (float[1,2,H,W] x) => (float[1,2,A,B] y) {body}'
        model = ir.from_proto(onnx.parser.parse_model(text))
        for node in model.graph:
            node.metadata_props[SCOPES] = repr(["", path, "y"])
        return model

    sample = np.random.default_rng(0).random((1, 2, 3, 5), np.float32)
    model = graph(2)
    expected = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": sample})[0]
    for _ in range(2):
        raunet._resize_to_sizes(module_tree(model.graph)[path])
        assert [node.op_type for node in model.graph] == ["Shape", "Mul", "Resize"]
        found = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": sample})[0]
        assert np.array_equal(found, expected)
    with pytest.raises(PassError, match="does not double"):
        raunet._resize_to_sizes(module_tree(graph(3).graph)[path])


@pytest.mark.parametrize(
    ("side", "refused"),
    [("latent_height", False), ("latent_height//2", False), ("2*(latent_height//4)", True)],
)
def test_a_u_net_whose_sides_halve_at_every_level_is_refused(side: str, refused: bool) -> None:
    path = "up_blocks.0.upsamplers.0"
    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "Resize", [source], metadata_props={SCOPES: repr(["", path, "y"])})
    node.outputs[0].shape = ir.Shape(["rows", 2, side, side])
    tree = module_tree(ir.Graph([source], node.outputs, nodes=[node], opset_imports={"": 23}))
    with pytest.raises(PassError, match="doubles what it reads") if refused else nullcontext():
        raunet._check_told(tree[path])
