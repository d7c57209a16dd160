"""ONNX Runtime's sessions: what is bound to them, and what they keep to themselves."""

from __future__ import annotations

import os
import subprocess
import sys
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


def test_nothing_of_a_run_is_kept_or_sent_elsewhere(graph: Path, tmp_path: Path) -> None:
    place = tmp_path / "home"
    place.mkdir()
    # It reports nothing from tests or build machines, whatever it is told.
    hints = ("CI", "PYTEST", "ORT_", "GITHUB", "TF_BUILD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hints)}
    code = (
        "import sys; from pathlib import Path; from trimtab.runtime.sessions import OnnxRuntimeSession; "
        "OnnxRuntimeSession(Path(sys.argv[1]))"
    )
    subprocess.run(
        [sys.executable, "-c", code, graph],
        check=True,
        env=environment | {"HOME": str(place), "TMPDIR": str(place), "XDG_CACHE_HOME": str(place)},
    )
    assert list(place.rglob("*")) == []
