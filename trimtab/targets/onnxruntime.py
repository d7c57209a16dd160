"""ONNX Runtime: the default that works everywhere, and runs the graphs as they are or nearly so."""

from __future__ import annotations

import time
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from trimtab.errors import BundleError, UnsupportedOp
from trimtab.manifest import OPERATORS_DOMAIN
from trimtab.passes.merge import MergeWeights
from trimtab.passes.split_attention import SplitAttention
from trimtab.passes.vq_on_demand import DecodeOnDemand
from trimtab.passes.vq_pieces import SplitFewRows
from trimtab.passes.vq_views import DecodeThroughViews
from trimtab.runtime.sessions.onnxruntime import OnnxRuntimeSession
from trimtab.targets.base import BuildOptions, EngineInfo, Progress
from trimtab.targets.bindings import Shapes
from trimtab.targets.device import Device
from trimtab.weights import repeated_bytes, weight_bytes


class OnnxRuntimeBuilder:
    """Its engine is a graph: ONNX Runtime optimises at load, for the machine at hand.

    Args:
        native: Graph input -> sizes at the picture's native size; None leaves attention as it is.
    """

    backend = "onnxruntime"
    version = ""
    """Every version loads a graph."""

    device_fields: tuple[str, ...] = ()

    def __init__(self, native: Shapes | None = None) -> None:
        self._native = native

    def lower(self, model: ir.Model, device: Device) -> ir.Model:
        """The model itself: every operator of opset 23 that the exporter writes has a CPU kernel.

        Three kinds of graph are changed, in a copy. Packed weights are decoded when they are needed, through views
        where that is faster (`trimtab.manifest.VIEWS`). Attention whose scores are large goes by parts of its queries:
        ONNX Runtime keeps them all. And where equal weights are a hundredth of all or more, as the embedders of a
        DiT's blocks, they become one: ONNX Runtime lays out each name's numbers anew in memory, and computes again
        what reads them.
        """
        copy = model.clone()
        changed = False
        if self._native is not None:
            changed = SplitAttention(self._native)(copy).modified
        packed = OPERATORS_DOMAIN in model.opset_imports
        if packed or repeated_bytes(model) >= 0.01 * weight_bytes(model):
            changed = True
            MergeWeights()(copy)
        if packed:
            SplitFewRows()(copy)
            DecodeThroughViews()(copy)
            DecodeOnDemand()(copy)  # the others
            common.RemoveUnusedNodesPass()(copy)  # codes that stand in pieces now, and codebooks in tables
        return copy if changed else model

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


def check_loads(name: str, graph: Path) -> None:
    """Loads a graph as it is, so that an operator or a type without a kernel is found here and not on a device.

    Nothing is optimised and weights stay in their file: Stable Diffusion 1.5's U-Net takes 0.3 s and no memory.

    Args:
        name: The segment's.
        graph: The file, beside its weights.

    Raises:
        UnsupportedOp: ONNX Runtime cannot load it.
    """
    try:
        OnnxRuntimeSession(graph, fold=False, optimise=False).close()
    except BundleError as error:
        text = " ".join(str(error.__cause__ or error).split())
        reason = text.rpartition(" failed:")[2][:300]  # before it stand a code and the file's path
        raise UnsupportedOp(
            f"{name} cannot run on the CPU, ONNX Runtime does not take its graph ({reason}): export it with "
            "standard operators"
        ) from error
