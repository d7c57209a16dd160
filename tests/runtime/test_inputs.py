"""What is made of a request before a graph sees it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers.models import BPE

from trimtab.errors import BundleError
from trimtab.program import TEXT, TensorSpec
from trimtab.runtime.inputs import TEXT_GROUP, Noise, Request, make_input, text_length, unguided
from trimtab.runtime.tokenizer import Tokenizer

LENGTH = 8


@pytest.fixture
def asked(tmp_path: Path) -> Request:
    fast = Fast(BPE(vocab={"-": 0, "a": 1, "A": 2, " ": 3, ":": 4}, merges=[]))
    fast.enable_padding(length=LENGTH, pad_token="-")
    fast.enable_truncation(LENGTH)
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizers = {"letters": Tokenizer(tmp_path / "tokenizer.json")}
    return Request(2, 2, (64, 64), Noise((0,)), (" A a ", "a"), ("A ", "a"), tokenizers=tokenizers)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, ["A ", "a", " A a ", "a"]),
        ({"lowercase": True}, ["a", "a", "a a", "a"]),
        ({"instruction": "A: "}, ["A ", "a", "A:  A a ", "A: a"]),
        ({"lowercase": True, "instruction": "A: "}, ["a", "a", "A: a a", "A: a"]),
        ({"prefix": ":", "suffix": "A"}, [":A A", ":aA", ": A a A", ":aA"]),
    ],
)
def test_prompts_are_written_as_the_model_reads_them_and_negative_ones_without_an_instruction(
    options: dict[str, Any], rows: list[str], asked: Request
) -> None:
    source = {"kind": "tokens", "tokenizer": "letters", **options}
    spec = TensorSpec("tokens", "int64", ("rows*batch", LENGTH), source)
    mask = TensorSpec("mask", "int64", ("rows*batch", LENGTH), {**source, "kind": "token_mask"})
    words = ["".join("-aA :"[k] for k in row) for row in make_input(spec, asked)]
    assert words == [row.ljust(LENGTH, "-") for row in rows]
    assert make_input(mask, asked).sum(1).tolist() == [len(row) for row in rows]


@pytest.mark.parametrize("kind", ["noise", "posterior_noise"])
@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_noise_without_axes_is_one_line(kind: str, seeds: tuple[int, ...]) -> None:
    asked = Request(2, 1, (64, 64), Noise(seeds))
    with pytest.raises(BundleError, match="is one number, and pictures need some each: compile again"):
        make_input(TensorSpec("noise", "float32", (), {"kind": kind}), asked)


@pytest.mark.parametrize(("length", "warned"), [(1, True), (2, False), (LENGTH, False)])
def test_a_negative_prompt_of_which_less_is_read_than_of_others_is_cut_with_a_warning(
    length: int, warned: bool, asked: Request, caplog: pytest.LogCaptureFixture
) -> None:
    source = {"kind": "tokens", "tokenizer": "letters", "instruction": "A: ", "negative_length": length}
    make_input(TensorSpec("tokens", "int64", ("rows*batch", LENGTH), source), asked)
    assert (f"the negative prompt is longer than the {length} tokens" in caplog.text) == warned


@pytest.mark.parametrize(("rows", "positive"), [(2, [0, 0, 1, 1]), (1, [1, 1])])
def test_rows_of_negative_prompts_are_told_from_the_others(rows: int, positive: list[int]) -> None:
    spec = TensorSpec("positive", "float32", ("rows*batch", 1), {"kind": "positive"})
    found = make_input(spec, Request(2, rows, (64, 64), Noise((0,))))
    assert found[:, 0].tolist() == positive


@pytest.mark.parametrize(
    ("options", "longest", "tokens"),
    [
        ({}, 1, TEXT_GROUP),
        ({}, TEXT_GROUP, TEXT_GROUP),
        ({}, TEXT_GROUP + 1, 2 * TEXT_GROUP),
        ({}, 200, 100),
        ({"suffix": ":"}, TEXT_GROUP, 2 * TEXT_GROUP),
        ({"negative_length": 60}, 1, 2 * TEXT_GROUP),  # the negative prompt's token is the 41st of the row
    ],
)
def test_texts_of_open_length_have_as_many_groups_of_tokens_as_the_longest_needs(
    options: dict[str, Any], longest: int, tokens: int, tmp_path: Path
) -> None:
    fast = Fast(BPE(vocab={"-": 0, "a": 1, ":": 2}, merges=[]))
    fast.enable_padding(length=100, pad_token="-")
    fast.enable_truncation(100)
    fast.save(str(tmp_path / "tokenizer.json"))
    asked = Request(
        2,
        2,
        (64, 64),
        Noise((0,)),
        ("a", "a" * longest),
        ("a", "a"),
        tokenizers={"t": Tokenizer(tmp_path / "tokenizer.json")},
    )
    source = {"kind": "tokens", "tokenizer": "t", "length": 100, **options}
    specs = [
        TensorSpec("tokens", "int64", ("rows*batch", TEXT), source),
        TensorSpec("mask", "int64", ("rows*batch", TEXT), {**source, "kind": "token_mask"}),
    ]
    assert text_length(specs, asked) == tokens
    assert text_length(specs, None) == 100
    ids, mask = (make_input(spec, replace(asked, tokens=tokens)) for spec in specs)
    assert ids.shape == mask.shape == (4, tokens)
    assert (ids > 0).sum(1).tolist() == mask.sum(1).tolist()
    assert mask.sum(1)[3] == min(longest + len(options.get("suffix", "")), 100)


def test_a_text_of_a_length_of_its_own_leaves_nothing_open(asked: Request) -> None:
    spec = TensorSpec("tokens", "int64", ("rows*batch", LENGTH), {"kind": "tokens", "tokenizer": "letters"})
    assert text_length([spec], asked) == text_length([spec], None) == 0


@pytest.mark.parametrize(("unguided", "weights"), [(1, [-2.0, 3.0]), (0, [-3.0, 4.0])])
def test_the_rows_of_guidance_are_weighted_from_the_scale_that_changes_nothing(
    unguided: int, weights: list[float]
) -> None:
    spec = TensorSpec("mix", "float32", ("rows",), {"kind": "mix", "classifier_free": True})
    asked = Request(1, 2, (64, 64), Noise((0,)), guidance=3.0, unguided=unguided)
    assert make_input(spec, asked).tolist() == weights


@pytest.mark.parametrize(("source", "scale"), [({}, 1), ({"unguided": 0}, 0), ({"unguided": 1}, 1)])
def test_the_scale_that_changes_nothing_is_1_where_the_bundle_says_no_other(
    source: dict[str, Any], scale: int
) -> None:
    assert unguided({"mix": TensorSpec("mix", "float32", ("rows",), {"kind": "mix", **source})}) == scale


def test_a_scale_that_changes_nothing_and_is_no_number_is_the_bundle_s_fault() -> None:
    spec = TensorSpec("mix", "float32", ("rows",), {"kind": "mix", "unguided": "none"})
    with pytest.raises(BundleError, match="mix has unguided 'none', and a number is needed: compile again"):
        unguided({"mix": spec})
