"""From trimtab's graphs, ONNX opset 23, to what one parser takes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    InlinePass,
    RemoveUnusedOpsetsPass,
)

from trimtab.errors import UnsupportedOp
from trimtab.passes.base import Pass
from trimtab.passes.decompose import DecomposeOperators
from trimtab.passes.merge import MergeWeights
from trimtab.passes.scopes import place
from trimtab.targets.operators import IR_VERSIONS, Parser


def lower(model: ir.Model, parser: Parser, forms: Sequence[Pass] = ()) -> ir.Model:
    """A copy of a graph that a parser takes.

    Equal weights become one, and then nodes that compute the same from the same: a DiT's 28 blocks bring 28 embedders,
    and an engine has one. Functions are written out, unknown operators are decomposed, and the opset is the newest that
    both know. Between opsets 19 and 23 every other operator only gained types, so the graph needs no conversion.

    Args:
        model: Of fixed sizes. Stays as it was; weights are shared.
        parser: What will read it.
        forms: Passes that give trimtab's own functions the form that the backend does best; they run while the
            functions still stand.

    Raises:
        UnsupportedOp: A node that the parser does not take, and that nothing here replaces.
    """
    model = model.clone()
    MergeWeights()(model)
    CommonSubexpressionEliminationPass()(model)
    for form in forms:
        form(model)
    InlinePass()(model)
    model.functions.clear()  # it leaves those that a form took every call of, at an opset of their own
    MergeWeights()(model)  # constants that the forms and the functions brought
    result = DecomposeOperators(lambda node: parser.refuses(node) is not None)(model)
    reasons = {refusal.where: refusal.reason for refusal in result.refused}
    for node in model.graph.all_nodes():
        if (problem := parser.refuses(node)) is not None:
            where = place(node)
            why = f"; it cannot be replaced, since {reasons[where]}" if where in reasons else ""
            raise UnsupportedOp(
                f"{node.domain + '::' if node.domain else ''}{node.op_type} of {where} {problem} ({parser.name}){why}: "
                "choose another target"
            )
    RemoveUnusedOpsetsPass()(model)
    if model.opset_imports.get("", 0) > parser.opset:
        model.opset_imports[""] = parser.opset
        model.ir_version = min(model.ir_version, IR_VERSIONS[parser.opset])
    return model
