"""ONNX Runtime's sessions: what is bound to them, and what they keep to themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from trimtab.errors import BundleError
from trimtab.runtime.sessions import OnnxRuntimeSession


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    model = helper.make_model(
        helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y]),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    onnx.save(model, tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


@pytest.mark.parametrize(("inputs", "outputs"), [("z", "y"), ("x", "z")])
def test_a_graph_of_other_names_than_the_bundle_says_is_one_line(
    graph: Path, inputs: str, outputs: str
) -> None:
    session = OnnxRuntimeSession(graph)
    with pytest.raises(BundleError, match=r"g\.onnx cannot be given z .*: compile the bundle again"):
        session.bind({inputs: np.zeros(2, np.float32)}, {outputs: np.zeros(2, np.float32)})
