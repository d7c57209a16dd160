"""Bytes of a packed DiT-XL/2, against what VQ4DiT reports. Nothing of it is allocated."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from diffusers import DiTTransformer2DModel

from trimtab.calibration.codebook_plan import Settings, choose, plan
from trimtab.passes.codebooks import FORMATS
from trimtab.passes.vq import Site

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

MIB = 2**20

WEIGHTS = 668_860_416
BIASES = 483_840
"""Of the Linears in the 28 blocks, adaLN's among them."""


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    """Parameter -> shape."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(BENCHMARKS)
        from models import DIT_XL_2

    with torch.device("meta"):
        model = DiTTransformer2DModel(**DIT_XL_2)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def site(name: str, shape: tuple[int, ...]) -> Site:
    def never() -> ir.Tensor:
        raise AssertionError("a size was asked for, and the weight was read")

    tensor = ir.LazyTensor(never, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)
    return Site(name, ir.Value(name=name, const_value=tensor), inputs_first=False)


@pytest.mark.parametrize(("bits", "codes"), [(2, WEIGHTS // 4), (3, WEIGHTS * 3 // 8), (4, WEIGHTS // 2)])
def test_dit_xl_2_packs_to_the_papers_bytes(
    shapes: dict[str, tuple[int, ...]], bits: int, codes: int
) -> None:
    linear = {
        name: shape for name, shape in shapes.items() if len(shape) == 2 and "embedding_table" not in name
    }
    found, settings = {name: site(name, shape) for name, shape in linear.items()}, Settings(bits)
    groups = plan(found, choose(found, settings), settings)
    packed = [name for group in groups for name in group.names]
    assert len(packed) == len(groups) == 28 * 7  # as in the paper, each has its own codebook
    form, total, books = FORMATS[bits], 0, 0
    for group in groups:
        outputs, inputs = linear[group.names[0]]
        assert group.bits == bits and inputs % form.length == 0
        total += outputs * (inputs // form.length) * form.index_bits // 8
        books += group.codewords * form.length * 4
    assert sum(linear[name][0] * linear[name][1] for name in packed) == WEIGHTS
    assert total == codes
    biases = [name for name in shapes if name.removesuffix(".bias") + ".weight" in packed]
    assert sum(shapes[name][0] for name in biases if name.endswith(".bias")) == BIASES
    if bits == 2:
        # The paper's figure, 162.08 MB, is codes, codebooks and biases in MiB.
        assert f"{codes / MIB:.2f} {books / MIB:.2f} {4 * BIASES / MIB:.2f}" == "159.47 0.77 1.85"
        assert f"{(codes + books + 4 * BIASES) / MIB:.2f}" == "162.08"
