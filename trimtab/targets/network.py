"""What the builders of TensorRT and TensorRT for RTX have in common: lower, hand over, wait, try again with less."""

from __future__ import annotations

import abc
import contextlib
import importlib
import importlib.util
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trimtab.errors import BuildFailed, TargetError, UnsupportedOp
from trimtab.manifest import OPERATORS_DOMAIN
from trimtab.passes.base import Pass
from trimtab.passes.vq_apart import KeepBlocksApart
from trimtab.passes.vq_int8 import DecodeFromInt8
from trimtab.runtime.sessions.check import missing
from trimtab.targets.base import BuildOptions, EngineInfo, Progress
from trimtab.targets.device import Device
from trimtab.targets.lowering import lower
from trimtab.targets.operators import Parser
from trimtab.targets.plugins.embed import spell_out
from trimtab.targets.process import run_worker
from trimtab.weights import WeightStore

logger = logging.getLogger(__name__)

OPTIMIZATION_LEVEL = 3
"""TensorRT's own default, of 0 to 5."""

_LADDER = (1, 0)
"""Levels to try when memory runs out. 1 times fewer kernels than 2 and 3 do, and 0 takes the first that works:
https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/best-practices.html, builder optimization level."""


PACKED_FORMS: tuple[Pass, ...] = (KeepBlocksApart(), DecodeFromInt8())
"""What keeps weights packed without a plugin."""


