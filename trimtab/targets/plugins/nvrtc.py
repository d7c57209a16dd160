"""CUDA C++ to PTX, by NVIDIA's runtime compiler: a library that needs neither a GPU nor the CUDA toolkit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from trimtab.errors import BuildFailed, MissingDependency

SOURCES = Path(__file__).parent / "cuda"

_HEADERS = ("ptx.cuh", "table.cuh")


def library() -> ModuleType:
    """The bindings, with the library that they bind.

    Raises:
        MissingDependency: One of both is not installed.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:  # also of releases before there was this module
        raise MissingDependency("cuda-bindings", "kernels") from error
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # whatever says that the library cannot be loaded
        raise MissingDependency("nvidia-cuda-nvrtc", "kernels") from error
    return nvrtc  # type: ignore[no-any-return]


def compile_ptx(name: str, sm: int, values: Mapping[str, int]) -> str:
    """The PTX of one of `SOURCES`.

    Args:
        name: Its file.
        sm: As in sm_87; for 90 what belongs to it alone is taken too.
        values: Macros that the source leaves open.

    Raises:
        BuildFailed: It does not compile.
        MissingDependency: As `library`.
    """
    nvrtc = library()
    text, *headers = [(SOURCES / each).read_bytes() for each in (name, *_HEADERS)]
    names = [each.encode() for each in _HEADERS]
    program = _checked(nvrtc.nvrtcCreateProgram(text, name.encode(), len(names), headers, names))
    options = [f"--gpu-architecture=compute_{sm}{'a' if sm == 90 else ''}", "--std=c++17"]
    options += [f"-D{macro}={value}" for macro, value in values.items()]
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [each.encode() for each in options])
        if result:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            nvrtc.nvrtcGetProgramLog(program, log)
            lines = log.decode(errors="replace").strip("\0 \n").splitlines()
            said = next((line for line in lines if "error" in line), result.name)
            raise BuildFailed(f"CUDA's compiler refused {name} for sm_{sm}: {said}")
        ptx = b" " * _checked(nvrtc.nvrtcGetPTXSize(program))
        _checked((*nvrtc.nvrtcGetPTX(program, ptx), None))
        return str(ptx.decode().rstrip("\0"))
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(answer: tuple[Any, Any]) -> Any:
    """The second of what a call gives, if the first says that all is well."""
    result, value = answer
    if result:
        raise BuildFailed(f"CUDA's compiler gave {result.name}: install its wheels again")
    return value
