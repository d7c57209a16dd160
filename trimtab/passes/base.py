"""What a pass is: one graph in, one graph out, and a word on every place it looked at."""

from __future__ import annotations

import abc
import dataclasses

import onnx_ir as ir


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A place where a pass could have applied and did not.

    Attributes:
        where: The node or the module path.
        reason: Why not, in one line.
    """

    where: str
    reason: str


@dataclasses.dataclass
class PassResult(ir.passes.PassResult):
    """onnx_ir's result, with what was applied and what was refused in place of a bare flag.

    Attributes:
        applied: The places (nodes or module paths) that were rewritten.
        refused: The places that were left alone, each with its reason.
    """

    applied: tuple[str, ...] = ()
    refused: tuple[Refusal, ...] = ()


class Pass(ir.passes.InPlacePass):
    """Base of trimtab's passes: edits one graph in place.

    ``call`` returns a `PassResult`. A pass keeps no state between ``call``s; what it needs to know about the
    model (scores, codebooks, ranges) comes in through its constructor as frozen data.
    """

    @abc.abstractmethod
    def call(self, model: ir.Model) -> PassResult:
        """Edits the graph in place, and says what was applied and what was refused."""

    def __call__(self, model_or_result: ir.Model | ir.passes.PassResult, /) -> PassResult:
        result = super().__call__(model_or_result)
        assert isinstance(result, PassResult)
        return result
