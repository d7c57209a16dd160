"""Engines on a GPU that is not there: what is copied, queued, captured and shared on the way to a picture."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import null_device
import numpy as np
import pytest
from null_device import NullCuda, NullTensorRT

import trimtab
from trimtab.bundle import open_bundle, write_manifest
from trimtab.errors import InputError, MissingDependency, TargetError, WrongDevice
from trimtab.manifest import Engine
from trimtab.runtime.bench import _picture
from trimtab.runtime.load import Pipeline
from trimtab.runtime.sessions import onnxruntime as ort_sessions
from trimtab.runtime.sessions import open_backend
from trimtab.runtime.sessions.cuda import Driver

TARGET = "rtx-4090"
REQUEST: dict[str, Any] = {"label": 1, "seed": 3, "guidance": 4.0, "schedule": 3}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> NullCuda:
    """The driver of a GPU."""
    null = NullCuda()
    monkeypatch.setattr("trimtab.runtime.sessions.cuda._open", lambda: null)
    return null


@pytest.fixture
def tensorrt(cuda: NullCuda, monkeypatch: pytest.MonkeyPatch) -> NullTensorRT:
    """TensorRT on it."""
    module = NullTensorRT(cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


@pytest.fixture(scope="module")
def built(bundle_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny DiT with engines for a GPU beside those of the CPU, built for `REQUEST`."""
    source = bundle_folder("dit")
    folder = Path(shutil.copytree(source, tmp_path_factory.mktemp("built") / "dit.bundle"))
    with trimtab.load(source) as pipe:
        _, plan, _ = pipe.prepare(**REQUEST)
        contents = pipe.bundle.contents
        calls = [call for step in plan.steps for call in step.calls]
        bound = {c.segment: c for c in (*plan.prologue.calls, *calls, *plan.epilogue.calls)}
    (folder / "engines" / TARGET).mkdir(parents=True)
    segments = {}
    for index, (name, segment) in enumerate(contents.segments.items()):
        tensors = {**bound[name].inputs, **bound[name].outputs} if name in bound else {}
        path = folder / "engines" / TARGET / f"{name}.engine"
        said = {
            "graph": str(source / segment.graph),
            "shapes": {tensor: buffer.shape for tensor, buffer in tensors.items()},
            "dtypes": {tensor: buffer.dtype.name for tensor, buffer in tensors.items()},
            "scratch": 1000 * (index + 1),
        }
        path.write_text(json.dumps(said))
        engine = Engine(
            TARGET,
            "tensorrt",
            path.relative_to(folder).as_posix(),
            path.stat().st_size,
            segment.graph,
            version="10.3.0",
            sm="8.9",
            shapes={tensor: buffer.shape for tensor, buffer in bound[name].inputs.items()} if tensors else {},
        )
        segments[name] = dataclasses.replace(segment, engines=(*segment.engines, engine))
    write_manifest(folder, dataclasses.replace(contents, segments=segments))
    return folder


@pytest.fixture(scope="module")
def on_the_cpu(built: Path) -> np.ndarray:
    with trimtab.load(built, target="cpu") as pipe:
        return pipe(**REQUEST).pixels


def test_a_picture_from_engines_is_that_of_the_graphs(
    built: Path, tensorrt: NullTensorRT, on_the_cpu: np.ndarray
) -> None:
    with trimtab.load(built) as pipe:
        assert pipe.engines.target == TARGET  # built for this GPU: it goes before the CPU
        pictures = [pipe(**REQUEST).pixels for _ in range(3)]  # plainly, captured, launched
    assert all(np.array_equal(picture, on_the_cpu) for picture in pictures)


def test_the_host_sees_inputs_and_the_picture_and_nothing_between(
    built: Path, cuda: NullCuda, tensorrt: NullTensorRT
) -> None:
    with trimtab.load(built) as pipe:
        pipe(**REQUEST)
        cuda.uploads = cuda.downloads = 0
        _, plan, _ = pipe.prepare(**REQUEST)
        pipe(**REQUEST)
    assert cuda.uploads == len(plan.inputs) + sum(len(step.draws) for step in plan.steps)
    assert cuda.downloads == 1


