"""TensorRT's engines by themselves, on a GPU that is not there: what is left where one cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from null_device import NullCuda, NullTensorRT

from trimtab.errors import BundleError, TargetError
from trimtab.manifest import Engine
from trimtab.runtime.sessions.cuda import Driver
from trimtab.runtime.sessions.tensorrt import TensorRT

ENGINE = Engine("ours", "tensorrt", "", 0, "")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[4] x) => (float[4] y) { y = Neg (x) }'
    )
    ir.save(model, tmp_path / "graph.onnx")
    return tmp_path / "graph.onnx"


def engine(graph: Path, scratch: int) -> Path:
    path = graph.with_name(f"{scratch}.engine")
    shapes, dtypes = {"x": [4], "y": [4]}, {"x": "float32", "y": "float32"}
    said = {"graph": str(graph), "shapes": shapes, "dtypes": dtypes, "scratch": scratch}
    path.write_text(json.dumps(said))
    return path


def test_an_engine_without_room_for_its_scratch_leaves_the_others_theirs(graph: Path) -> None:
    cuda = NullCuda()
    backend = TensorRT("tensorrt", Driver(cuda), NullTensorRT(cuda))
    x, y = backend.new((4,), "float32"), backend.new((4,), "float32")
    x[...] = np.arange(4, dtype=np.float32)
    run = backend.load(ENGINE, engine(graph, 1000)).bind({"x": x}, {"y": y})
    cuda.memory = sum(cuda.live.values()) + 100
    held = dict(cuda.live)
    with pytest.raises(TargetError, match="memory of Null GPU is full"):
        backend.load(ENGINE, engine(graph, 2000))
    assert sorted(cuda.live.values()) == sorted(held.values())
    run()  # the null device looks whether the scratch is still there
    cuda.memory = 8 << 30
    backend.load(ENGINE, engine(graph, 2000))
    run()
    np.testing.assert_array_equal(np.asarray(y), -np.arange(4, dtype=np.float32))
    assert backend.scratch_bytes == 2000
    backend.close()


def test_the_first_engine_without_room_leaves_nothing(graph: Path) -> None:
    cuda = NullCuda(memory=100)
    backend = TensorRT("tensorrt", Driver(cuda), NullTensorRT(cuda))
    with pytest.raises(TargetError, match="memory of Null GPU is full"):
        backend.load(ENGINE, engine(graph, 2000))
    assert not cuda.live and backend.scratch_bytes == 0
    backend.close()


def test_more_than_any_address_reaches_is_no_room() -> None:
    cuda = NullCuda()
    backend = TensorRT("tensorrt", Driver(cuda), NullTensorRT(cuda))
    for sides in ((2**62, 4), (2**62, 2**62, 2**62)):  # of which as many bytes as fit in 64 bits are 0
        with pytest.raises(TargetError, match="memory of Null GPU is full"):
            backend.new(sides, "float32")
    assert not cuda.live
    backend.close()


def test_an_empty_file_is_no_engine(graph: Path) -> None:
    cuda = NullCuda()
    backend = TensorRT("tensorrt", Driver(cuda), NullTensorRT(cuda))
    graph.with_name("empty.engine").touch()
    with pytest.raises(BundleError, match=r"empty\.engine is empty and no engine"):
        backend.load(ENGINE, graph.with_name("empty.engine"))
    backend.close()
