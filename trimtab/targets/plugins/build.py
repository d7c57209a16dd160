"""Builds the C++ plugin library on the device that needs it: TensorRT 10.3 to 10.8."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from trimtab.errors import BuildFailed
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


def check_tools() -> None:
    """Makes sure that `build_library` finds what it needs: seconds, where a build on a device takes half a minute.

    Raises:
        BuildFailed: CMake, a compiler or the headers are missing.
    """
    with tempfile.TemporaryDirectory(prefix="trimtab-plugin-") as scratch:
        _run(_configuration(scratch))


def build_library(
    folder: Path, *, tensorrt_include: Path | None = None, cuda_include: Path | None = None
) -> Path:
    """Builds the library, the file `LIBRARY`, into a folder.

    Args:
        folder: Made where it is missing.
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
        _run(["cmake", "--build", scratch])
        library = folder / LIBRARY
        write_file(library, (Path(scratch) / LIBRARY).read_bytes())
    return library


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
