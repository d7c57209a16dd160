"""ONNX Runtime on the CPU: the default that works everywhere, and runs the graphs as they are."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from trimtab.manifest import Engine
from trimtab.targets.device import Device


class OnnxRuntimeBuilder:
    """Its engine is the graph itself: ONNX Runtime optimises at load, for the CPU at hand."""

    backend = "onnxruntime"

    def lower(self, model: ir.Model, device: Device) -> ir.Model:
        """Nothing to do: every operator of opset 23 that the exporter writes has a CPU kernel."""
        return model

    def build(self, model: ir.Model, device: Device, graph: Path, root: Path) -> Engine:
        """Points at the graph and its weights.

        Args:
            model: The lowered graph.
            device: The target.
            graph: The graph's file.
            root: The bundle's folder.
        """
        weights = sum(
            t.nbytes
            for v in model.graph.initializers.values()
            if isinstance(t := v.const_value, ir.ExternalTensor)
        )
        return Engine(
            target=device.name,
            backend=self.backend,
            path=graph.relative_to(root).as_posix(),
            bytes=graph.stat().st_size + weights,
            graph=graph.relative_to(root).as_posix(),
        )
