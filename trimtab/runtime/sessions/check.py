"""Whether an engine can run here, before anything of it is read: engines that do not fit fail late and badly."""

from __future__ import annotations

from pathlib import Path

from trimtab.errors import MissingDependency, WrongDevice
from trimtab.manifest import Engine

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}

EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}

JETSON = Path("/etc/nv_tegra_release")
"""Jetson Linux says its version there, and no other system has it."""


def missing(backend: str, *, jetson: bool | None = None) -> MissingDependency:
    """The error for a backend that is not installed, with the way to it.

    Args:
        backend: Of `TITLES`.
        jetson: Whether this is a Jetson, or is meant to be; None to look.
    """
    advice = None
    if backend == "tensorrt" and (JETSON.exists() if jetson is None else jetson):
        advice = (
            "it comes with JetPack and not from PyPI: apt-get install python3-libnvinfer, and make the environment "
            "with python3 -m venv --system-site-packages"
        )
    return MissingDependency(backend, EXTRAS[backend], advice)


def check_engine(engine: Engine, version: str, sm: str, gpu: str) -> None:
    """Compares what an engine was built with and for with what is here.

    Args:
        engine: What the bundle says of it.
        version: The backend's here.
        sm: Compute capability of the GPU here.
        gpu: Its name, for the message.

    Raises:
        WrongDevice: They differ.
    """
    name = TITLES.get(engine.backend, engine.backend)
    if engine.sm is not None and engine.sm != sm:
        raise WrongDevice(
            f"{engine.path} was built for compute capability {engine.sm} and {gpu} has {sm}: "
            "run trimtab build on this machine, or compile with --target for it"
        )
    if engine.version and engine.version != version:
        raise WrongDevice(
            f"{engine.path} was built with {name} {engine.version} and {version} is installed: "
            "run trimtab build on this machine"
        )