def test_steps_that_call_the_same_share_one_graph(
    built: Path, cuda: NullCuda, tensorrt: NullTensorRT
) -> None:
    with trimtab.load(built) as pipe:
        request = REQUEST | {"schedule": 20}
        pipe(**request)
        _, plan, _ = pipe.prepare(**request)
        different = len({id(step.bound) for step in plan.steps})
        assert different < len(plan.steps)
        cuda.log.clear()
        pipe(**request)
    launches = [line for line in cuda.log if line.startswith("launch")]
    assert len(launches) == len(plan.steps)
    assert len(set(launches)) == different
    assert cuda.log.count("capture") == 1  # of the last step, which ran once before: the others are there


def test_bench_times_steps_as_they_run_and_calls_in_a_picture_of_their_own(
    built: Path, tensorrt: NullTensorRT, cuda: NullCuda
) -> None:
    with trimtab.load(built, target=TARGET) as pipe:
        options = {"label": 1, "seed": 0, "schedule": 3, "guidance": 4.0}
        for _ in range(2):  # plainly, and captured
            pipe(**options)
        cuda.log.clear()
        drawn = _picture(pipe, options)
    launches = [line for line in cuda.log if line.startswith("launch")]
    assert len(launches) == 3 and cuda.log.index(launches[0]) < cuda.log.index("run denoiser")
    assert len(drawn["calls"]["denoiser"]) == 3 and len(drawn["steps"]) == 3


def test_an_engine_runs_once_before_it_is_captured(
    built: Path, cuda: NullCuda, tensorrt: NullTensorRT
) -> None:
    with trimtab.load(built) as pipe:
        pipe(**REQUEST | {"schedule": 20})
    first = cuda.log.index("run denoiser")
    assert "capture" not in cuda.log[:first]
    capture = cuda.log.index("capture")
    assert cuda.log[capture : capture + 3] == ["capture", "run denoiser", "launch 1"]


def test_what_cannot_be_captured_runs_plainly(
    built: Path, cuda: NullCuda, tensorrt: NullTensorRT, on_the_cpu: np.ndarray
) -> None:
    tensorrt.capturable = False
    with trimtab.load(built) as pipe:
        pictures = [pipe(**REQUEST).pixels for _ in range(3)]
    assert not [line for line in cuda.log if line.startswith("launch")]
    assert all(np.array_equal(picture, on_the_cpu) for picture in pictures)


def test_all_contexts_share_one_scratch_of_the_largest_size(built: Path, tensorrt: NullTensorRT) -> None:
    with trimtab.load(built) as pipe:
        pipe(**REQUEST)
        scratches = {context.scratch for context in tensorrt.contexts}
        assert len(tensorrt.contexts) > 1
        assert scratches == {
            (next(iter(scratches))[0], max(c.engine.device_memory_size_v2 for c in tensorrt.contexts))
        }


def test_nothing_is_left_on_the_gpu(built: Path, cuda: NullCuda, tensorrt: NullTensorRT) -> None:
    with trimtab.load(built) as pipe:
        pipe(**REQUEST)
        assert cuda.live
    del pipe
    assert not cuda.live and cuda.log[-1] == "release"


@pytest.mark.parametrize("here", ["version 10.13.0", "sm 8.7"])
def test_another_version_or_gpu_is_refused_before_anything_is_read(
    built: Path, cuda: NullCuda, tensorrt: NullTensorRT, here: str
) -> None:
    kind, value = here.split()
    if kind == "version":
        tensorrt.__version__ = value
    else:
        cuda.sm = (8, 7)
    was = {"version": "TensorRT 10.3.0", "sm": "compute capability 8.9"}[kind]
    with pytest.raises(WrongDevice, match=f"{was} and .*{value}.*trimtab build"):
        trimtab.load(built, target=TARGET)
    assert tensorrt.loads == 0
    with trimtab.load(built) as pipe:  # without a wish there is the CPU
        assert pipe.engines.target == "cpu"


