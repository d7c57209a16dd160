"""Loaded engines. Each backend is imported in one file here, when it is first used, and nowhere else.

base           what the executor knows: Buffer, Session, Backend
onnxruntime    the CPU, and CUDA
tensorrt       TensorRT and TensorRT for RTX
cuda           the NVIDIA driver: memory, a stream, CUDA graphs
device_array   tensors in a GPU's memory
check          whether an engine fits this machine
"""

from __future__ import annotations

from trimtab.errors import BundleError, InputError
from trimtab.manifest import BACKENDS
from trimtab.runtime.sessions.base import Backend, Buffer, Run, Session
from trimtab.runtime.sessions.cuda import Driver
from trimtab.runtime.sessions.onnxruntime import OnnxRuntimeCpu, OnnxRuntimeCuda, OnnxRuntimeSession
from trimtab.runtime.sessions.tensorrt import TensorRT, import_backend

__all__ = [
    "PROVIDERS",
    "Backend",
    "Buffer",
    "OnnxRuntimeSession",
    "Run",
    "Session",
    "open_backend",
]

PROVIDERS = ("cpu", "cuda")
"""Where ONNX Runtime may run its graphs."""


def open_backend(name: str, *, provider: str = "cpu", threads: int = 0, fast: bool = False) -> Backend:
    """A backend, ready to load engines.

    Args:
        name: One of `trimtab.manifest.BACKENDS`.
        provider: For "onnxruntime": one of `PROVIDERS`.
        threads: CPU threads for one operator; 0 for one a core.
        fast: On the CPU, decode packed weights once, at load; on CUDA, products in TF32.

    Raises:
        InputError: No such provider.
        BundleError: No such backend.
        MissingDependency: It is not installed.
        TargetError: It needs a GPU, and there is none.
    """
    if provider not in PROVIDERS:
        raise InputError(f"there is no provider {provider!r}: choose {' or '.join(PROVIDERS)}")
    if name not in BACKENDS:
        raise BundleError(
            f"this trimtab knows no backend {name!r}, and has {', '.join(BACKENDS)}: upgrade it"
        )
    if name == "onnxruntime":
        if provider == "cuda":
            return OnnxRuntimeCuda(Driver(), fast=fast)
        return OnnxRuntimeCpu(threads, fast)
    module = import_backend(name)  # what is not installed is said before what is not plugged in
    return TensorRT(name, Driver(), module)
