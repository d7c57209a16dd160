"""Multiplications and bytes of graphs, counted by hand beside them."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import parsed as graph

from trimtab.targets.cost import Cost, node_costs


@pytest.mark.parametrize(
    ("text", "macs"),
    [
        ("agraph (float[2,3,8] x, float[8,5] w) => (float[2,3,5] y) { y = MatMul (x, w) }", 2 * 3 * 5 * 8),
        ("agraph (float[8,3] x, float[5,8] w) => (float y) { y = Gemm <transA=1, transB=1> (x, w) }", 3 * 5 * 8),
        (
            "agraph (float[2,6,9,9] x, float[4,3,3,3] w) => (float y) { y = Conv <group=2, pads=[1,1,1,1]> (x, w) }",
            2 * 4 * 81 * 3 * 9,
        ),
        (
            "agraph (float[2,6,9,9] x, float[6,4,2,2] w) => (float y) { y = ConvTranspose <strides=[2,2]> (x, w) }",
            2 * 6 * 81 * 4 * 4,
        ),
        (
            "agraph (float[2,3,16,8] q, float[2,3,7,8] k, float[2,3,7,4] v) => (float y) { y = Attention (q, k, v) }",
            2 * 3 * 16 * 7 * (8 + 4),
        ),
        (
            "agraph (float[2,16,24] q, float[2,7,24] k, float[2,7,24] v) => (float y)"
            " { y = Attention <q_num_heads=3, kv_num_heads=3> (q, k, v) }",
            2 * 3 * 16 * 7 * (8 + 8),
        ),
        (
            "agraph (float[2,16,32] q, float[2,7,16] k, float[2,7,12] v) => (float y)"
            " { y = Attention <q_num_heads=4, kv_num_heads=2> (q, k, v) }",
            2 * 4 * 16 * 7 * (8 + 6),
        ),
        (
            "agraph (float[2,3,16,8] q, float[2,3,7,8] k, float[2,3,7,8] v, float[2,3,5,8] pk, float[2,3,5,8] pv)"
            " => (float y, float k2, float v2) { y, k2, v2 = Attention (q, k, v, , pk, pv) }",
            2 * 3 * 16 * (5 + 7) * (8 + 8),
        ),
        (
            'agraph (float[2,3,4] x, float[2,4,5] w) => (float y) { y = Einsum <equation="bij,bjk->bik"> (x, w) }',
            2 * 3 * 4 * 5,
        ),
        ("agraph (float[2,3] x) => (float y) { y = Sigmoid (x) }", 0),
    ],
)  # fmt: skip
def test_multiplications_are_counted(text: str, macs: int) -> None:
    model = graph(text)
    inputs = {v.name or "": tuple(int(d) for d in v.shape or ()) for v in model.graph.inputs}
    assert sum((cost.macs for cost in node_costs(model, inputs).values()), 0) == macs


def test_bytes_are_those_of_weights_reads_and_results_and_views_are_free() -> None:
    text = """
    agraph (float[n, 8] x) => (float16[2, n, 4] y) <float[8, 8] w> {
        a = MatMul (x, w)
        b = Mul (a, a)
        shape = Constant <value = int64[3] {2, -1, 4}> ()
        c = Reshape (b, shape)
        y = Cast <to = 10> (c)
    }
    """
    model = graph(text.replace("<float[8, 8] w>", f"<float[8, 8] w = {{{', '.join(['1'] * 64)}}}>"))
    costs = {node.op_type: cost for node, cost in node_costs(model, {"x": (6, 8)}).items()}
    assert costs["MatMul"] == Cost(6 * 8 * 8, weight_bytes=256, read_bytes=192, written_bytes=192)
    assert costs["Mul"] == Cost(0, read_bytes=192, written_bytes=192)  # one tensor, read once
    assert costs["Reshape"] == Cost()
    assert costs["Cast"] == Cost(0, read_bytes=192, written_bytes=96)


def test_counts_agree_with_torchs_on_a_traced_block() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from trimtab.export.trace import Example, trace

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Sequential(
                torch.nn.Conv2d(3, 8, 3, padding=1),
                torch.nn.SiLU(),
                torch.nn.Flatten(2),
                torch.nn.Linear(64, 5),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)

    module, sample = Wrapped(), np.zeros((2, 3, 8, 8), np.float32)
    model = trace(module, {"x": Example(torch.from_numpy(sample), ("n", None, None, None))}, ("y",))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(4, 3, 8, 8))
    total = sum(node_costs(model, {"x": (4, 3, 8, 8)}).values(), Cost())
    assert 2 * total.macs == counter.get_total_flops()
