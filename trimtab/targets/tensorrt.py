"""TensorRT 10.3 to 11: engines for Jetson, built on the device itself."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from trimtab.errors import BuildFailed
from trimtab.targets.device import Device
from trimtab.targets.lowering import lower
from trimtab.targets.network import PACKED_FORMS, NetworkBuilder, TimingCache
from trimtab.targets.operators import OLDEST_TENSORRT, Parser, tensorrt_parser
from trimtab.targets.plugins.lower import UseKernels


class TensorRTBuilder(NetworkBuilder):
    """Builds for the GPU of this machine, with kernels timed on it.

    Lowering needs no TensorRT, so a workstation prepares what a device builds.

    Args:
        timings: Where kernel timings are kept between builds: `EngineCache.timing_cache`.
    """

    backend = "tensorrt"
    on_device = True

    def __init__(self, timings: TimingCache | None = None) -> None:
        self._timings = timings

    @property
    def device_fields(self) -> tuple[str, ...]:
        """All but the title: kernels are timed, so clocks, power mode and memory steer what is chosen."""
        return tuple(field.name for field in dataclasses.fields(Device) if field.name != "title")

    def lower(self, model: ir.Model, device: Device) -> ir.Model:
        """A copy of a graph that the device's parser takes, its packed weights served by trimtab's plugins.

        What no kernel takes, as in FP32, gets the form that stays packed without a plugin.

        Raises:
            UnsupportedOp: It has an operator that the parser does not take, and that nothing here replaces.
        """
        kernels = () if device.sm is None else (UseKernels(int(device.sm.replace(".", ""))),)
        return lower(model, self.parser(device), (*kernels, *PACKED_FORMS))

    def parser(self, device: Device) -> Parser:
        """The oldest one of the device's JetPacks: what it takes, the later ones take as well."""
        versions = [
            (int(major), int(minor)) for major, minor in (p.tensorrt.split(".") for p in device.jetpacks)
        ]
        return tensorrt_parser(min(versions, default=OLDEST_TENSORRT))

    def compute_capability(self, device: Device) -> None:
        return None

    @contextlib.contextmanager
    def timing_cache(self, device: Device) -> Iterator[Path | None]:
        if self._timings is None:
            yield None
            return
        if device.sm is None:
            raise BuildFailed(f"{device.name} has no compute capability: give it its sm")
        with self._timings(int(device.sm.replace(".", "")), self.installed_version()) as path:
            yield path
