"""A Program, run while it is still being compiled."""

from __future__ import annotations

from pathlib import Path

from trimtab.bundle import open_bundle, write_manifest
from trimtab.program import Program
from trimtab.runtime.load import Pipeline
from trimtab.storage import GRAPHS, write_contents, write_graphs
from trimtab.targets.device import find_device
from trimtab.targets.onnxruntime import OnnxRuntimeBuilder
from trimtab.weights import WeightStore

TARGET = "cpu"


def draft(program: Program, folder: Path, *, threads: int = 0) -> Pipeline:
    """Writes a Program as a bundle for ONNX Runtime on the CPU, and opens it.

    Args:
        program: Graphs whose weights lie in ``folder / "graphs"`` already are not copied.
        folder: What is written here is a whole bundle, and can be written again.
        threads: CPU threads for one operator; 0 for one a core.

    Returns:
        A pipeline to draw with and to take steps of: close it, as it holds the engines.
    """
    (folder / GRAPHS).mkdir(parents=True, exist_ok=True)
    files = write_graphs(program, folder, WeightStore(folder / GRAPHS))
    device, builder = find_device(TARGET), OnnxRuntimeBuilder()
    engines = {
        name: (builder.build(segment.model, device, files[name], folder),)
        for name, segment in program.segments.items()
    }
    write_manifest(folder, write_contents(program, folder, engines))
    return Pipeline(open_bundle(folder), TARGET, threads)
