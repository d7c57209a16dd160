"""Real engines of TensorRT for RTX. Nothing here needs a GPU; nothing here could run one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import model, single, value
from packed import random_codes

from trimtab.errors import BuildFailed, MissingDependency, TargetError, UnsupportedOp
from trimtab.passes.codebooks import Codebooks
from trimtab.passes.precision import convert
from trimtab.passes.scopes import SCOPES
from trimtab.passes.vq import PackWeights
from trimtab.targets import network
from trimtab.targets.base import BuildOptions
from trimtab.targets.cache import EngineCache
from trimtab.targets.device import Device, find_device, known_devices
from trimtab.targets.engines import build_options, check_targets
from trimtab.targets.operators import RTX
from trimtab.targets.tensorrt_rtx import COMPUTE_CAPABILITIES, TensorRTRTXBuilder

trt = pytest.importorskip("tensorrt_rtx")

OPTIONS = BuildOptions(shapes={"x": (1, 2, 5, 4)})


def device(sm: str) -> Device:
    return Device("ours", "Ours", "tensorrt_rtx", sm=sm)


def attention(dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """y = Attention(x w, x w, x w), with a weight that lies in the graph."""
    x = value("x", (1, 2, 5, 4), dtype)
    product = ir.node("MatMul", [x, value("w", (4, 4))], name="product")
    product.outputs[0].name, product.outputs[0].shape = "p", ir.Shape((1, 2, 5, 4))
    seen = ir.node("Attention", product.outputs * 3, name="seen")
    seen.outputs[0].name, seen.outputs[0].shape = "y", ir.Shape((1, 2, 5, 4))
    for node in (product, seen):
        node.outputs[0].type = ir.TensorType(dtype)
    return model([x], [product, seen], seen.outputs, {"w": np.eye(4, dtype=dtype.numpy())})


def build(graph: ir.Model, sm: str, out: Path, options: BuildOptions = OPTIONS) -> Any:
    builder, said = TensorRTRTXBuilder(), []
    info = builder.build(builder.lower(graph, device(sm)), device(sm), options, out, said.append)
    return info, said


@pytest.mark.parametrize("sm", COMPUTE_CAPABILITIES)
def test_an_engine_is_built_for_every_compute_capability(sm: str, tmp_path: Path) -> None:
    info, said = build(attention(ir.DataType.FLOAT16), sm, tmp_path / "engine")
    assert info.bytes == (tmp_path / "engine").stat().st_size > 1000
    assert info.backend_version == trt.__version__ and info.backend == "tensorrt_rtx"
    assert info.peak_bytes > 50e6 and info.activation_bytes is not None
    assert any("Building engine" in text for text in said)
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


@pytest.mark.parametrize("sm", COMPUTE_CAPABILITIES)
def test_fp32_is_built_for_all_but_turing(sm: str, tmp_path: Path) -> None:
    if sm == "7.5":
        with pytest.raises(BuildFailed, match="FP32 GEMM is not supported"):
            build(attention(), sm, tmp_path / "engine")
    else:
        assert build(attention(), sm, tmp_path / "engine")[0].bytes > 1000


def test_the_table_of_compute_capabilities_is_the_builder_s_own() -> None:
    named = {name for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    assert named == {f"SM{sm.replace('.', '')}" for sm in COMPUTE_CAPABILITIES}
    ours = [d for d in known_devices().values() if d.backend == "tensorrt_rtx"]
    assert {d.sm for d in ours} <= set(COMPUTE_CAPABILITIES)
    check_targets(ours)


def test_the_parser_knows_every_operator_of_the_table() -> None:
    log = trt.Logger(trt.Logger.ERROR)
    parser = trt.OnnxParser(trt.Builder(log).create_network(0), log)
    assert [name for name in sorted(RTX.operators) if not parser.supports_operator(name)] == []


def test_devices_of_one_compute_capability_share_an_engine(tmp_path: Path) -> None:
    cache, builder = EngineCache(tmp_path), TensorRTRTXBuilder()
    sources = []
    for name in ("rtx-3060", "rtx-3090", "rtx-4090"):
        with cache.get_or_build(attention(), find_device(name), OPTIONS, builder) as entry:
            sources.append(entry.source)
            assert sorted(path.name for path in entry.path.parent.iterdir()) == ["engine", "entry.json"]
    assert sources == ["built", "local", "built"]


def test_a_device_that_it_does_not_build_for_is_refused_before_any_work() -> None:
    with pytest.raises(
        TargetError, match=r"compute capability 9\.0, and TensorRT for RTX builds for 7\.5, 8\.0"
    ):
        check_targets([find_device("cpu"), device("9.0")])


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "tensorrt_rtx" else real(name, *a)
    )
    with pytest.raises(MissingDependency, match=r"pip install 'trimtab\[rtx\]'"):
        check_targets([find_device("rtx-4090")])


def test_an_operator_that_the_parser_does_not_know_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    graph = single("MaxRoiPool", {"x": (1, 1, 4, 4), "rois": (1, 5)}, (1, 1, 2, 2), pooled_shape=[2, 2])
    with pytest.raises(UnsupportedOp, match="MaxRoiPool"):
        TensorRTRTXBuilder().build(graph, device("8.6"), OPTIONS, tmp_path / "engine", print)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_it_cannot_build_is_one_line(tmp_path: Path) -> None:
    graph = single("MatMul", {"a": (2, 3), "b": (4, 2)}, (2, 2))
    with pytest.raises(BuildFailed, match=r"built no engine for ours \(.+\): see its documentation") as error:
        build(graph, "8.6", tmp_path / "engine")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_an_option_that_its_configuration_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="has no 'speed'"):
        build(attention(), "8.6", tmp_path / "engine", BuildOptions(extra={"speed": 3}))


def with_weights_in_a_file(folder: Path) -> ir.Model:
    graph = attention()
    (folder / "all.weights").write_bytes(bytes(64) + np.eye(4, dtype=np.float32).tobytes())
    weight = graph.graph.initializers["w"]
    weight.const_value = ir.ExternalTensor(
        "all.weights", 64, 64, ir.DataType.FLOAT, shape=ir.Shape((4, 4)), name="w", base_dir=folder
    )
    (folder / "out").mkdir()
    return graph


def test_weights_in_files_are_linked_and_not_copied(tmp_path: Path) -> None:
    graph = with_weights_in_a_file(tmp_path)
    network.write_graph(graph, tmp_path / "out")
    links = [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]
    assert [link.resolve() for link in links] == [(tmp_path / "all.weights").resolve()]
    assert build(graph, "8.9", tmp_path / "out" / "engine")[0].bytes > 1000


@pytest.mark.parametrize("refused", [("symlink",), ("symlink", "link")])
def test_where_nobody_may_link_weights_have_a_hard_link_or_a_copy(
    refused: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("a required privilege is not held by the client")

    graph = with_weights_in_a_file(tmp_path)
    for name in refused:
        monkeypatch.setattr(os, name, refuse)
    network.write_graph(graph, tmp_path / "out")
    (written,) = [path for path in (tmp_path / "out").iterdir() if path.name == "0.weights"]
    assert written.read_bytes() == (tmp_path / "all.weights").read_bytes() and not written.is_symlink()
    assert written.samefile(tmp_path / "all.weights") == ("link" not in refused)


def test_a_build_takes_nothing_heavy_into_its_process() -> None:
    code = "import sys, trimtab.targets.worker; print(sorted(m for m in sys.modules if m in sys.argv[1:]))"
    heavy = ("torch", "onnx", "onnx_ir", "numpy", "diffusers", "tensorrt_rtx")
    done = subprocess.run([sys.executable, "-c", code, *heavy], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def modulated(blocks: int, side: int) -> ir.Model:
    """As in a DiT: an embedder, and blocks that each shift and scale by what a packed weight makes of it."""
    wide, codes, nodes = (2, 16, side), {}, []
    x, h = value("x", (2, side)), value("h", wide)
    random = np.random.default_rng(0).standard_normal((side, side)).astype(np.float32)
    weights = {"embedder": random, "ones": np.ones(side, np.float32), "axis": np.array([1])}

    def add(op: str, inputs: list[Any], shape: tuple[int, ...], count: int = 1, **attributes: Any) -> Any:
        made = ir.node(op, inputs, attributes, num_outputs=count, name=f"{op}{len(nodes)}")
        for number, output in enumerate(made.outputs):
            output.name, output.shape = f"{made.name}.{number}", ir.Shape(shape)
            output.type = ir.TensorType(ir.DataType.FLOAT)
        made.metadata_props[SCOPES] = repr(["", f"blocks.{block}", "node"])
        nodes.append(made)
        return made.outputs[0] if count == 1 else made.outputs

    block, last = 0, h
    embedded = add("MatMul", [x, value("embedder", [])], (2, side))
    for block in range(blocks):
        codes[f"{block}.w"] = random_codes((2 * side, side), seed=block)
        weights[f"{block}.w"] = codes[f"{block}.w"].rows()
        made = add("Gemm", [embedded, value(f"{block}.w", [])], (2, 2 * side), transB=1)
        shift, scale = add("Split", [made], (2, side), 2, axis=1, num_outputs=2)
        normal = add("LayerNormalization", [last, value("ones", [])], wide)
        scaled = add("Mul", [normal, add("Unsqueeze", [scale, value("axis", [])], (2, 1, side))], wide)
        last = add("Add", [scaled, add("Unsqueeze", [shift, value("axis", [])], (2, 1, side))], wide)
    whole = model([x, h], nodes, [last], weights)
    PackWeights(Codebooks("", codes))(whole)
    return whole


@pytest.mark.parametrize(("precision", "itemsize"), [("fp32", 4), ("fp16", 2)])
def test_packed_weights_of_many_blocks_are_neither_stored_nor_decoded_at_once(
    precision: str, itemsize: int, tmp_path: Path
) -> None:
    blocks, side = 8, 512
    shapes = {"x": (2, side), "h": (2, 16, side)}
    options = build_options(find_device("rtx-4090"), shapes, precision, packed=True)
    info, _ = build(
        convert(modulated(blocks, side), precision, {}).model, "8.9", tmp_path / "engine", options
    )
    codes, decoded = blocks * 2 * side * side // 4, 2 * side * side * itemsize
    assert info.bytes < codes + decoded // 2 + 1_500_000, (
        "the engine holds decoded weights"
    )  # and the embedder
    assert info.activation_bytes < 8 * 2**20 + 2 * decoded, "it decodes the weights of many blocks at once"
