"""Sizes of the values inside of a foreign graph, where its exporter left them out.

Layers are removed, inherited and cut at values whose sizes are known, and torch's older exporter writes none. ONNX's
inference gives up at the first Reshape whose sizes are computed; with numbers in the place of names almost any graph
can be followed. So this is done for several sizes of the inputs, and what gives all that came out is written down.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import onnx_ir as ir

from trimtab.errors import PassError
from trimtab.export.onnx.graphs import SYMBOL, TRIAL
from trimtab.passes.propagation import propagate
from trimtab.shapes import evaluate

logger = logging.getLogger(__name__)

_ROWS = 2
"""A size that is found on the first axis of everything."""


def settle_inside(model: ir.Model, native: Mapping[str, int]) -> None:
    """Gives values inside of a graph the types and sizes that they lack, where those follow from the inputs'.

    A size is written as a product of the inputs' open sizes, each with a divisor (rounded up or down, as the graph
    does it), plus a number; what is no such thing stays unknown.

    Args:
        model: Edited. Its inputs' open sizes have plain names.
        native: Name of an open size -> a number that the graph can take, as it can take twice that.
    """
    graph = model.graph
    names = {dim.value for v in graph.inputs for dim in v.shape or () if isinstance(dim, ir.SymbolicDim)}
    symbols = sorted(str(name) for name in names)
    lacking = [v for node in graph for v in node.outputs if v.name and _lacks(v, symbols)]
    if not lacking:
        return
    first = {
        str(v.shape[0].value) for v in graph.inputs if v.shape and isinstance(v.shape[0], ir.SymbolicDim)
    }
    base = {name: native.get(name, _ROWS if name in first else TRIAL) for name in symbols}
    tries = [base, *({**base, name: 2 * base[name]} for name in symbols)]
    # Rounding shows at odd sizes, which not every graph can take.
    extra = [{**base, name: 2 * base[name] - 1} for name in symbols if name in native]
    try:
        found = [_sizes(model, sizes) for sizes in tries]
    except PassError as error:
        logger.debug("sizes inside of the graph stay unknown: %s", error)
        return
    for sizes in extra:
        try:
            found.append(_sizes(model, sizes))
            tries.append(sizes)
        except PassError:
            continue
    for value in lacking:
        extents = [sizes.get(value) for sizes in found]
        if extents[0] is None or any(e is None or len(e[0]) != len(extents[0][0]) for e in extents):
            continue
        known = [extent[0] for extent in extents if extent is not None]
        value.type = value.type or ir.TensorType(extents[0][1])
        value.shape = ir.Shape(
            [_explained(list(sizes), symbols, tries) for sizes in zip(*known, strict=True)]
        )


def _lacks(value: ir.Value, symbols: Sequence[str]) -> bool:
    if value.dtype is None or value.shape is None:
        return True
    dims = [dim.value for dim in value.shape if isinstance(dim, ir.SymbolicDim)]
    return any(dim is None or not set(SYMBOL.findall(dim)).issubset(symbols) for dim in dims)


def _sizes(
    model: ir.Model, symbols: Mapping[str, int]
) -> dict[ir.Value, tuple[tuple[int, ...], ir.DataType]]:
    inputs = {
        str(value.name): [
            dim if isinstance(dim, int) else evaluate(str(dim.value), symbols) for dim in value.shape or ()
        ]
        for value in model.graph.inputs
    }
    return {value: (extent.shape, extent.dtype) for value, extent in propagate(model, inputs).items()}


def _explained(
    sizes: list[int], symbols: Sequence[str], tries: Sequence[Mapping[str, int]]
) -> int | str | None:
    """What gives these sizes in these tries: the first, then one for each symbol doubled, then others."""
    base, doubled = sizes[0], sizes[1 : 1 + len(symbols)]
    if all(size == base for size in sizes):
        return base
    varying = [name for name, size in zip(symbols, doubled, strict=True) if size != base]
    growth = {size - base for size in doubled if size != base}
    if len(growth) != 1:
        return None  # the sum of several sizes
    whole = growth.pop()
    ratio = Fraction(whole, math.prod(tries[0][name] for name in varying))
    for text in _products(varying, ratio) if ratio > 0 else ():
        text = text if base == whole else f"{text} {'+' if base > whole else '-'} {abs(base - whole)}"
        if [evaluate(text, sizes) for sizes in tries] == sizes:
            return text
    return None


def _products(names: Sequence[str], ratio: Fraction) -> Iterator[str]:
    """Products of these sizes that are ``ratio`` of the plain one, all divided alike before one more than others."""
    if len(names) == 1:
        yield from _quotients(names[0], ratio)
        return
    root = _root(ratio, len(names))
    if root is not None:
        for parts in itertools.product(*(_quotients(name, root) for name in names)):
            yield "*".join(f"({part})" if not part.isidentifier() else part for part in parts)
    if ratio.denominator == 1:
        yield f"{ratio}*{'*'.join(names)}"
    for name in names:
        for rest in _products([other for other in names if other != name], ratio):
            yield f"{name}*({rest})"


def _root(ratio: Fraction, degree: int) -> Fraction | None:
    parts = [round(part ** (1 / degree)) for part in ratio.as_integer_ratio()]
    root = Fraction(*parts) if all(parts) else Fraction(0)
    return root if root**degree == ratio else None


def _quotients(name: str, ratio: Fraction) -> list[str]:
    above, below = ratio.as_integer_ratio()
    times = name if above == 1 else f"{above}*{name}"
    return [times] if below == 1 else [f"{times}//{below}", f"({times} - 1)//{below} + 1"]
