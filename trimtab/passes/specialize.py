"""Fixing the sizes of a graph, and folding what then is constant."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import onnx_ir as ir
from onnxscript.optimizer import optimize_ir

from trimtab.errors import BundleError, PassError
from trimtab.passes.base import Pass, PassResult
from trimtab.passes.neutral import exact_neutral_elements
from trimtab.shapes import bind, evaluate
from trimtab.silence import errors_alone


class Specialize(Pass):
    """Gives a graph's inputs fixed sizes, and every other value the sizes that follow.

    The sizes of values are expressions over the inputs' names, which export left on them; those that a pass added are
    inferred. Arithmetic on sizes becomes constant and goes, by onnxscript's own folding. Exact: sizes aside, no
    number changes but for the order in which small constants are added up.

    Args:
        shapes: Graph input -> its sizes, for every input.

    Raises:
        PassError: An input is missing, or its sizes are not those that the graph declares.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)

    def call(self, model: ir.Model) -> PassResult:
        symbols = self._symbols(model.graph)
        fixed = []
        for value in _values(model):
            if value.shape is not None and not value.shape.is_static():
                sizes = [_known(dim, symbols) for dim in value.shape]
                value.shape = ir.Shape(sizes)
                fixed.append(value.name or "")
        if fixed:
            # It warns of results that are constants now: what follows from the picture's size alone.
            with errors_alone("onnx_ir", "onnxscript"), exact_neutral_elements():
                optimize_ir(model, num_iterations=4, inline=False)
        return PassResult(model, bool(fixed), tuple(fixed))

    def _symbols(self, graph: ir.Graph) -> dict[str, int]:
        symbols: dict[str, int] = {}
        for value in graph.inputs:
            name = value.name or ""
            if name not in self.shapes:
                raise PassError(f"the input {name} has no sizes: give some for it")
            assert value.shape is not None
            dims = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
            if (problem := bind(dims, self.shapes[name], symbols)) is not None:
                raise PassError(f"the input {name} cannot have the sizes {self.shapes[name]}: {problem}")
        for value in graph.inputs:
            for dim, size in zip(value.shape or (), self.shapes[value.name or ""], strict=True):
                if not isinstance(dim, int) and (wanted := _known(dim, symbols)) not in (size, dim):
                    raise PassError(
                        f"the input {value.name} cannot have the sizes {self.shapes[value.name or '']}: "
                        f"{dim.value} is {wanted}"
                    )
        return symbols


def _known(dim: int | ir.SymbolicDim, symbols: Mapping[str, int]) -> int | ir.SymbolicDim:
    """A size as a number where its names are known."""
    if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
        with contextlib.suppress(
            BundleError
        ):  # a name of the graph's inside, such as how many indices were found
            return evaluate(str(dim.value), symbols)
    return dim


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """Inputs and whatever nodes make, in subgraphs too."""
    yield from model.graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs
