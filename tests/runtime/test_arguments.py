"""Loose arguments: which of them fit together."""

from __future__ import annotations

import pytest

from trimtab.errors import InputError
from trimtab.program import TensorSpec
from trimtab.runtime.arguments import all_negatives

KINDS = {"tokens": TensorSpec("tokens", "int64", ("rows*batch", 77), {"kind": "tokens"})}


def test_negative_prompts_follow_their_prompts() -> None:
    assert all_negatives(KINDS, "x", 6, 2) == all_negatives(KINDS, ["x"], 6, 2) == ("x",) * 6
    assert all_negatives(KINDS, ["x", "y", "z"], 6, 2) == ("x", "x", "y", "y", "z", "z")
    assert all_negatives(KINDS, list("uvwxyz"), 6, 2) == tuple("uvwxyz")


@pytest.mark.parametrize("negatives", [[], ["x", "y"], ["x"] * 4])
def test_negative_prompts_that_fit_no_prompts_are_refused(negatives: list[str]) -> None:
    # Two negatives for six pictures would each go to a prompt and a half.
    with pytest.raises(InputError, match=f"{len(negatives)} negative prompts were given for 6 pictures"):
        all_negatives(KINDS, negatives, 6, 2)
