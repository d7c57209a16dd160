"""What every engine builder has in common, and what it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from trimtab.targets.device import Device

Scalar = str | int | float | bool

Progress = Callable[[str], None]
"""Told what is being worked on, in a few words; called at least once a second while a build takes its time."""


@dataclass(frozen=True)
class BuildOptions:
    """What may be chosen about one engine. Every field is part of the cache's key.

    Attributes:
        shapes: Graph input -> its sizes, for every input whose sizes are open.
        precision: "fp32", "fp16" or "bf16".
        workspace_bytes: The most scratch memory that a kernel may ask for; None for the backend's default.
        optimization_level: The backend's own scale of effort; None for its default.
        extra: Further options of one backend, by their names there.
        plugins: Files to register before the graph is parsed: libraries, or sources of kernels. The key covers
            their contents and not their places.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    precision: str = "fp32"
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    extra: Mapping[str, Scalar] = field(default_factory=dict)
    plugins: tuple[Path, ...] = ()


@dataclass(frozen=True)
class EngineInfo:
    """What a builder says of an engine that it made.

    Attributes:
        bytes: Size of the file.
        seconds: What the build took.
        peak_bytes: The most memory that the build held; None where nobody measured.
        backend: Which runtime loads it.
        backend_version: The exact version that built it, and alone loads it; empty where every version does.
        activation_bytes: Device memory that the engine asks for beside its weights; None where the backend does
            not say.
    """

    bytes: int
    seconds: float
    peak_bytes: int | None
    backend: str
    backend_version: str
    activation_bytes: int | None = None


class Builder(Protocol):
    """Turns a graph into an engine for one backend."""

    @property
    def backend(self) -> str:
        """Which runtime loads the engines: "tensorrt", ..."""

    @property
    def version(self) -> str:
        """The backend's exact version, and whatever else of this machine or this builder changes its engines."""

    @property
    def device_fields(self) -> tuple[str, ...]:
        """Which fields of a Device decide its engines; devices that agree in them share their engines."""

    def lower(self, model: ir.Model, device: Device) -> ir.Model:
        """What the backend can run of this graph. ``model`` stays as it was.

        Raises:
            UnsupportedOp: The backend has no such operator.
        """

    def build(
        self, model: ir.Model, device: Device, options: BuildOptions, out: Path, progress: Progress
    ) -> EngineInfo:
        """Builds one engine into one file.

        Args:
            model: A lowered graph.
            device: The target.
            options: See there.
            out: The file to write; its folder exists.
            progress: Told what the backend is at.

        Raises:
            BuildFailed: The backend gave up.
        """