class NetworkBuilder(abc.ABC):
    """Builds engines out of strongly typed networks, each in a process of its own.

    Attributes:
        backend: The runtime that loads them, and the package that builds them.
        on_device: Whether it builds only for the GPU of this machine.
    """

    backend: str
    on_device = False

    @property
    def version(self) -> str:
        """TensorRT's exact version, and the system: engines do not move between systems."""
        return f"{self.installed_version()} {platform.system()}-{platform.machine()}".lower()

    def installed_version(self) -> str:
        """The exact version of the package, such as "10.3.0.30".

        Raises:
            MissingDependency: It is not installed.
            TargetError: It is, and cannot be loaded.
        """
        if importlib.util.find_spec(self.backend) is None:
            raise missing(self.backend)
        try:
            return str(importlib.import_module(self.backend).__version__)
        except (ImportError, OSError, AttributeError) as error:
            raise TargetError(f"{self.backend} cannot be loaded ({error}): install it again") from error

    @property
    @abc.abstractmethod
    def device_fields(self) -> tuple[str, ...]:
        """Which fields of a Device decide the engines."""

    @abc.abstractmethod
    def parser(self, device: Device) -> Parser:
        """What the parser takes that will read the graph."""

    @abc.abstractmethod
    def compute_capability(self, device: Device) -> str | None:
        """What to build for; None for the GPU of this machine."""

    @contextlib.contextmanager
    def timing_cache(self, device: Device) -> Iterator[Path | None]:
        """A file with kernel timings that is read before a build and written after it; None for none."""
        yield None

    def lower(self, model: ir.Model, device: Device) -> ir.Model:
        """A copy of a graph that the device's parser takes.

        Raises:
            UnsupportedOp: It has an operator that the parser does not take, and that nothing here replaces.
        """
        return lower(model, self.parser(device), PACKED_FORMS)

    def build(
        self, model: ir.Model, device: Device, options: BuildOptions, out: Path, progress: Progress
    ) -> EngineInfo:
        """Builds one engine into one file.

        Args:
            model: A lowered graph. Its inputs have fixed sizes.
            device: The target.
            options: ``extra`` are attributes of TensorRT's builder configuration. Of plugins, libraries are loaded.
            out: The file to write.
            progress: Told TensorRT's phases.

        Raises:
            MissingDependency: TensorRT is not installed.
            UnsupportedOp: Its parser does not know an operator.
            BuildFailed: It gave up, at the lowest optimisation level too if memory ran out; or the disk did not take
                the engine, and then its cause is an OSError.
        """
        version = self.installed_version()
        start = time.perf_counter()
        with (
            tempfile.TemporaryDirectory(prefix="build-", dir=out.parent) as scratch,
            self.timing_cache(device) as timings,
        ):
            folder = Path(scratch).resolve()  # the worker runs in it
            job: dict[str, Any] = {
                "package": self.backend,
                "graph": str(write_graph(model, folder)),
                "out": str(folder / "engine"),
                "operators": sorted({node.op_type for node in model.graph.all_nodes() if node.domain == ""}),
                "packed": any(node.domain == OPERATORS_DOMAIN for node in model.graph.all_nodes()),
                "compute_capability": self.compute_capability(device),
                "workspace_bytes": options.workspace_bytes,
                "optimization_level": options.optimization_level,
                "timing_cache": None if timings is None else str(timings),
                "plugins": [str(path.resolve()) for path in options.plugins],
                "extra": dict(options.extra),
            }
            done = self._run(job, folder, device, progress)
            (folder / "engine").replace(out)
        if done["version"] != version:
            raise BuildFailed(
                f"{self.backend} {done['version']} built the engine and {version} was expected: install one of them"
            )
        return EngineInfo(
            bytes=out.stat().st_size,
            seconds=time.perf_counter() - start,
            peak_bytes=done["peak_bytes"],
            backend=self.backend,
            backend_version=version,
            activation_bytes=done["activation_bytes"],
        )

    def _run(self, job: dict[str, Any], folder: Path, device: Device, progress: Progress) -> Any:
        """Runs the job, and again at lower optimisation levels while memory runs out."""
        first = job["optimization_level"]
        top = OPTIMIZATION_LEVEL if first is None else first
        for level in (first, *(level for level in _LADDER if level < top)):
            ending = run_worker(job | {"optimization_level": level}, folder, progress)
            if ending.done is not None:
                return ending.done
            if ending.kind == "operator":
                raise UnsupportedOp(
                    f"{self.backend} {self.installed_version()} has no {ending.reason}: "
                    "choose another target, or report this"
                )
            if ending.kind == "disk":
                raise BuildFailed(
                    f"the engine cannot be written to {folder.parent} ({ending.reason}): make room there"
                ) from OSError(ending.errno, ending.reason)
            if ending.kind != "memory":
                break
            logger.warning(
                "%s ran out of memory at optimization level %s (%s)",
                self.backend,
                top if level is None else level,
                ending.reason,
            )
        advice = (
            "close other programs, or choose a smaller size"
            if ending.kind == "memory"
            else "see its documentation"
        )
        raise BuildFailed(
            f"{self.backend} {self.installed_version()} built no engine for {device.name} ({ending.reason}): {advice}"
        )


def write_graph(model: ir.Model, folder: Path) -> Path:
    """Writes a graph for a parser that reads files, with its kernels where they are launched.

    Weights that lie in files are linked there, and copied only where the system lets nobody link.

    Args:
        model: Stays as it was.
        folder: Empty, and removed by whoever made it.

    Returns:
        The .onnx file.

    Raises:
        BundleError: It has not the kernels that its packed layers name.
    """
    model = model.clone()
    spell_out(model)
    links: dict[Path, str] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = Path(tensor.path).resolve()
        if file not in links:
            links[file] = f"{len(links)}.weights"
            _link(file, folder / links[file])
        value.const_value = ir.ExternalTensor(
            links[file],
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=value.name or "",
            base_dir=folder,
        )
    WeightStore(folder).keep("new", model)
    ir.save(model, folder / "graph.onnx")
    return folder / "graph.onnx"


def _link(file: Path, name: Path) -> None:
    """Gives a file a second name. Windows wants a privilege for a symbolic link, and hard ones stay on their disk."""
    for link in (os.symlink, os.link):
        with contextlib.suppress(OSError):
            return link(file, name)
    shutil.copyfile(file, name)


TimingCache = Callable[[int, str], contextlib.AbstractContextManager[Path]]
"""(compute capability as 87, exact version) -> a file; see `trimtab.targets.cache.EngineCache.timing_cache`."""
