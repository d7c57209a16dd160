"""Whether an engine can run here, before anything of it is read: engines that do not fit fail late and badly."""

from __future__ import annotations

from trimtab.errors import WrongDevice
from trimtab.manifest import Engine

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}


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
