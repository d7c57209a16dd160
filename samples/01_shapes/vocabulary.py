"""A CLIP tokenizer with a vocabulary as small as the grammar: one token for each of its words.

CLIP's tokenizer is byte-pair encoding over bytes, so a vocabulary with all 256 bytes in it takes any text.
The merges are found as usual: join the commonest pair of neighbours until every word is one token.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from shapes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES
from transformers import CLIPTokenizer

MAX_LENGTH = 32  # the longest caption has 30 words; a start and an end come on top
START, END = "<|startoftext|>", "<|endoftext|>"
_WORDS = sorted(
    {*SHAPES, *SIZES, *COLOURS, *BACKGROUNDS, "a", "and", "at", "the", "on", "background"}
    | {word for position in POSITIONS for word in position.split()}
)


def _byte_symbols() -> list[str]:
    """A visible character for each byte, in CLIP's order: printable bytes stand for themselves.

    The others take the code points from 256 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) for byte in visible] + [chr(256 + n) for n in range(len(hidden))]


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges that make each word a single token; ties go to the pair that sorts first."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in pieces:
            n = 0
            while n < len(word) - 1:
                if (word[n], word[n + 1]) == best:
                    word[n : n + 2] = ["".join(best)]
                n += 1
    return merges


def write_files(folder: Path) -> None:
    """Write vocab.json and merges.txt, all that a CLIPTokenizer needs."""
    merges = _merges(_WORDS)
    symbols = _byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: n for n, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def new_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write the files to a folder and load the tokenizer from them."""
    write_files(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH})
    )
    return CLIPTokenizer.from_pretrained(folder)
