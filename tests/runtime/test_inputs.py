"""What is made of a request before a graph sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers.models import BPE

from trimtab.program import TensorSpec
from trimtab.runtime.inputs import Noise, Request, make_input
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
