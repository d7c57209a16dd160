"""Before anything is built on a device: whether it is the device, and whether its software and memory will do.

What a machine says of itself is read in one place (`look`) and judged in another (`preflight`), so that what many
machines said can be judged on any.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import MissingDependency, TargetError, WrongDevice
from trimtab.runtime.sessions.check import JETSON, missing
from trimtab.runtime.sessions.cuda import Driver
from trimtab.runtime.sessions.tensorrt import import_backend
from trimtab.targets.device import Device, JetPack
from trimtab.targets.machine import MEMINFO, meminfo_bytes, read_text, run_text

DPKG = ("dpkg-query", "--show", "--showformat=${Version}", "nvidia-jetpack")

JETPACKS = {
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.5.0": "6.2.2",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
    "38.4.0": "7.1",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}
"""Jetson Linux -> JetPack, of the releases in https://developer.nvidia.com/embedded/jetpack-archive. A later revision
of a release that stands here is taken for it."""

JETPACK_AVOIDS = ((11, 0), (11, 4))
"""TensorRT 11.0 up to 11.4 does not support JetPack:
https://docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/support-matrix.html"""


@dataclass(frozen=True)
class Machine:
    """What a machine says of itself; None where it does not say.

    Attributes:
        gpu: The GPU's name.
        sm: Its compute capability.
        l4t: Jetson Linux, such as "36.4.3".
        jetpack: Such as "6.2.1".
        backend_version: Of the backend that is to build, as its module says.
        trouble: Why that module cannot be loaded, where it is installed and cannot.
        free_bytes: Memory that an engine can get: on a Jetson what the system would give to a program.
    """

    gpu: str | None = None
    sm: str | None = None
    l4t: str | None = None
    jetpack: str | None = None
    backend_version: str | None = None
    free_bytes: int | None = None
    trouble: str | None = None


def look(
    backend: str,
    *,
    read: Callable[[Path], str] = read_text,
    run: Callable[[Sequence[str]], str] = run_text,
    driver: Callable[[], Driver] = Driver,
    version: Callable[[str], str] = lambda name: str(import_backend(name).__version__),
) -> Machine:
    """Asks this machine.

    Args:
        backend: Which of TensorRT and TensorRT for RTX is to build.
        read: Reads a file.
        run: Runs a program.
        driver: Opens the GPU.
        version: Of a backend's module.

    Raises:
        TargetError: There is no GPU.
    """
    installed = trouble = None
    try:
        installed = version(backend)
    except MissingDependency:
        pass
    except TargetError as error:
        trouble = str(error)
    gpu = driver()
    try:
        free, _ = gpu.memory()
        if gpu.integrated:
            # CUDA leaves out the page cache, which the system gives back to whoever asks.
            free = meminfo_bytes(read(MEMINFO), "MemAvailable") or free
        l4t = l4t_version(read(JETSON))
        return Machine(
            gpu=gpu.name,
            sm=gpu.sm,
            l4t=l4t,
            jetpack=jetpack_version(run(DPKG), l4t) if l4t else None,
            backend_version=installed,
            free_bytes=free,
            trouble=trouble,
        )
    finally:
        gpu.close()


def l4t_version(text: str) -> str | None:
    """Jetson Linux from /etc/nv_tegra_release: "# R36 (release), REVISION: 4.3, ..." is 36.4.3."""
    found = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*(\d+(?:\.\d+)*)", text)
    return f"{found[1]}.{found[2]}" if found else None


def jetpack_version(dpkg: str, l4t: str) -> str | None:
    """JetPack, from its package ("6.2.1+b38") where that is installed, else from Jetson Linux."""
    if found := re.match(r"\d+\.\d+(?:\.\d+)*", dpkg):
        return found[0]
    release = _numbers(l4t)
    older = [known for known in JETPACKS if _numbers(known)[:2] == release[:2] and _numbers(known) <= release]
    return JETPACKS[max(older, key=_numbers)] if older else None


def preflight(device: Device, machine: Machine, *, needed_bytes: int = 0) -> None:
    """Refuses what cannot end well.

    Args:
        device: What engines are to be built for.
        machine: From `look`.
        needed_bytes: The most memory that a build or a run will ask for.

    Raises:
        WrongDevice: This machine is another device.
        MissingDependency: The backend is not installed.
        TargetError: The software does not fit, or the memory is taken.
    """
    if device.sm is not None and machine.sm != device.sm:
        raise WrongDevice(
            f"{device.name} has compute capability {device.sm} and this machine's {machine.gpu} has {machine.sm}: "
            "run trimtab build on the device itself, or compile for this one (see trimtab devices)"
        )
    if machine.trouble is not None:
        raise TargetError(machine.trouble)
    if machine.backend_version is None:
        raise missing(device.backend, jetson=bool(device.jetpacks))
    if device.jetpacks:
        _check_jetpack(device, machine)
    if machine.free_bytes is not None and machine.free_bytes < needed_bytes:
        shared = device.shared_memory
        raise TargetError(
            f"{machine.free_bytes / 2**30:.1f} GiB of memory are free and {needed_bytes / 2**30:.1f} GiB are needed: "
            + (
                "stop the desktop (sudo systemctl isolate multi-user.target) and other programs"
                if shared
                else "close other programs"
            )
            + ", or compile for a smaller size or precision"
        )


def _check_jetpack(device: Device, machine: Machine) -> None:
    known = {_numbers(pack.version)[:2]: pack for pack in device.jetpacks}
    oldest = known[min(known)]
    versions = " or ".join(pack.version for pack in device.jetpacks)
    if machine.l4t is None:
        raise WrongDevice(
            f"{device.name} is a Jetson and this machine has no {JETSON}: run trimtab build on the device itself; "
            f"in a container, mount that file"
        )
    if machine.jetpack is None:
        raise TargetError(
            f"this machine runs Jetson Linux {machine.l4t}, which belongs to no JetPack that trimtab knows: flash "
            f"JetPack {versions}"
        )
    if _numbers(machine.jetpack) < _numbers(oldest.version):
        raise TargetError(
            f"this machine has JetPack {machine.jetpack} and {device.name} needs {versions}: flash one of them"
        )
    _check_tensorrt(known.get(_numbers(machine.jetpack)[:2]), oldest, machine)


def _check_tensorrt(pack: JetPack | None, oldest: JetPack, machine: Machine) -> None:
    here = _numbers(machine.backend_version or "")[:2]
    if JETPACK_AVOIDS[0] <= here <= JETPACK_AVOIDS[1] or here < _numbers(oldest.tensorrt):
        wanted = f"that of JetPack {machine.jetpack}" + (f", {pack.tensorrt}" if pack else "")
        raise TargetError(
            f"Python finds TensorRT {machine.backend_version}, which does not run on JetPack {machine.jetpack}: use "
            f"{wanted} (pip uninstall tensorrt, and make the environment with python3 -m venv --system-site-packages)"
        )
    if pack is not None and here != _numbers(pack.tensorrt):
        raise TargetError(
            f"Python finds TensorRT {machine.backend_version} and JetPack {machine.jetpack} has {pack.tensorrt}: use "
            "the one of JetPack (pip uninstall tensorrt, and make the environment with python3 -m venv "
            "--system-site-packages)"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))
