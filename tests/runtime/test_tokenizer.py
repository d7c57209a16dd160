"""Tokenizer files are untrusted input, and so are prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from trimtab.errors import BundleError
from trimtab.runtime.tokenizer import LONGEST, Tokenizer


def saved(folder: Path, length: int | None, cut: int | None, unknown: str = "[UNK]") -> Path:
    fast = Fast(WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token=unknown))
    fast.pre_tokenizer = Whitespace()
    fast.enable_padding(length=length)
    if cut is not None:
        fast.enable_truncation(cut)
    fast.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_texts_are_cut_and_padded_to_the_length(tmp_path: Path) -> None:
    ids, mask = Tokenizer(saved(tmp_path, 3, 3)).encode(["b", "a b a b a", ""])
    assert ids.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize(("side", "left_out"), [("left", "'a b'"), ("right", "'b a'")])
def test_one_warning_says_what_was_cut_off_on_either_side(
    side: str, left_out: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fast = Fast.from_file(str(saved(tmp_path, 3, 3)))
    fast.enable_truncation(3, direction=side)
    fast.save(str(tmp_path / "tokenizer.json"))
    Tokenizer(tmp_path / "tokenizer.json").encode([" a b a b a "] * 4)
    assert caplog.text.count(f"was cut: {left_out} is left out") == 1


@pytest.mark.parametrize("length", [None, 0, LONGEST + 1, 2**40])
def test_a_file_that_pads_to_no_length_is_refused_before_it_reads_a_prompt(
    tmp_path: Path, length: int | None
) -> None:
    with pytest.raises(BundleError, match="does not pad"):
        Tokenizer(saved(tmp_path, length, 3))


def test_a_file_that_does_not_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not cut to 3 tokens"):
        Tokenizer(saved(tmp_path, 3, None)).encode(["a", "a b a b a"])


def test_a_file_that_fails_on_a_prompt_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot read a prompt"):
        Tokenizer(saved(tmp_path, 3, 3, unknown="[NONE]")).encode(["c"])


def test_a_file_that_makes_rust_panic_is_one_line(tmp_path: Path) -> None:
    path = saved(tmp_path, 3, 3)
    data = json.loads(path.read_text())
    data["truncation"]["stride"] = 9
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match="cannot read a prompt"):
        Tokenizer(path).encode(["a b a b a"])


def test_a_token_of_several_vectors_stands_for_all_of_them(tmp_path: Path) -> None:
    fast = Fast.from_file(str(saved(tmp_path, 8, 8)))
    fast.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "<dog>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    ids, _ = Tokenizer(tmp_path / "tokenizer.json").encode(["a <cat> b", "b <dog> <cat>_1"])
    assert ids.tolist() == [[0, 3, 4, 5, 1, 0, 0, 0], [1, 6, 4, 0, 0, 0, 0, 0]]
