"""Text to token ids, with the tokenizer that the model was trained with."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import BundleError, first_line

logger = logging.getLogger(__name__)

Ids = npt.NDArray[np.int64]

LONGEST = 1 << 16
"""Tokens of a prompt: far beyond what any text encoder takes, and little memory."""


class Tokenizer:
    """A ``tokenizer.json`` that cuts and pads to a fixed length.

    Args:
        path: The file.

    Raises:
        BundleError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Fast

        try:
            self._fast = Fast.from_file(str(path))
        except Exception as error:  # tokenizers raises bare exceptions
            raise BundleError(
                f"{path} cannot be read as a tokenizer ({first_line(error)}): compile the bundle again"
            ) from None
        self._vectors = _several_vectors(self._fast)
        self._path, self._length = path, (self._fast.padding or {}).get("length")
        if not isinstance(self._length, int) or not 0 < self._length <= LONGEST:
            raise BundleError(
                f"{path} does not pad to a length of at most {LONGEST} tokens: compile the bundle again"
            )

    def encode(self, texts: Sequence[str], warn: bool = True) -> tuple[Ids, Ids]:
        """Token ids and attention mask, (len(texts), length) int64 each.

        A text that is too long is cut, with one warning that says what was left out.

        Raises:
            BundleError: The tokenizer does not do what it says.
        """
        try:
            if self._vectors:
                texts = [self._spelled_out(text) for text in texts]
            encodings = self._fast.encode_batch(list(texts))
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise  # Ctrl-C; what Rust gives up with is no Exception either
            raise BundleError(
                f"{self._path} cannot read a prompt ({first_line(error)}): compile the bundle again"
            ) from None
        if any(len(encoding.ids) != self._length for encoding in encodings):
            raise BundleError(f"{self._path} does not cut to {self._length} tokens: compile the bundle again")
        for text, encoding in dict(zip(texts, encodings, strict=True)).items():
            if encoding.overflowing and warn:
                kept = [(start, end) for start, end in encoding.offsets if start < end]
                first, last = (
                    min((start for start, _ in kept), default=0),
                    max((end for _, end in kept), default=0),
                )
                logger.warning(
                    "the prompt is longer than the %d tokens that the text encoder takes and was cut: %r is left out",
                    len(encoding.ids),
                    (text[:first] + text[last:]).strip(),
                )
        ids = np.array([encoding.ids for encoding in encodings], np.int64)
        return ids, np.array([encoding.attention_mask for encoding in encodings], np.int64)

    def _spelled_out(self, text: str) -> str:
        """A prompt in which a token of several vectors is followed by the others of them."""
        for token in {*self._fast.encode(text).tokens} & self._vectors.keys():
            text = text.replace(token, self._vectors[token])
        return text


def _several_vectors(fast: Any) -> dict[str, str]:
    """What stands in a prompt for the tokens of textual inversions that have several vectors, as in diffusers: of the
    added tokens ``<cat>``, ``<cat>_1`` and ``<cat>_2``, "<cat>" alone is written for all three.
    """
    added = {str(token.content) for token in fast.get_added_tokens_decoder().values()}

    def spelled(token: str) -> str:
        further = itertools.takewhile(added.__contains__, (f"{token}_{n}" for n in itertools.count(1)))
        return " ".join([token, *further])

    return {token: spelled(token) for token in added if f"{token}_1" in added}
