"""ONNX Runtime: the default that works everywhere, and runs the graphs as they are."""

from __future__ import annotations

import time
from pathlib import Path

import onnx_ir as ir

from trimtab.targets.base import BuildOptions, EngineInfo, Progress
from trimtab.targets.device import Device
from trimtab.weights import weight_bytes


class OnnxRuntimeBuilder:
    """Its engine is the graph itself: ONNX Runtime optimises at load, for the machine at hand."""

    backend = "onnxruntime"
    version = ""
    """Every version loads a graph."""

    device_fields: tuple[str, ...] = ()

    def lower(self, model: ir.Model, device: Device) -> ir.Model:
        """Nothing to do: every operator of opset 23 that the exporter writes has a CPU kernel."""
        return model

    def build(
        self, model: ir.Model, device: Device, options: BuildOptions, out: Path, progress: Progress
    ) -> EngineInfo:
        """Writes the graph.

        Args:
            model: The lowered graph.
            device: The target.
            options: Nothing here depends on them.
            out: The file, in the folder of the graph's weights: ONNX Runtime reads none from elsewhere.
            progress: Not needed.
        """
        start = time.perf_counter()
        ir.save(model, out)
        return EngineInfo(
            bytes=out.stat().st_size + weight_bytes(model),
            seconds=time.perf_counter() - start,
            peak_bytes=None,
            backend=self.backend,
            backend_version=self.version,
        )
