"""Builds the C++ plugin library on the device that needs it: TensorRT 10.3 to 10.8."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from trimtab.bundle import file_hash
from trimtab.errors import BuildFailed, TargetError
from trimtab.staging import write_file

SOURCES = Path(__file__).parent / "cpp"
LIBRARY = "libtrimtab_vq.so"
HEADERS = "libnvinfer-headers-dev"

_LACKING = {
    "TENSORRT_INCLUDE": ("TensorRT's header NvInferRuntime.h", HEADERS),
    "CUDA_INCLUDE": ("CUDA's header cuda.h", "nvidia-jetpack"),
    "CMAKE_MAKE_PROGRAM": ("make", "make"),
    "CMAKE_CXX_COMPILER": ("a C++ compiler", "g++"),
}
"""A word in CMake's complaint -> what is missing, and the package that brings it."""


@dataclass(frozen=True)
class PluginLibrary:
    """A built library, as a manifest names it.

    Attributes:
        path: Where it lies.
        sha256: Of its bytes.
    """

    path: Path
    sha256: str


def source_hash() -> str:
    """SHA-256 of the library's sources: what a bundle can name before any device has built them."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def check_tools() -> None:
    """Makes sure that `build_library` finds what it needs: seconds, where a build on a device takes half a minute.

    Raises:
        BuildFailed: CMake, a compiler or the headers are missing.
    """
    with tempfile.TemporaryDirectory(prefix="trimtab-plugin-") as scratch:
        _run(_configuration(scratch))


def build_library(
    cache: Path, *, tensorrt_include: Path | None = None, cuda_include: Path | None = None
) -> PluginLibrary:
    """Builds the library into a folder that is named by all it is made from, or finds it there.

    Args:
        cache: The folder of such folders.
        tensorrt_include: Where NvInferRuntime.h lies; found by CMake if None.
        cuda_include: Where cuda.h lies; found by CMake if None.

    Raises:
        BuildFailed: CMake, a compiler or the headers are missing, or the sources do not compile.
    """
    with tempfile.TemporaryDirectory(prefix="trimtab-plugin-") as scratch:
        places = {"TENSORRT_INCLUDE": tensorrt_include, "CUDA_INCLUDE": cuda_include}
        _run(
            _configuration(scratch)
            + [f"-D{name}={place}" for name, place in places.items() if place is not None]
        )
        folder = cache / f"plugin-{_recipe(Path(scratch) / 'CMakeCache.txt')[:16]}"
        library = folder / LIBRARY
        if not library.is_file():
            _run(["cmake", "--build", scratch])
            write_file(library, (Path(scratch) / LIBRARY).read_bytes())
    return PluginLibrary(library, file_hash(library))


def check_library(path: Path, sha256: str) -> None:
    """Makes sure that a library is there and is the one that an engine was built with.

    Raises:
        TargetError: It is missing, or another.
    """
    if not path.is_file():
        raise TargetError(f"the plugin library {path} is missing: run `trimtab build` on this device")
    found = file_hash(path)
    if found != sha256:
        raise TargetError(
            f"the plugin library {path} has hash {found[:16]}, and the engine was built with {sha256[:16]}: "
            "run `trimtab build` on this device"
        )


def load_library(library: PluginLibrary, registry: object) -> None:
    """Registers the library's plugins; before a graph is parsed and before an engine is deserialized.

    Args:
        library: Checked by `check_library` first.
        registry: TensorRT's, ``tensorrt.get_plugin_registry()``.

    Raises:
        TargetError: It is missing, another, or cannot be loaded.
    """
    check_library(library.path, library.sha256)
    try:
        ctypes.CDLL(str(library.path))  # says what is wrong; the registry only says that something is
    except OSError as error:
        raise TargetError(
            f"the plugin library {library.path} cannot be loaded ({error}): build it again"
        ) from error
    if registry.load_library(str(library.path)) is None:  # type: ignore[attr-defined]
        raise TargetError(
            f"TensorRT did not take the plugin library {library.path}: build it against this version's headers"
        )


def _recipe(cmake_cache: Path) -> str:
    """Hash of the sources, the compiler and the version of the headers, which CMake found."""
    entries = {
        name.partition(":")[0]: value
        for name, found, value in (line.partition("=") for line in cmake_cache.read_text().splitlines())
        if found
    }
    digest = hashlib.sha256(source_hash().encode())
    compiler = subprocess.run([entries["CMAKE_CXX_COMPILER"], "--version"], capture_output=True, check=False)
    digest.update(compiler.stdout)
    for header in ("NvInferVersion.h", "NvInferRuntime.h"):
        path = Path(entries["TENSORRT_INCLUDE"]) / header
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def _configuration(scratch: str) -> list[str]:
    return ["cmake", "-S", str(SOURCES), "-B", scratch, "-DCMAKE_BUILD_TYPE=Release"]


def _run(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        raise BuildFailed(_needs(command[0], f"cmake g++ {HEADERS}"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.returncode:
        return
    lacking = next((_needs(*what) for word, what in _LACKING.items() if word in done.stderr), None)
    if lacking is not None:
        raise BuildFailed(lacking)
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    told = next((line for line in lines if "rror:" in line), lines[0] if lines else "")
    raise BuildFailed(
        f"the plugin library did not build ({told[:200]}): mend what it names, and run `trimtab build` again"
    )


def _needs(what: str, packages: str) -> str:
    return (
        f"packed weights need trimtab's plugin library on this TensorRT, which is built here, and {what} was not "
        f"found: apt-get install {packages}"
    )