def test_a_damaged_engine_says_what_tensorrt_said(
    built: Path, tensorrt: NullTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(said: Any, data: Any) -> Any:
        said._logger.log(tensorrt.ILogger.Severity.ERROR, "the magic tag does not match\nmore")

    monkeypatch.setattr(null_device.NullRuntime, "deserialize_cuda_engine", damaged)
    with (
        trimtab.load(built) as pipe,
        pytest.raises(TargetError, match=r"magic tag does not match\).*trimtab build"),
    ):
        pipe(**REQUEST)


def test_without_tensorrt_the_extra_is_named(
    built: Path, cuda: NullCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match=r"trimtab\[tensorrt\]"):
        trimtab.load(built, target=TARGET)


@pytest.mark.parametrize("devices", [0, None])
def test_without_a_gpu_the_error_says_so(
    built: Path, tensorrt: NullTensorRT, cuda: NullCuda, monkeypatch: pytest.MonkeyPatch, devices: int | None
) -> None:
    if devices is None:
        monkeypatch.undo()
        monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
        monkeypatch.setattr("trimtab.runtime.sessions.cuda.LIBRARY", "libcuda-that-is-not-there.so")
    else:
        cuda.devices = devices
    with pytest.raises(TargetError, match=r"NVIDIA driver.*--target cpu"):
        trimtab.load(built, target=TARGET)


def test_a_full_gpu_says_how_much_was_needed(built: Path, cuda: NullCuda, tensorrt: NullTensorRT) -> None:
    cuda.memory = 2000
    with trimtab.load(built) as pipe, pytest.raises(TargetError, match=r"memory of Null GPU is full.*MiB"):
        pipe(**REQUEST)


def test_a_plugin_that_cannot_be_registered_is_said_before_the_engine_is_read(
    built: Path, tensorrt: NullTensorRT, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "with.bundle"))
    (folder / "engines" / "codes.so").write_bytes(b"no library")
    contents = open_bundle(built).contents
    segments = {
        name: dataclasses.replace(
            segment,
            engines=tuple(dataclasses.replace(e, plugins=("engines/codes.so",)) for e in segment.engines),
        )
        for name, segment in contents.segments.items()
    }
    write_manifest(folder, dataclasses.replace(contents, segments=segments))
    with trimtab.load(folder) as pipe, pytest.raises(TargetError, match=r"codes.so cannot be registered"):
        pipe(**REQUEST)
    assert tensorrt.loads == 0
    tensorrt.libraries.add(str(folder / "engines" / "codes.so"))
    with trimtab.load(folder) as pipe:
        pipe(**REQUEST)
    assert tensorrt.loads > 0


# ---- engines for fixed sizes ----


def test_engines_for_two_guidance_rows_draw_without_guidance_too(built: Path, tensorrt: NullTensorRT) -> None:
    plain = REQUEST | {"guidance": 1.0}
    with trimtab.load(built, target="cpu") as pipe:
        expected = pipe(**plain).pixels
    with trimtab.load(built) as pipe:
        result = pipe(**plain)
    assert np.abs(result.pixels - expected).max() < 1e-5  # one row more in the same products
    assert result.settings["guidance"] == 1.0


@pytest.mark.parametrize("seed", [5, [5, 6, 7]])
def test_engines_for_one_picture_draw_several_in_turn(
    built: Path, tensorrt: NullTensorRT, seed: int | list[int]
) -> None:
    several = REQUEST | {"label": [1, 0, 2], "seed": seed}
    with trimtab.load(built, target="cpu") as pipe:
        expected = pipe(**several).pixels
    steps: list[tuple[int, int]] = []
    with trimtab.load(built) as pipe:
        result = pipe(**several, on_step=lambda done, total: steps.append((done, total)))
        with pytest.raises(InputError, match="draw 1 at a time"):
            pipe.prepare(**several)
    assert result.pixels.shape[0] == 3 and np.abs(result.pixels - expected).max() < 1e-5
    assert steps == [(k, 9) for k in range(1, 10)]


# ---- ONNX Runtime on CUDA ----


