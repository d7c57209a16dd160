"""The key changes with everything that an engine depends on, and with nothing else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from engines import DEVICE, OPTIONS, FakeBuilder, graph

from trimtab.errors import InputError
from trimtab.targets.base import BuildOptions
from trimtab.targets.key import EngineKey, engine_key, graph_digest
from trimtab.weights import WeightStore


def saved(folder: Path, model: ir.Model, **options: Any) -> ir.Model:
    folder.mkdir()
    ir.save(model, folder / "model.onnx", **options)
    return ir.load(folder / "model.onnx")


def annotated(model: ir.Model) -> ir.Model:
    model.metadata_props["made"] = "today"
    model.doc_string = model.graph.doc_string = "words"
    for node in model.graph:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = "['a']"
        node.doc_string = "words"
        for value in node.outputs:
            value.metadata_props["x"] = "y"
    return model


def test_the_digest_does_not_see_where_weights_are_stored(tmp_path: Path) -> None:
    big = np.random.default_rng(0).standard_normal((4, 1024)).astype(np.float32)

    def model(order: int = 1) -> ir.Model:
        return graph(big, order=order)

    stored = tmp_path / "store"
    stored.mkdir()
    layouts = [
        saved(tmp_path / "inside", model()),
        saved(tmp_path / "one", model(), external_data="a.data", size_threshold_bytes=0),
        saved(tmp_path / "other", model(-1), external_data="b.data", size_threshold_bytes=0),
        WeightStore(stored).keep("segment", model()),
    ]
    assert {graph_digest(layout) for layout in layouts} == {graph_digest(model())}


@pytest.mark.parametrize(
    "same",
    [lambda: annotated(graph()), lambda: graph(order=-1), lambda: graph(names="other_")],
    ids=["metadata", "order", "names"],
)
def test_the_digest_does_not_see_metadata_order_and_inner_names(same: Callable[[], ir.Model]) -> None:
    assert graph_digest(same()) == graph_digest(graph())


def flipped_bit(model: ir.Model) -> None:
    value = model.graph.initializers["w"]
    data = value.const_value.numpy().copy()
    data.view(np.uint8)[3, 15] ^= 1
    value.const_value = ir.tensor(data)


def other_dtype(model: ir.Model) -> None:
    value = model.graph.initializers["b"]
    value.const_value = ir.tensor(value.const_value.numpy().view(np.int32))


def other_shape(model: ir.Model) -> None:
    value = model.graph.initializers["w"]
    value.const_value = ir.tensor(value.const_value.numpy().reshape(2, 8))


def other_name(model: ir.Model) -> None:
    model.graph.initializers["b"].name = "c"


def other_input(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape(["n", 5])


def other_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "why"


def other_input_type(model: ir.Model) -> None:
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT16)


def swapped_wires(model: ir.Model) -> None:
    add = model.graph[1]
    left, right = add.inputs
    add.replace_input_with(0, right)
    add.replace_input_with(1, left)


def swapped_outputs(model: ir.Model) -> None:
    model.graph.outputs.reverse()


def other_operator(model: ir.Model) -> None:
    model.graph[3].op_type = "Abs"


def other_domain(model: ir.Model) -> None:
    model.graph[3].domain = "mine"


def more_attributes(model: ir.Model) -> None:
    model.graph[0].attributes.add(ir.AttrInt64("axis", 1))


def other_branch(model: ir.Model) -> None:
    inner = model.graph[2].attributes["else_branch"].as_graph()
    inner[0].attributes.add(ir.AttrFloat32("alpha", 0.3))


def other_opset(model: ir.Model) -> None:
    model.graph.opset_imports[""] = 22


def one_node_more(model: ir.Model) -> None:
    model.graph.append(ir.node("Neg", [model.graph.inputs[0]]))


@pytest.mark.parametrize(
    "change",
    [
        flipped_bit,
        other_dtype,
        other_shape,
        other_name,
        other_input,
        other_input_type,
        other_output,
        swapped_wires,
        swapped_outputs,
        other_operator,
        other_domain,
        more_attributes,
        other_branch,
        other_opset,
        one_node_more,
    ],
)
def test_the_digest_sees(change: Callable[[ir.Model], None]) -> None:
    model = graph()
    change(model)
    assert graph_digest(model) != graph_digest(graph())


def test_texts_of_a_tensor_are_told_apart() -> None:
    def texts(*values: bytes) -> ir.Model:
        model = graph()
        tensor = ir.StringTensor(list(values), shape=ir.Shape([len(values)]))
        model.graph[0].attributes.add(ir.AttrTensor("t", tensor))
        return model

    assert graph_digest(texts(b"ab", b"c")) != graph_digest(texts(b"a", b"bc"))
    assert graph_digest(texts(b"ab")) == graph_digest(texts(b"ab"))


def test_packed_weights_are_seen_as_they_are_stored(tmp_path: Path) -> None:
    import ml_dtypes

    codes = (np.arange(16).reshape(4, 4) % 7).astype(ml_dtypes.int4)
    model = graph(codes)
    assert graph_digest(
        saved(tmp_path / "x", model, external_data="d", size_threshold_bytes=0)
    ) == graph_digest(model)
    other = codes.copy()
    other[0, 0] = 5
    assert graph_digest(graph(other)) != graph_digest(model)


def key(tmp_path: Path, options: BuildOptions = OPTIONS, device: Any = DEVICE, **builder: str) -> EngineKey:
    return engine_key(graph(), device, options, FakeBuilder(tmp_path / "counter", **builder))


def test_every_option_is_in_the_key(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.so"
    plugin.write_bytes(b"code")
    other = {
        "shapes": {"x": (2, 4)},
        "precision": "fp32",
        "workspace_bytes": 1 << 30,
        "optimization_level": 2,
        "extra": {"sparse": True},
        "plugins": (plugin,),
    }
    assert set(other) == {field.name for field in dataclasses.fields(BuildOptions)}
    digests = {
        key(tmp_path, dataclasses.replace(OPTIONS, **{name: value})).digest for name, value in other.items()
    }
    digests |= {key(tmp_path, dataclasses.replace(OPTIONS, extra={"sparse": 1})).digest, key(tmp_path).digest}
    assert len(digests) == len(other) + 2


def test_an_option_that_is_added_later_is_in_the_key(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class More(BuildOptions):
        refit: bool = False

    assert key(tmp_path, More(refit=True)).digest != key(tmp_path, More()).digest


def test_every_field_of_the_key_is_in_its_hash(tmp_path: Path) -> None:
    one = key(tmp_path)
    for field in dataclasses.fields(EngineKey):
        value = getattr(one, field.name)
        other = (
            value | {"more": 1}
            if isinstance(value, dict)
            else (*value, "x")
            if field.name == "plugins"
            else "x"
        )
        assert dataclasses.replace(one, **{field.name: other}).digest != one.digest


def test_the_device_the_backend_and_its_version_are_in_the_key_and_the_title_is_not(tmp_path: Path) -> None:
    one = key(tmp_path).digest
    assert key(tmp_path, version="1.2.4").digest != one
    assert key(tmp_path, backend="other").digest != one
    assert key(tmp_path, device=dataclasses.replace(DEVICE, name="gpu")).digest != one
    assert key(tmp_path, device=dataclasses.replace(DEVICE, title="Another")).digest == one


def test_plugins_are_known_by_their_contents(tmp_path: Path) -> None:
    digests = []
    for name, code in (("a.so", b"1"), ("b.so", b"1"), ("a.so", b"2")):
        (tmp_path / name).write_bytes(code)
        digests.append(key(tmp_path, BuildOptions(plugins=(tmp_path / name,))).digest)
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(InputError, match="cannot be read"):
        key(tmp_path, BuildOptions(plugins=(tmp_path / "none.so",)))


def test_the_key_survives_json_and_does_not_depend_on_order(tmp_path: Path) -> None:
    one = key(tmp_path, BuildOptions(shapes={"a": (1,), "b": (2,)}))
    other = key(tmp_path, BuildOptions(shapes={"b": (2,), "a": (1,)}))
    assert one.digest == other.digest and len(one.digest) == 64
    assert json.loads(json.dumps(one.plain())) == one.plain()


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, Path("x"), {1: 2}])
def test_what_json_cannot_say_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InputError, match=r"options\.extra\.x is .*: convert it"):
        key(tmp_path, BuildOptions(extra={"x": value}))
