"""Which layers go: pins, exclusions, rivals, and shares that cannot be reached."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import residual

from trimtab.calibration.choice import (
    Wish,
    _with_wish,
    by_chance,
    by_hand,
    by_loss,
    by_magnitude,
)
from trimtab.errors import InputError, PassError
from trimtab.passes.candidates import Candidate, Candidates

LOSSES = {"blocks.0": 3.0, "blocks.1": 2.0, "blocks.2": 1.0}
"""Of blocks with 48, 96 and 144 parameters."""


@pytest.fixture
def candidates() -> Candidates:
    return Candidates(residual.denoiser())


def test_the_cheapest_that_reach_the_share_go(candidates: Candidates) -> None:
    assert by_loss(candidates, Wish(0.5), LOSSES) == ("blocks.2",)
    assert by_loss(candidates, Wish(0.6), LOSSES) == ("blocks.1", "blocks.2")


def test_what_is_kept_stays_and_what_is_dropped_goes(candidates: Candidates) -> None:
    assert by_loss(candidates, Wish(0.3, keep=("blocks.2",)), LOSSES) == ("blocks.1",)
    assert by_loss(candidates, Wish(0.5, drop=("blocks.0",)), LOSSES) == ("blocks.0", "blocks.2")
    assert by_loss(candidates, Wish(0.3, drop=("blocks.1",)), LOSSES) == ("blocks.1",)


def test_a_share_that_cannot_be_reached_says_the_most_and_why(candidates: Candidates) -> None:
    with pytest.raises(InputError, match="at most 144 can go; some were to be kept"):
        by_loss(candidates, Wish(0.9, keep=("blocks.2",)), LOSSES)


def test_a_share_that_an_order_does_not_reach_is_no_word_about_what_can_go(candidates: Candidates) -> None:
    with pytest.raises(
        InputError, match="one after another they free 144: ask for less, or choose by loss; some"
    ):
        by_magnitude(candidates, Wish(0.9, keep=("blocks.2",)))

    def unreached(*_: object) -> tuple[str, ...]:
        raise InputError("too much")

    with pytest.raises(InputError, match=r"cannot be done: too much$"):
        _with_wish(candidates, Wish(0.9), unreached, LOSSES, None)


def test_the_innermost_level_goes_by_hand_and_none_around_it() -> None:
    """Where the outer levels have the channels of their neighbours too, they are candidates of the same kind."""
    blocks = ("down_blocks.1.resnets.1", "down_blocks.2.resnets.1", "down_blocks.3.resnets.1")
    outer = "down_blocks.0.downsamplers.0.conv:up_blocks.2.upsamplers.0.conv"
    inner = "down_blocks.2.downsamplers.0.conv:up_blocks.0.upsamplers.0.conv"
    found = {name: Candidate(name, "branch", 1, 4) for name in blocks}
    found[outer] = Candidate(outer, "level", 9, 36, (*blocks, inner))
    with pytest.raises(PassError, match="innermost level, and this U-Net's has other channels"):
        by_hand(found, "bk-sdm-tiny")
    found[inner] = Candidate(inner, "level", 5, 20, blocks[-1:])
    assert by_hand(found, "bk-sdm-tiny") == (*blocks[:2], inner)


def test_a_glob_that_matches_nothing_is_answered_with_what_is_near(candidates: Candidates) -> None:
    with pytest.raises(PassError, match=r"matches block\.0: did you mean .*blocks\.0"):
        by_loss(candidates, Wish(0.5, keep=("block.0",)), LOSSES)


def test_kept_and_dropped_at_once_is_refused(candidates: Candidates) -> None:
    with pytest.raises(InputError, match="to be kept and to be dropped"):
        by_loss(candidates, Wish(0.5, keep=("blocks.*",), drop=("blocks.1",)), LOSSES)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 30.0])
def test_a_share_is_between_0_and_1(share: float) -> None:
    with pytest.raises(InputError, match="not between 0 and 1"):
        Wish(share)


def test_the_smallest_weights_go_first_by_magnitude(candidates: Candidates) -> None:
    assert by_magnitude(candidates, Wish(0.5)) == ("blocks.2",)


def test_magnitudes_of_bfloat16_count_as_well() -> None:
    model = residual.denoiser()
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.dtype == ir.DataType.FLOAT:
            array = value.const_value.numpy().astype(ir.DataType.BFLOAT16.numpy())
            value.const_value, value.type = (
                ir.Tensor(array, name=value.name),
                ir.TensorType(ir.DataType.BFLOAT16),
            )
    assert by_magnitude(Candidates(model), Wish(0.5)) == ("blocks.2",)


def test_chance_follows_its_seed_and_reaches_the_share(candidates: Candidates) -> None:
    choices = {by_chance(candidates, Wish(0.4), seed) for seed in range(20)}
    assert len(choices) > 1
    assert all(candidates.freed(choice)[0] >= 0.4 * candidates.parameters for choice in choices)
    assert by_chance(candidates, Wish(0.4), 3) == by_chance(candidates, Wish(0.4), 3)


def test_handcrafted_choices_are_for_the_u_net_that_they_were_made_for(candidates: Candidates) -> None:
    with pytest.raises(PassError, match="made for the U-Net of Stable Diffusion 1"):
        by_hand(candidates, "bk-sdm-base")
