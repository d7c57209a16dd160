"""trimtab build on a Jetson whose TensorRT launches packed weights' kernels from the C++ library."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import NANO, ORIN, Fake

from trimtab.bundle import file_hash, open_bundle, update_manifest
from trimtab.cli import main
from trimtab.errors import BuildFailed, BundleError, MissingDependency
from trimtab.manifest import Engine
from trimtab.runtime.sessions import check
from trimtab.runtime.sessions.tensorrt import import_backend
from trimtab.storage import with_engines
from trimtab.targets import insert
from trimtab.targets.device import find_device
from trimtab.targets.finish import build
from trimtab.targets.wanted import with_target

pytestmark = pytest.mark.xdist_group("dit")

At = Callable[[Any], None]

STUB = Path(__file__).parent / "plugins" / "stub"


@pytest.fixture
def packed(folder: Path) -> Path:
    """A bundle whose denoiser has packed weights in FP16, as far as its list of contents goes."""
    contents = open_bundle(folder).contents
    segment = contents.segments["denoiser"]
    engines = [dataclasses.replace(e, precision="fp16") for e in segment.engines]
    segment = dataclasses.replace(segment, domains={"trimtab": 1}, engines=tuple(engines))
    update_manifest(
        folder, dataclasses.replace(contents, segments={**contents.segments, "denoiser": segment})
    )
    return folder


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CMake finds TensorRT's header (a stand-in for it) and CUDA's."""
    places = [
        Path("/usr/local/cuda/include"),
        *(Path(p) / "triton/backends/nvidia/include" for p in sys.path),
    ]
    cuda = next((place for place in places if (place / "cuda.h").is_file()), None)
    if cuda is None or not (shutil.which("cmake") and shutil.which("g++")):
        pytest.skip("no cmake, no g++ or no cuda.h on this machine")
    monkeypatch.setenv("CMAKE_INCLUDE_PATH", os.pathsep.join(map(str, (STUB, cuda))))
    yield


def engine(folder: Path, segment: str = "denoiser") -> Engine:
    return next(e for e in open_bundle(folder).contents.segments[segment].engines if e.target == NANO)


