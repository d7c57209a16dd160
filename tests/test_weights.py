"""Weights beside the graphs: each once, and nothing dead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from trimtab.weights import (
    INLINE_BYTES,
    WeightStore,
    load_model,
    parameter_count,
    repeated_bytes,
    same_numbers,
    weight_bytes,
)


def graph(**weights: np.ndarray) -> ir.Model:
    values = [ir.Value(name=name, const_value=ir.tensor(array)) for name, array in weights.items()]
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 23}), ir_version=10)


def arrays(model: ir.Model) -> dict[str, np.ndarray]:
    return {str(name): value.const_value.numpy() for name, value in model.graph.initializers.items()}


BIG = np.arange(1000, dtype=np.float32)


def test_large_tensors_go_to_the_file_and_small_ones_stay(tmp_path: Path) -> None:
    model = WeightStore(tmp_path).keep("a", graph(big=BIG, small=BIG[:4]))
    external = {n: isinstance(v.const_value, ir.ExternalTensor) for n, v in model.graph.initializers.items()}
    assert external == {"big": True, "small": False}
    assert np.array_equal(arrays(model)["big"], BIG)
    assert BIG.nbytes <= (tmp_path / "a.weights").stat().st_size < BIG.nbytes + INLINE_BYTES


def test_equal_tensors_of_two_graphs_are_written_once(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    store.keep("a", graph(x=BIG))
    other = store.keep("b", graph(y=BIG.copy(), z=BIG + 1))
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 2 * BIG.nbytes + 128
    assert np.array_equal(arrays(other)["y"], BIG) and np.array_equal(arrays(other)["z"], BIG + 1)


def test_bytes_that_several_tensors_share_count_once(tmp_path: Path) -> None:
    model = WeightStore(tmp_path).keep(
        "a", graph(x=BIG, y=BIG.copy(), z=BIG + 1, small=BIG[:4], same=BIG[:4])
    )
    assert weight_bytes(model) == 2 * BIG.nbytes + 2 * BIG[:4].nbytes
    assert repeated_bytes(model) == BIG.nbytes
    assert weight_bytes(graph(x=BIG, y=BIG.copy())) == 2 * BIG.nbytes


def test_equal_bytes_of_another_shape_or_type_are_other_tensors(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    model = store.keep("a", graph(x=BIG, y=BIG.reshape(10, 100), z=BIG.view(np.int32)))
    found = arrays(model)
    assert found["y"].shape == (10, 100) and found["z"].dtype == np.int32


def test_a_graph_without_large_tensors_has_no_file(tmp_path: Path) -> None:
    WeightStore(tmp_path).keep("a", graph(x=BIG[:3]))
    assert not list(tmp_path.iterdir())


def test_keeping_twice_writes_nothing_new(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    model = store.keep("a", graph(x=BIG))
    before = (tmp_path / "a.weights").read_bytes()
    store.keep("a", model)
    assert (tmp_path / "a.weights").read_bytes() == before


def test_compact_drops_what_no_graph_reads_any_more(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    models = {
        "a": store.keep("a", graph(x=BIG, y=BIG + 1)),
        "b": store.keep("b", graph(y=BIG + 1, z=BIG + 2)),
    }
    del models["a"].graph.initializers["x"]
    store.compact(models)
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 2 * BIG.nbytes + 128
    assert np.array_equal(arrays(models["a"])["y"], BIG + 1)
    assert np.array_equal(arrays(models["b"])["y"], BIG + 1)
    assert np.array_equal(arrays(models["b"])["z"], BIG + 2)
    assert np.array_equal(arrays(store.keep("c", graph(w=BIG + 2)))["w"], BIG + 2)


def test_counts_are_of_floats_and_bytes_of_everything() -> None:
    model = graph(w=BIG, scale=np.float32([2.0]), index=np.arange(10))
    assert parameter_count(model) == 1000
    assert weight_bytes(model) == 4000 + 4 + 80


def test_the_same_memory_holds_the_same_numbers_without_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    square = BIG.reshape(25, 40)
    with monkeypatch.context() as patch:
        patch.delattr(np, "array_equal")
        assert same_numbers(square.T, BIG.reshape(25, 40).T)
    turned = BIG[:900].reshape(30, 30)
    assert not same_numbers(turned, turned.T)  # from one place, in another order


def test_numbers_are_the_same_in_one_type_and_shape_whether_or_not_they_are_any() -> None:
    broken = np.array([1, np.nan], np.float32)
    assert same_numbers(broken, broken.copy()) and not same_numbers(broken, np.array([np.nan, 1], np.float32))
    assert not same_numbers(BIG, BIG.astype(np.int32)) and not same_numbers(BIG, BIG.reshape(25, 40))
    assert same_numbers(BIG.astype(np.uint8), BIG.astype(np.uint8))


def test_a_function_reads_no_file_out_of_the_folder_of_its_graph(tmp_path: Path) -> None:
    import onnx

    (tmp_path / "secret").write_bytes(bytes(4))
    (tmp_path / "model").mkdir()
    tensor = onnx.TensorProto(name="t", data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=str(tmp_path / "secret"))
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g () => (float[1] y) {}')
    function = proto.functions.add(name="Read", domain="odd", output=["c"])
    function.node.append(onnx.helper.make_node("Constant", [], ["c"], value=tensor))
    onnx.save(proto, tmp_path / "model" / "a.onnx")
    (read,) = load_model(tmp_path / "model" / "a.onnx").functions.values()
    with pytest.raises(ValueError, match="outside the base directory"):
        read[0].attributes["value"].value.numpy()