def on_null_cuda(built: Path, cuda: NullCuda, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """ONNX Runtime's CUDA sessions on the null device: its memory is the host's, so the CPU's kernels serve."""
    plain = ort_sessions.OnnxRuntimeCuda.__init__

    def patched(self: Any, driver: Any, **options: Any) -> None:
        plain(self, driver, "CPUExecutionProvider", "cpu", **options)

    monkeypatch.setattr(ort_sessions.OnnxRuntimeCuda, "__init__", patched)
    run = ort_sessions.OnnxRuntimeSession.bind

    def bind(self: Any, inputs: Any, outputs: Any) -> Any:
        inner = run(self, inputs, outputs)
        return lambda: (cuda.log.append("run"), cuda.enqueue(inner))

    monkeypatch.setattr(ort_sessions.OnnxRuntimeSession, "bind", bind)
    return trimtab.load(built, provider="cuda")


def test_onnx_runtime_on_cuda_keeps_its_tensors_there(
    built: Path, cuda: NullCuda, monkeypatch: pytest.MonkeyPatch, on_the_cpu: np.ndarray
) -> None:
    with on_null_cuda(built, cuda, monkeypatch) as pipe:
        assert pipe.engines.target == "cpu"  # its graphs, on the other provider
        pipe(**REQUEST)
        cuda.uploads = cuda.downloads = 0
        picture = pipe(**REQUEST).pixels
        _, plan, _ = pipe.prepare(**REQUEST)
    assert np.array_equal(picture, on_the_cpu)
    assert cuda.uploads == len(plan.inputs) + sum(len(step.draws) for step in plan.steps)
    assert cuda.downloads == 1


@pytest.mark.parametrize(
    ("changes", "file"),
    [
        ({}, "graphs/u.onnx"),
        ({"packed": True}, "graphs/u.cpu.onnx"),
        ({"precision": "int8"}, "graphs/u.cpu.onnx"),
    ],
    ids=["dense", "packed", "int8"],
)
def test_onnx_runtime_on_cuda_runs_the_graph_that_was_not_changed_for_the_cpu(
    cuda: NullCuda, changes: dict[str, Any], file: str
) -> None:
    engine = Engine("cpu", "onnxruntime", "graphs/u.cpu.onnx", 1, "graphs/u.onnx", **changes)
    backend = ort_sessions.OnnxRuntimeCuda(Driver(cuda))
    assert backend.file(engine) == file
    assert ort_sessions.OnnxRuntimeCpu().file(engine) == "graphs/u.cpu.onnx"
    backend.close()


@pytest.mark.parametrize(("fast", "said"), [(False, "0"), (True, "1")])
def test_onnx_runtime_on_cuda_takes_tf32_only_where_it_is_asked_to_be_fast(
    cuda: NullCuda, monkeypatch: pytest.MonkeyPatch, fast: bool, said: str
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(
        ort_sessions,
        "OnnxRuntimeSession",
        lambda path, threads, *given, fold, new: opened.append((*given, new, fold)),
    )
    backend = open_backend("onnxruntime", provider="cuda", fast=fast)
    for packed in (False, True):
        backend.load(Engine("cpu", "onnxruntime", "u.onnx", 1, "u.onnx", packed=packed), Path("u.onnx"))
    ((name, options), device, new, fold) = opened[0]
    assert new == backend.new  # what packed weights are decoded in lies on the device too
    assert (name, options["use_tf32"], device) == ("CUDAExecutionProvider", said, "cuda")
    assert fold and not opened[1][-1]  # what is packed stays packed
    backend.close()


def test_onnx_runtime_without_cuda_says_what_to_install(built: Path, cuda: NullCuda) -> None:
    with (
        trimtab.load(built, provider="cuda") as pipe,
        pytest.raises(TargetError, match="then pip install 'onnxruntime-gpu"),
    ):
        pipe(**REQUEST)


def test_a_provider_is_for_onnx_runtime_alone(built: Path, tensorrt: NullTensorRT) -> None:
    with pytest.raises(InputError, match="leave --provider or --target out"):
        trimtab.load(built, target=TARGET, provider="cuda")
    with pytest.raises(InputError, match="no provider 'rocm'"):
        trimtab.load(built, provider="rocm")


def test_with_low_memory_the_engines_of_one_stage_are_there(
    built: Path, tensorrt: NullTensorRT, on_the_cpu: np.ndarray
) -> None:
    for target in ("cpu", TARGET):
        with trimtab.load(built, target=target, low_memory=True) as pipe:
            seen: list[set[str]] = []
            load = pipe.engines.backend.load

            def watched(
                engine: Engine, *rest: Any, load: Any = load, seen: Any = seen, pipe: Any = pipe
            ) -> Any:
                seen.append({Path(path).stem for path in (*pipe.engines._loaded, engine.path)})
                return load(engine, *rest)

            pipe.engines.backend.load = watched  # type: ignore[method-assign]
            pictures = [pipe(**REQUEST).pixels for _ in range(2)]
            assert seen == 2 * [{"denoiser"}, {"vae_decoder"}]
            assert all(np.array_equal(picture, on_the_cpu) for picture in pictures)


def test_opening_the_bundle_reads_no_engine(built: Path, tensorrt: NullTensorRT) -> None:
    open_bundle(built)
    with trimtab.load(built):
        assert tensorrt.loads == 0
