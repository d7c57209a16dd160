"""The C++ plugin library: built by CMake, then driven as TensorRT drives it, with a driver that writes down calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.errors import BuildFailed
from trimtab.targets.plugins.build import LIBRARY, build_library

STUB = Path(__file__).with_name("stub")


def cuda_include() -> Path:
    """A folder with cuda.h: the toolkit's, or the one in Triton's package."""
    triton = [Path(p) / "triton/backends/nvidia/include" for p in sys.path]
    for folder in (Path("/usr/local/cuda/include"), *triton):
        if (folder / "cuda.h").is_file():
            return folder
    pytest.skip("no cuda.h on this machine")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (shutil.which("cmake") and shutil.which("g++")):
        pytest.skip("no cmake or no g++ on this machine")
    return build_library(
        tmp_path_factory.mktemp("library"), tensorrt_include=STUB, cuda_include=cuda_include()
    )


def test_the_library_does_what_tensorrt_asks_of_it(library: Path, tmp_path: Path) -> None:
    compiler = ["g++", "-std=c++17", f"-I{STUB}", f"-I{cuda_include()}"]
    fake = [*compiler, "-shared", "-fPIC", str(STUB / "fake_cuda.cpp"), "-o", str(tmp_path / "libcuda.so.1")]
    drive = [*compiler, str(STUB / "drive.cpp"), "-o", str(tmp_path / "drive"), "-ldl"]
    for command in (fake, drive):
        subprocess.run(command, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [tmp_path / "drive", library], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == (STUB / "drive.txt").read_text()


def test_the_library_needs_neither_tensorrt_nor_cuda_to_load(library: Path) -> None:
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("no objdump on this machine")
    listed = subprocess.run([objdump, "-p", library], capture_output=True, text=True, check=True).stdout
    needed = {line.split()[1].split(".")[0] for line in listed.splitlines() if "NEEDED" in line}
    assert needed <= {"libstdc++", "libm", "libgcc_s", "libc", "libdl"}


def test_headers_that_do_not_compile_are_reported_and_leave_nothing(tmp_path: Path) -> None:
    if not (shutil.which("cmake") and shutil.which("g++")):
        pytest.skip("no cmake or no g++ on this machine")
    (tmp_path / "NvInferRuntime.h").write_text("#error another TensorRT\n")
    with pytest.raises(BuildFailed, match="another TensorRT"):
        build_library(tmp_path / "library", tensorrt_include=tmp_path, cuda_include=cuda_include())
    assert not (tmp_path / "library").exists()


def test_the_library_compiles_against_the_installed_tensorrt(tmp_path: Path) -> None:
    places = [
        Path("/usr/include"),
        *Path("/usr/include").glob("*-linux-gnu"),
        Path("/usr/local/tensorrt/include"),
    ]
    found = next((place for place in places if (place / "NvInferRuntime.h").is_file()), None)
    if found is None:
        pytest.skip("no TensorRT headers on this machine")
    assert build_library(tmp_path, tensorrt_include=found).name == LIBRARY
