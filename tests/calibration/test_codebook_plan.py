"""What is packed, to how many bits, and which weights share a codebook."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from trimtab.calibration.codebook_plan import Settings, choose, plan
from trimtab.errors import InputError
from trimtab.passes.vq import Site


def found(**shapes: Any) -> dict[str, Site]:
    """Weights by their names, a "__" for each dot: of a shape, or of (spread, shape)."""
    random, made = np.random.default_rng(0), {}
    for name, given in shapes.items():
        spread, shape = given if isinstance(given[1], tuple) else (1.0, given)
        name = name.replace("__", ".") + ".weight"
        array = (spread * random.standard_normal(shape)).astype(np.float32)
        made[name] = Site(name, ir.Value(name=name, const_value=ir.tensor(array, name=name)), False)
    return made


def groups(sites: dict[str, Site], settings: Settings) -> dict[tuple[str, ...], tuple[int, int]]:
    return {
        tuple(name.removesuffix(".weight") for name in group.names): (group.bits, group.codewords)
        for group in plan(sites, choose(sites, settings), settings)
    }


def test_layers_of_repeated_blocks_are_packed_and_the_rest_says_why_not() -> None:
    sites = found(
        conv_in=(64, 64),
        blocks__0__attn__to_q=(64, 64),
        blocks__0__time_emb_proj=(64, 64),
        blocks__0__norm1__emb__linear_1=(64, 64),
        proj_out=(64, 64),
        **{"all_final_layer__2-1__adaLN_modulation__1": (64, 64)},
    )
    assert choose(sites, Settings()) == {
        "conv_in.weight": "it lies outside of the repeated blocks",
        "blocks.0.attn.to_q.weight": 2,
        "blocks.0.time_emb_proj.weight": 2,
        "blocks.0.norm1.emb.linear_1.weight": "it is an embedder",
        "proj_out.weight": "it lies outside of the repeated blocks",
        "all_final_layer.2-1.adaLN_modulation.1.weight": "it is the last layer",
    }


def test_the_first_rule_that_fits_decides_and_an_idle_one_is_refused() -> None:
    sites = found(conv_in=(64, 64), blocks__0__to_q=(64, 64), blocks__1__to_q=(64, 64))
    rules = (("conv_in", 4), ("blocks.0.*", "keep"), ("blocks.*", 3))
    assert choose(sites, Settings(rules=rules)) == {
        "conv_in.weight": 4,
        "blocks.0.to_q.weight": "a rule keeps it",
        "blocks.1.to_q.weight": 3,
    }
    with pytest.raises(InputError, match=r"the rule 'blocks\.1' fits no layer: .*\(blocks\.1\.to_q or "):
        choose(sites, Settings(rules=(("blocks.1", 4),)))
    with pytest.raises(
        InputError, match=r"rules before 'blocks\.1\.\*' fit all of its layers: give it before"
    ):
        choose(sites, Settings(rules=(("blocks.*", 3), ("blocks.1.*", 4))))
    with pytest.raises(InputError, match="5 bits were asked for"):
        Settings(bits=5)


def test_a_weight_with_too_few_sub_vectors_stays() -> None:
    sites = found(b__0__a=(7, 64), b__0__b=(64, 7))
    assert choose(sites, Settings()) == {
        "b.0.a.weight": "it is too small: 7 x 64",  # 112 sub-vectors
        "b.0.b.weight": 2,  # 128
    }


def test_a_large_weight_has_its_own_codebook_and_small_ones_of_one_spread_share() -> None:
    large, small = (256, 256), (64, 64)
    sites = found(b__0__small=small, b__0__large=large, b__1__small=(1.1, small), b__1__large=large)
    assert groups(sites, Settings()) == {
        ("b.0.large",): (2, 256),
        ("b.1.large",): (2, 256),
        ("b.0.small", "b.1.small"): (2, 256),  # 2048 sub-vectors, 8 for each codeword
    }


def test_weights_of_other_spreads_or_bits_do_not_share() -> None:
    sites = found(b__0__a=(64, 64), b__1__a=(1.2, (64, 64)), b__2__a=(2.0, (64, 64)), b__3__a=(64, 64))
    assert groups(sites, Settings(rules=(("b.3.*", 4),))) == {
        ("b.0.a", "b.1.a"): (2, 256),
        ("b.2.a",): (2, 128),  # 1024 sub-vectors, 8 for each
        ("b.3.a",): (4, 256),  # 2048
    }


def test_with_a_scale_for_every_row_all_spreads_are_one() -> None:
    sites = found(b__0__a=(64, 64), b__1__a=(50.0, (64, 64)))
    assert groups(sites, Settings(scale=True)) == {("b.0.a", "b.1.a"): (2, 256)}


def test_a_group_ends_when_a_codebook_costs_it_little() -> None:
    sites = found(**{f"b__{k}__a": (1 + k / 1000, (128, 128)) for k in range(10)})  # 4096 sub-vectors each
    assert [len(names) for names in groups(sites, Settings())] == [4, 4, 2]


def test_weights_of_zeros_share_with_each_other_alone() -> None:
    sites = found(b__0__a=(0.0, (64, 64)), b__1__a=(0.0, (64, 64)), b__2__a=(64, 64))
    assert list(groups(sites, Settings())) == [("b.0.a", "b.1.a"), ("b.2.a",)]
