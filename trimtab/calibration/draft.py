"""A Program, run while it is still being compiled."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from trimtab.bundle import open_bundle, write_manifest
from trimtab.program import TEXT, Program, TensorSpec
from trimtab.runtime.load import Pipeline
from trimtab.runtime.sessions.onnxruntime import OnnxRuntimeCpu
from trimtab.storage import GRAPHS, with_engines, write_contents, write_graphs
from trimtab.targets.device import find_device
from trimtab.targets.engines import make_engines
from trimtab.weights import WeightStore

logger = logging.getLogger(__name__)

TARGET = "cpu"


def draft(program: Program, folder: Path, *, threads: int = 0, lean: bool = False) -> Pipeline:
    """Writes a Program as a bundle for ONNX Runtime on the CPU, and opens it.

    Args:
        program: Graphs whose weights lie in ``folder / "graphs"`` already are not copied.
        folder: What is written here is a whole bundle, and can be written again.
        threads: CPU threads for one operator; 0 for one a core.
        lean: Use weights where they lie, do not lay them out anew, and hold the engines of one stage at a time: less
            memory and more time; results differ in their last bits.

    Returns:
        A pipeline to draw with and to take steps of: close it, as it holds the engines.
    """
    (folder / GRAPHS).mkdir(parents=True, exist_ok=True)
    store = WeightStore(folder / GRAPHS)
    write_graphs(program, folder, store)
    contents = write_contents(program, folder)
    engines = make_engines(
        program.segments, contents, [find_device(TARGET)], (), store, folder, None, logger.debug
    )
    write_manifest(folder, with_engines(contents, engines))
    pipeline = Pipeline(open_bundle(folder), TARGET, threads, low_memory=lean)
    if lean:
        pipeline.engines.backend = OnnxRuntimeCpu(threads, lean=True)
    return pipeline


def with_whole_texts(program: Program) -> Program:
    """A program that fills every text up to the most tokens: what it makes of several can be stacked."""

    def whole(spec: TensorSpec) -> TensorSpec:
        sizes = (int(spec.source["length"]) if size == TEXT else size for size in spec.shape)
        return dataclasses.replace(spec, shape=tuple(sizes))

    tasks = {
        name: dataclasses.replace(task, inputs=tuple(map(whole, task.inputs)))
        for name, task in program.tasks.items()
    }
    return dataclasses.replace(program, tasks=tasks)
