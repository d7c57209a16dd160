"""Text to token ids, with the tokenizer that the model was trained with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trimtab.errors import BundleError

logger = logging.getLogger(__name__)

Ids = npt.NDArray[np.int64]


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
                f"{path} cannot be read as a tokenizer ({error}): compile the bundle again"
            ) from None

    def encode(self, texts: Sequence[str], warn: bool = True) -> tuple[Ids, Ids]:
        """Token ids and attention mask, (len(texts), length) int64 each.

        A text that is too long is cut, with a warning that says what was left out.
        """
        encodings = self._fast.encode_batch(list(texts))
        for text, encoding in zip(texts, encodings, strict=True):
            if encoding.overflowing and warn:
                cut = max((end for _, end in encoding.offsets), default=0)
                logger.warning(
                    "the prompt is longer than the %d tokens that the text encoder takes and was cut: %r is left out",
                    len(encoding.ids),
                    text[cut:].strip(),
                )
        ids = np.array([encoding.ids for encoding in encodings], np.int64)
        return ids, np.array([encoding.attention_mask for encoding in encodings], np.int64)
