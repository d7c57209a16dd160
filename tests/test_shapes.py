"""Sizes as expressions."""

from __future__ import annotations

import pytest

from trimtab.errors import BundleError
from trimtab.shapes import bind, evaluate, shape


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("height//8", 5),
        ("rows*batch", 6),
        ("8*((height - 1)//16) + 1", 17),
        ("-batch + 2*rows", 1),
        ("Max(batch, rows) % 2", 1),
        ("4*FloorDiv(height, 9)", 16),
        (7, 7),
    ],
)
def test_expressions_have_values(expression: str | int, value: int) -> None:
    assert evaluate(expression, {"height": 40, "batch": 3, "rows": 2}) == value


@pytest.mark.parametrize(
    "expression",
    [
        "width",
        "",
        "1 +",
        "batch**9",
        "__import__('os')",
        "batch.real",
        "[1][0]",
        "batch//0",
        "f'x'",
        "True",
        "1.5",
        "(" * 500,
    ],
)
def test_whatever_is_no_size_is_refused(expression: str) -> None:
    with pytest.raises(BundleError):
        evaluate(expression, {"batch": 3})


def test_a_shape_is_resolved_axis_by_axis() -> None:
    assert shape(("batch", 4, "height//8"), {"batch": 2, "height": 64}) == (2, 4, 8)


def test_a_size_below_nothing_is_refused() -> None:
    with pytest.raises(BundleError, match="the shape batch, h - 4 has a size below 0"):
        shape(("batch", "h - 4"), {"batch": 1, "h": 3})


def test_names_are_learned_from_a_tensor_and_then_hold() -> None:
    symbols: dict[str, int] = {}
    assert bind(("n", 4, "h", "2*h"), (3, 4, 8, 99), symbols) is None  # expressions are others' business
    assert symbols == {"n": 3, "h": 8}
    assert bind(("n",), (5,), symbols) == "5 along axis 0, 3 needed"
    assert bind((4,), (5,), symbols) == "5 along axis 0, 4 needed"
    assert bind(("n", "h"), (3,), symbols) == "1 axes, 2 needed"