def libraries(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.so"))


def test_the_library_is_built_once_named_by_its_hash_and_registered_before_the_graph_is_parsed(
    packed: Path, fake: Fake, at: At, headers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake()
    at(ORIN)
    build(packed, [NANO], cache=None)
    (path,) = engine(packed).plugins
    assert path == f"engines/{NANO}/libtrimtab_vq-{file_hash(packed / path)[:16]}.so"
    assert libraries(packed) == [path] and engine(packed, "vae_decoder").plugins == ()
    open_bundle(packed).verify()
    names = [call[0] for call in calls()]
    loaded = names.index("load_library")
    assert names.count("load_library") == 1 and "parse_from_file" in names[loaded:]
    assert calls()[loaded] == ["load_library", str(packed / path)]
    # What is there is used again, without CMake.
    (packed / engine(packed, "vae_decoder").path).unlink()
    monkeypatch.setenv("PATH", "")
    assert [made.segment for made in build(packed, [NANO], cache=None).made] == ["vae_decoder"]
    assert engine(packed).plugins == (path,) and libraries(packed) == [path]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A compiler that writes a few bytes at once; the libraries that it has written."""
    made: list[Path] = []

    def library(folder: Path) -> Path:
        folder.mkdir(parents=True)
        path = folder / "libtrimtab_vq.so"
        path.write_bytes(b"a library")
        made.append(path)
        return path

    monkeypatch.setattr("trimtab.targets.finish.check_tools", lambda: None)
    monkeypatch.setattr(insert, "build_library", library)
    return made


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"another")])
def test_a_library_that_is_missing_or_another_is_found_before_anything_is_loaded_and_built_again(
    packed: Path, fake: Fake, at: At, compiled: list[Path], damage: Callable[[Path], None]
) -> None:
    fake()
    at(ORIN)
    build(packed, [NANO], cache=None)
    (path,) = engine(packed).plugins
    damage(packed / path)
    with pytest.raises(BundleError, match=r"libtrimtab_vq-\w+\.so (is missing|has 7 bytes)"):
        open_bundle(packed).verify([engine(packed).path, *engine(packed).plugins])  # as the runtime does
    report = build(packed, [NANO], cache=None)
    assert [(made.segment, made.reason) for made in report.made] == [
        ("denoiser", "its file or its plugin library was missing or damaged")
    ]
    assert len(compiled) == 2
    open_bundle(packed).verify()
    assert libraries(packed) == list(engine(packed).plugins)


@pytest.mark.parametrize(
    ("lacks", "words"),
    [
        ("cmake", "cmake was not found: apt-get install cmake g\\+\\+ libnvinfer-headers-dev"),
        ("compiler", "a C\\+\\+ compiler was not found: apt-get install g\\+\\+"),
        ("TensorRT", r"NvInferRuntime\.h was not found: apt-get install libnvinfer-headers-dev"),
    ],
)
def test_what_the_library_needs_is_said_before_anything_is_built(
    packed: Path,
    fake: Fake,
    at: At,
    headers: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lacks: str,
    words: str,
) -> None:
    calls = fake()
    at(ORIN)
    if lacks == "cmake":
        monkeypatch.setenv("PATH", "")
    elif lacks == "compiler":
        monkeypatch.setenv("CXX", "/no/such/compiler")
    else:
        monkeypatch.delenv("CMAKE_INCLUDE_PATH")
        if Path("/usr/include/NvInferRuntime.h").exists():
            pytest.skip("TensorRT's headers are installed")
    assert main(["build", str(packed), "--target", NANO, "--no-cache"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(words, said), said
    assert calls() == [] and libraries(packed) == [] and not engine(packed, "vae_decoder").built


def test_a_build_that_stops_after_the_library_leaves_none_behind(
    packed: Path, fake: Fake, at: At, compiled: list[Path]
) -> None:
    fake("none")
    at(ORIN)
    with pytest.raises(BuildFailed):
        build(packed, [NANO], cache=None)
    assert len(compiled) == 1 and libraries(packed) == []
    open_bundle(packed).verify()


def test_from_10_9_on_no_library_is_built(
    packed: Path, fake: Fake, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(version="10.16.0.1")
    at(dataclasses.replace(ORIN, l4t="39.2.0", jetpack="7.2", backend_version="10.16.0.1"))
    monkeypatch.setenv("PATH", "")
    build(packed, [NANO], cache=None)
    assert engine(packed).built and engine(packed).plugins == () and libraries(packed) == []


def test_a_further_gpu_does_not_get_the_kernels_of_the_first(packed: Path) -> None:
    contents = open_bundle(packed).contents
    for name, same in (("orin-nx-16gb", True), ("agx-thor", False)):
        added = with_target(contents, find_device(name)).segments
        lowered = {n: next(e.graph for e in s.engines if e.target == NANO) for n, s in added.items()}
        new = {n: next(e.graph for e in s.engines if e.target == name) for n, s in added.items()}
        assert (new["denoiser"] == lowered["denoiser"]) == same
        assert new["vae_decoder"] == lowered["vae_decoder"]
    assert with_engines(contents, {n: s.engines for n, s in contents.segments.items()}) == contents


@pytest.mark.parametrize("jetson", [True, False])
def test_a_missing_tensorrt_is_jetpack_s_on_a_jetson_and_an_extra_elsewhere(
    jetson: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if jetson:
        (tmp_path / "release").touch()
    monkeypatch.setattr(check, "JETSON", tmp_path / "release")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency) as error:
        import_backend("tensorrt")
    assert ("apt-get install python3-libnvinfer" in str(error.value)) == jetson
    assert ("pip install 'trimtab[tensorrt]'" in str(error.value)) != jetson
    assert json.dumps(str(error.value)).count("\\n") == 0
    assert "trimtab[rtx]" in str(check.missing("tensorrt_rtx"))
