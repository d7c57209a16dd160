"""From graphs to a bundle's engines: which are made, what is shared, what is left to the device."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from engines import FakeBuilder, graph, rebuilt
from graphs import feeds_for

import trimtab
from trimtab.bundle import Bundle, open_bundle
from trimtab.errors import InputError, TrimtabError, UnsupportedOp
from trimtab.manifest import Engine
from trimtab.program import with_guidance
from trimtab.storage import GRAPHS, read_program
from trimtab.targets import cache as cache_module
from trimtab.targets.base import BuildOptions
from trimtab.targets.bindings import segment_shapes
from trimtab.targets.cache import EngineCache
from trimtab.targets.device import find_device
from trimtab.targets.engines import make_engines, obtain, open_cache
from trimtab.targets.operators import OLDEST_TENSORRT, tensorrt_parser
from trimtab.weights import WeightStore

DEVICE = find_device("cpu")


def engines_of(bundle: Bundle, target: str) -> dict[str, Engine]:
    return {
        name: next(engine for engine in segment.engines if engine.target == target)
        for name, segment in bundle.contents.segments.items()
    }


def outputs(file: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(file, options, ["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def test_a_jetson_gets_graphs_that_jetpack_6_parses_and_that_compute_the_same(copied_bundle: Path) -> None:
    weights = sum(path.stat().st_size for path in (copied_bundle / GRAPHS).glob("*.weights"))
    bundle = rebuilt(copied_bundle, "cpu", "orin-nano-8gb", "agx-orin-64gb")
    bundle.verify()
    parser = tensorrt_parser(OLDEST_TENSORRT)
    for name, engine in engines_of(bundle, "orin-nano-8gb").items():
        assert not engine.built and engine.path == engine.graph and engine.sm == "8.7"
        lowered = ir.load(bundle.path(engine.path))
        assert [node.op_type for node in lowered.graph.all_nodes() if parser.refuses(node)] == []
        assert lowered.opset_imports == {"": parser.opset}
        feeds = feeds_for(lowered)
        whole = outputs(bundle.path(bundle.contents.segments[name].graph), feeds)
        for ours, theirs in zip(outputs(bundle.path(engine.path), feeds), whole, strict=True):
            assert np.abs(ours - theirs).max() <= 1e-5
        assert engines_of(bundle, "agx-orin-64gb")[name].path == engine.path
    more = sum(path.stat().st_size for path in (copied_bundle / GRAPHS).glob("*.weights"))
    assert more < 1.05 * weights


def test_an_operator_that_onnx_runtime_lacks_is_found_while_compiling(tmp_path: Path) -> None:
    inputs, outputs, body = foreign.LINEAR
    foreign.write(tmp_path / "denoiser.onnx", inputs, outputs, body.replace("Add(s, t)", "Blend(s, t)"))
    (tmp_path / "model.toml").write_text(foreign.PIXELS)
    with pytest.raises(
        UnsupportedOp, match=r"^denoiser cannot run on the CPU.*Blend.*: export it with standard"
    ):
        trimtab.compile(tmp_path / "model.toml", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_an_rtx_gets_engines_that_devices_of_its_kind_share(copied_bundle: Path, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    cache = EngineCache(tmp_path / "cache")
    bundle = rebuilt(copied_bundle, "rtx-3060", "rtx-4090", "rtx-3090", cache=cache)
    bundle.verify()
    shapes = segment_shapes(bundle.contents, bundle.contents.size)
    for name, engine in engines_of(bundle, "rtx-3060").items():
        assert engine.built and engine.path == f"engines/rtx-3060/{name}.engine"
        assert engine.version == trt.__version__ and engine.sm == "8.6"
        assert engine.bytes == bundle.path(engine.path).stat().st_size
        assert shapes[name] == (engine.shapes,)
        assert engines_of(bundle, "rtx-3090")[name].path == engine.path
        assert engines_of(bundle, "rtx-4090")[name].path == f"engines/rtx-4090/{name}.engine"
    assert cache.stats().built == 2 * len(bundle.contents.segments)
    rebuilt(copied_bundle, "rtx-3090", cache=cache)
    assert cache.stats().built == 2 * len(bundle.contents.segments)


@pytest.mark.xdist_group("sd15")
def test_an_engine_is_made_for_every_size_but_once_where_the_size_is_nothing_to_it(
    bundle_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = open_bundle(bundle_folder("sd15"))
    segments = read_program(bundle).segments
    native = bundle.contents.size
    larger = (native[0] * 2, native[1])
    (tmp_path / GRAPHS).mkdir()
    made = make_engines(
        segments,
        bundle.contents,
        [find_device("orin-nano-8gb")],
        [native, larger],
        WeightStore(tmp_path / GRAPHS),
        tmp_path,
        None,
        logging.debug,
    )
    assert [engine.path for engine in made["text_encoder"]] == ["graphs/text_encoder.tensorrt-10.3.fp32.onnx"]
    assert [engine.path for engine in made["denoiser"]] == [
        "graphs/denoiser.tensorrt-10.3.fp32.onnx",
        f"graphs/denoiser.{larger[0]}x{larger[1]}.tensorrt-10.3.fp32.onnx",
    ]
    first, second = (engine.shapes["state"] for engine in made["denoiser"])
    assert second == (*first[:-1], 2 * first[-1])


@pytest.mark.xdist_group("sd15")
def test_every_segment_is_bound_to_one_picture_with_guidance(bundle_folder: Callable[[str], Path]) -> None:
    contents = open_bundle(bundle_folder("sd15")).contents
    shapes = segment_shapes(contents, contents.size)
    assert shapes.keys() == contents.segments.keys()
    (denoiser,) = shapes["denoiser"]
    assert denoiser["mix"] == (2,) and denoiser["state"][:2] == (contents.slots, 1)
    assert denoiser["encoder_hidden_states"][0] == 2
    (encoder,) = shapes["text_encoder"]
    assert encoder["tokens"][0] == 2


def test_a_model_that_is_compiled_for_no_guidance_gets_engines_of_one_row(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"targets": "orin-nano-8gb", "guidance": 0, "steps": 2, "cache": None}
    contents = trimtab.compile(pipeline_folder("dit"), tmp_path / "b", **options).contents
    assert {task.guidance for task in contents.tasks.values()} == {0.0}
    (engine,) = contents.segments["denoiser"].engines
    assert engine.shapes["mix"] == (1,) and engine.shapes["class_labels"] == (1,)


@pytest.mark.xdist_group("ddpm")
def test_a_scale_for_a_model_that_is_not_guided_is_refused(bundle_folder: Callable[[str], Path]) -> None:
    program = read_program(open_bundle(bundle_folder("ddpm")))
    assert with_guidance(program, 1.0) == program
    with pytest.raises(InputError, match="a guidance scale of 3 was given and this model has no guidance"):
        with_guidance(program, 3.0)


# ---- a cache that cannot be used ----


def test_a_cache_that_cannot_be_written_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert open_cache(tmp_path / "file" / "cache") is None
    assert "cannot be written" in caplog.text and "without a cache" in caplog.text
    assert open_cache(None) is None


def test_a_url_of_an_unknown_scheme_is_an_error() -> None:
    with pytest.raises(InputError, match="nosuch://x cannot be opened"):
        open_cache("nosuch://x")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_cache_that_fails_later_does_not_end_the_build(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise OSError(code, "no", str(tmp_path))

    cache, builder = EngineCache(tmp_path / "cache"), FakeBuilder(tmp_path / "counter")
    monkeypatch.setattr(cache_module, "write_note", fail)
    out = tmp_path / "engines" / "x.engine"
    obtain(cache, graph(), DEVICE, BuildOptions(), builder, out, print)
    assert out.read_bytes() == builder.payload
    assert "the engine is built without the cache" in caplog.text


def test_a_url_that_fails_leaves_the_local_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = EngineCache(f"file://{tmp_path}/file/cache", near=tmp_path / "near")
    builder, out = FakeBuilder(tmp_path / "counter"), tmp_path / "x.engine"
    obtain(cache, graph(), DEVICE, BuildOptions(), builder, out, print)
    assert out.read_bytes() == builder.payload and "the local cache goes on alone" in caplog.text


def test_a_builder_that_fails_is_not_taken_for_the_cache(tmp_path: Path) -> None:
    builder = FakeBuilder(tmp_path / "counter", fails="nothing")
    with pytest.raises(TrimtabError, match="ended without an engine"):
        obtain(EngineCache(tmp_path), graph(), DEVICE, BuildOptions(), builder, tmp_path / "out", print)
    assert builder.builds() == 1
