"""Sizes that follow from other sizes: ``"rows*batch"``, ``"height//8"``, ``"((h - 1)//2) + 1"``.

Programs and graphs write an open size as an expression over symbols; here they become numbers.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Mapping, MutableMapping, Sequence

from trimtab.errors import BundleError

_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
FUNCTIONS: Mapping[str, Callable[..., int]] = {
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
}
"""What torch.export writes beside operators: no symbols."""


@functools.lru_cache(maxsize=1024)
def _parse(expression: str) -> ast.expr:
    try:
        return ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BundleError(
            f"{expression!r} is not a size: integers, names, + - * // and % are understood"
        ) from None


def evaluate(dim: int | str, symbols: Mapping[str, int]) -> int:
    """The value of a size.

    Args:
        dim: A number or an expression.
        symbols: Values of the names in it.

    Raises:
        BundleError: A name without a value, or something that is not a size.
    """
    if isinstance(dim, int):
        return dim
    try:
        return _value(_parse(dim), symbols, dim)
    except (TypeError, ZeroDivisionError, RecursionError):  # of a function, or too deep
        raise BundleError(f"the size {dim!r:.100} cannot be computed: compile again") from None


def _value(node: ast.expr, symbols: Mapping[str, int], whole: str) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in symbols:
            raise BundleError(
                f"the size {whole!r} needs {node.id}, and known are {', '.join(sorted(symbols))}"
            )
        return symbols[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, symbols, whole), _value(node.right, symbols, whole)
        if right == 0 and isinstance(node.op, ast.FloorDiv | ast.Mod):
            raise BundleError(f"the size {whole!r} divides by zero")
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, symbols, whole)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
        return FUNCTIONS[node.func.id](*(_value(argument, symbols, whole) for argument in node.args))
    raise BundleError(f"{whole!r} is not a size: integers, names, + - * // and % are understood")


def shape(dims: Sequence[int | str], symbols: Mapping[str, int]) -> tuple[int, ...]:
    """The sizes of a whole shape.

    Raises:
        BundleError: As in `evaluate`, or a size below 0.
    """
    sizes = tuple(evaluate(dim, symbols) for dim in dims)
    if any(size < 0 for size in sizes):
        raise BundleError(f"the shape {', '.join(map(str, dims)):.100} has a size below 0: compile again")
    return sizes


def bind(dims: Sequence[int | str], actual: Sequence[int], symbols: MutableMapping[str, int]) -> str | None:
    """Learns the values of plain names from a tensor's shape.

    Args:
        dims: What a graph declares for an input.
        actual: What it is given.
        symbols: Gains the names that are new.

    Returns:
        None where the shape fits, else what does not, for a message.
    """
    if len(dims) != len(actual):
        return f"{len(actual)} axes, {len(dims)} needed"
    for axis, (dim, size) in enumerate(zip(dims, actual, strict=True)):
        if isinstance(dim, str) and dim.isidentifier():
            wanted = symbols.setdefault(dim, size)
        elif isinstance(dim, int):
            wanted = dim
        else:
            continue  # an expression over other inputs' names
        if wanted != size:
            return f"{size} along axis {axis}, {wanted} needed"
    return None
