"""``trimtab build``: a bundle's engines, finished or refreshed on the machine at hand."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trimtab.bundle import Bundle, open_bundle
from trimtab.errors import InputError, TargetError, TrimtabError, WrongDevice
from trimtab.manifest import Contents, Engine
from trimtab.staging import locked
from trimtab.targets import preflight
from trimtab.targets.base import Progress
from trimtab.targets.device import Device, find_device, known_devices
from trimtab.targets.engines import builder_for, open_cache
from trimtab.targets.insert import Inserter, Made
from trimtab.targets.network import NetworkBuilder
from trimtab.targets.place import DEFAULT_CACHE, Place
from trimtab.targets.plugins.build import check_tools
from trimtab.targets.recognise import recognise
from trimtab.targets.wanted import needs_library, present_library, reason_to_build, with_target

logger = logging.getLogger(__name__)

_HELD = 2
"""How often a build holds the weights at least: in the network that was parsed, and in the engine that is written.
It may want more; less cannot do."""


@dataclass(frozen=True)
class Report:
    """What a build did.

    Attributes:
        made: In order.
        kept: Engines of its targets that were right as they were.
        skipped: Target of the bundle -> why it cannot be built here.
        seconds: In all.
    """

    made: tuple[Made, ...]
    kept: int
    skipped: Mapping[str, str]
    seconds: float


@dataclass
class _Work:
    """What one target needs: its engines, each with the reason to make it, or None."""

    device: Device
    version: str
    engines: list[tuple[str, Engine, str | None]] = field(default_factory=list)


def build(
    folder: Path,
    targets: Sequence[str] = (),
    *,
    device_file: str | Path | None = None,
    cache: Place = DEFAULT_CACHE,
    progress: Progress = logger.info,
) -> Report:
    """Builds the engines of a bundle that are missing, damaged, or of another version or compute capability.

    Nothing is built or deserialized before the machine was looked at, for every target.

    Args:
        folder: The bundle's.
        targets: Which; one that the bundle does not have is added, with the sizes and the precision of those that it
            has. Without any: all that the bundle has and this machine can build.
        device_file: A TOML file with devices of one's own.
        cache: A folder or URL where engines are looked for and kept; None for none.
        progress: Told what is being worked on.

    Raises:
        InputError: No bundle, an unknown target, or a folder that cannot be written.
        BundleError: The bundle is damaged.
        MissingDependency, WrongDevice, TargetError: A target cannot be built here, or none can.
        BuildFailed, UnsupportedOp: The builder's. What was finished before is kept.
    """
    start = time.perf_counter()
    with _alone(folder):
        bundle = open_bundle(folder)
        contents, work, skipped = _plan(bundle, targets, device_file)
        needed = any(why and job.device.sm for job in work for _, _, why in job.engines)
        maker = Inserter(bundle, contents, open_cache(cache) if needed else None, progress)
        with maker.stage():
            for job in work:
                for segment, engine, why in job.engines:
                    if why is not None:
                        maker.make(segment, engine, job.device, job.version, why)
    kept = sum(why is None for job in work for _, _, why in job.engines)
    return Report(tuple(maker.made), kept, skipped, round(time.perf_counter() - start, 3))


def _plan(
    bundle: Bundle, targets: Sequence[str], device_file: str | Path | None
) -> tuple[Contents, list[_Work], dict[str, str]]:
    """What is to be done for which target, and why the others are left out. Nothing is built here."""
    there = list(dict.fromkeys(e.target for s in bundle.contents.segments.values() for e in s.engines))
    here = None if targets else _the_jetson(there, device_file)
    contents, work, skipped = bundle.contents, [], {}
    for name in dict.fromkeys(targets or there):
        try:
            device = find_device(name, device_file)
            if here is not None and device.backend == "tensorrt" and device != here:
                raise TargetError(f"this machine is {here.name}")
            if name not in there:
                contents = with_target(contents, device)
            work.append(_work(bundle, contents, device))
        except TrimtabError as error:
            if targets:
                raise
            skipped[name] = str(error)
    if not work:
        said = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        raise TargetError(f"{bundle.folder} has no target that can be built here ({said or 'it has none'})")
    return contents, work, skipped


def _the_jetson(targets: Sequence[str], device_file: str | Path | None) -> Device | None:
    """Which of the targets this machine is, where it says so: Jetsons of one chip differ in memory and clocks."""
    here = recognise(known_devices(device_file))
    return here if here is not None and here.backend == "tensorrt" and here.name in targets else None


def _work(bundle: Bundle, contents: Contents, device: Device) -> _Work:
    """Looks at the machine, and then at the engines of a target."""
    builder = builder_for(device)
    work = _Work(device, "")
    machine = None
    if isinstance(builder, NetworkBuilder):
        if builder.on_device:
            machine = _look(device)
            preflight.preflight(device, machine)
        builder.compute_capability(device)
        work.version = builder.installed_version()
    for segment in contents.segments.values():
        for engine in segment.engines:
            if engine.target == device.name:
                work.engines.append(
                    (segment.name, engine, reason_to_build(bundle, engine, device, work.version))
                )
    if machine is not None:
        wanted = [(contents.segments[name], engine) for name, engine, why in work.engines if why]
        served = present_library(bundle, device, work.version)
        if not served and any(needs_library(*each, work.version) for each in wanted):
            check_tools()
        largest = max((engine.bytes for _, engine, why in work.engines if why), default=0)
        preflight.preflight(device, machine, needed_bytes=_HELD * largest)
    return work


def _look(device: Device) -> preflight.Machine:
    try:
        return preflight.look(device.backend)
    except TargetError as error:
        packs = (
            f", with JetPack {' or '.join(pack.version for pack in device.jetpacks)}"
            if device.jetpacks
            else ""
        )
        raise WrongDevice(
            f"engines for {device.name} are built on the device itself{packs}, and this machine has no NVIDIA GPU: "
            "copy the bundle there and run trimtab build (in a container, one that was started with --runtime nvidia)"
        ) from error


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a second build out.

    Raises:
        InputError: Another build is at work in it, or there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give a bundle made by trimtab compile")
    try:
        with locked(folder, wait=False):
            yield
    except BlockingIOError:
        raise InputError(f"another build is at work in {folder}: wait until it has ended") from None
