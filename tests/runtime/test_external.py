"""What a graph reads beside itself is found wherever in it a tensor may stand."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import helper

from trimtab.errors import BundleError
from trimtab.runtime.external import external_locations


def outside(location: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=location, data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="offset", value="0")
    return tensor


def test_a_tensor_is_found_wherever_it_stands(tmp_path: Path) -> None:
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=outside("branch"))], "g", [], [])
    inner.initializer.append(outside("inner"))
    nodes = [
        helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner),
        helper.make_node("Odd", [], [], tensors=[outside("one"), outside("../two")]),
    ]
    graph = helper.make_graph(
        nodes, "g", [], [], [outside("weights"), helper.make_tensor("w", 1, [1], [2.0])]
    )
    graph.sparse_initializer.add(values=outside("values"), indices=outside("indices"))
    model = helper.make_model(graph)
    model.functions.add(name="f").node.append(
        helper.make_node("Constant", [], ["c"], value=outside("/function"))
    )
    model.training_info.add().algorithm.initializer.append(outside("training"))
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    found = {"branch", "inner", "one", "../two", "weights", "values", "indices", "/function", "training"}
    assert external_locations(tmp_path / "a.onnx") == found


def test_the_key_may_come_last_and_words_elsewhere_are_no_places(tmp_path: Path) -> None:
    tensor = onnx.TensorProto(name="location", doc_string="location")
    entry = b"\x12\x04evil\x0a\x08location"  # as protobuf may also write it
    data = tensor.SerializeToString() + bytes([13 << 3 | 2, len(entry)]) + entry
    graph = bytes([5 << 3 | 2, len(data)]) + data
    (tmp_path / "a.onnx").write_bytes(bytes([7 << 3 | 2, len(graph)]) + graph)
    assert external_locations(tmp_path / "a.onnx") == {"evil"}


@pytest.mark.parametrize(
    "data", [b"\x3a\x09location", b"\x3a", b"\x3b", b"\xff" * 11, b"\x3a\x0b\x2a\x09location"]
)
def test_what_is_no_graph_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.onnx").write_bytes(data)
    with pytest.raises(BundleError, match="cannot be read as a graph"):
        external_locations(tmp_path / "a.onnx")


def test_a_key_that_other_readers_cut_to_32_bits_hides_no_place(tmp_path: Path) -> None:
    data = outside("/hidden").SerializeToString()
    graph = b"\xaa\x80\x80\x80\x10" + bytes([len(data)]) + data  # field 5, and a bit above the 32nd
    (tmp_path / "a.onnx").write_bytes(bytes([7 << 3 | 2, len(graph)]) + graph)
    with pytest.raises(BundleError, match="cannot be read as a graph"):
        external_locations(tmp_path / "a.onnx")
