"""The kernels against a plain loop, in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trimtab.targets.plugins.codes import as_words

pytest.importorskip("triton")

# One rounding of the result to 16 bits, the accumulators being fp32: half a unit in the last place of the largest
# value, 2^-11. Of bfloat16 the interpreter cuts off what hardware rounds: a whole unit, 2^-7.
HALF, BFLOAT = 2.0**-11, 2.0**-7


@pytest.fixture(scope="module")
def results() -> dict[str, float]:
    script = Path(__file__).with_name("interpret.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=True
    )
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("name", ["a product", "odd sizes", "two weights a codeword", "six bits"])
def test_the_product_is_rounded_once(results: dict[str, float], name: str) -> None:
    assert 0 < results[name] <= HALF


def test_the_product_is_rounded_once_in_bfloat16(results: dict[str, float]) -> None:
    assert 0 < results["bfloat16"] <= BFLOAT


@pytest.mark.parametrize(
    "name",
    [
        "decode 3x3",
        "decode 3x3, six bits",
        "decode 1x3, six bits",
        "decode a matrix of more than a program",
        "decode a row of more than a program",
        "decode 1x1 of odd channels",
        "decode 3x3 of odd channels, six bits",
        "decode with scales",
    ],
)
def test_decoding_is_exact(results: dict[str, float], name: str) -> None:
    assert results[name] == 0


def test_rows_become_words_with_their_bytes_in_order() -> None:
    rows = np.arange(34, dtype=np.uint8).reshape(2, 17)
    words = as_words(rows)
    assert words.shape == (2, 8) and words.dtype == np.int32
    assert words[1].tobytes() == bytes(range(17, 34)) + bytes(15)
