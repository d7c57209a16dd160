"""A Program from .onnx files that others exported, wired by a .toml file (docs/onnx.md)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trimtab.errors import ExportError, InputError, nearest
from trimtab.export.onnx.description import (
    DECODER,
    GraphTable,
    Host,
    Label,
    OnnxFiles,
    Tokens,
    read_onnx_toml,
)
from trimtab.export.onnx.graphs import Foreign, open_graph
from trimtab.export.onnx.parts import add_decoder, add_denoiser, add_prologue
from trimtab.export.onnx.wires import Wires
from trimtab.export.parts import Keep, Parts
from trimtab.export.pipeline import finish
from trimtab.export.sampler import make_scheduler
from trimtab.export.sampler.schedulers import SCHEDULERS
from trimtab.export.sampler.schedules import Sampling
from trimtab.passes.sampler import ROWS_BATCH
from trimtab.program import DENOISER, Program


def export_onnx(
    path: Path,
    keep: Keep,
    *,
    steps: tuple[int, ...],
    scheduler: str | None = None,
    size: tuple[int, int] | None = None,
    step_options: Mapping[str, Any] | None = None,
    tasks: tuple[str, ...] = (),
) -> Program:
    """Wires .onnx files into a program and compiles the sampler into the denoiser.

    Args:
        path: The .toml file.
        keep: Called with each segment's graph as soon as it is adapted, to copy the weights.
        steps: Numbers of steps, one schedule each.
        scheduler: A name of `trimtab.export.sampler.schedulers.SCHEDULERS`; None for the file's own.
        size: (width, height) in pixels that becomes the program's native one; None for the file's.
        step_options: For the scheduler's ``step``: ``eta``.
        tasks: What the program is to do; none for all that it can.

    Raises:
        InputError: The .toml file, a graph or an option is wrong, or they do not fit each other.
        ExportError: A graph or the scheduler cannot be compiled.
    """
    files = read_onnx_toml(path)
    own = _scheduler(files)
    chosen = (
        make_scheduler(scheduler, {**own.config, "_class_name": type(own).__name__}) if scheduler else own
    )
    opened = {table.name: open_graph(table.name, table.file) for table in files.tables}
    _check_references(files, opened)

    parts = Parts(f"ONNX files ({files.title})", keep)
    parts.tasks = tasks
    parts.strength = {}  # pictures as inputs need an encoder and a draw from its posterior
    _guide(files, parts)
    wires = Wires(path, parts, files.guidance is not None)
    for table in _in_order(files):
        add_prologue(files, opened[table.name], table, wires)
    whole_steps, rows = add_denoiser(files, opened[DENOISER], wires)
    add_decoder(files, opened.get(DECODER), parts)
    parts.choose_tasks()
    program = finish(parts, Sampling(chosen, steps, parts.step_options | dict(step_options or {})), size)
    if whole_steps:
        _check_whole_steps(program, opened[DENOISER])
    if rows is not None:
        _fix_rows(program.segments[DENOISER].model.graph, rows, parts.classifier_free)
    return program


def _scheduler(files: OnnxFiles) -> Any:
    name = SCHEDULERS.get(files.scheduler_class.lower(), files.scheduler_class)
    import diffusers

    known = getattr(diffusers, name, None)
    if known is not None:
        names = [n for n in inspect.signature(known.__init__).parameters if n not in ("self", "kwargs")]
        for option in files.scheduler_options:
            if option not in names:
                raise InputError(f"{files.path}: {name} has no option {option!r}: {nearest(option, names)}")
    return make_scheduler(name, {"_class_name": name, **files.scheduler, **files.scheduler_options})


def _check_references(files: OnnxFiles, opened: Mapping[str, Foreign]) -> None:
    """Every table and output that is named exists; every further graph is read."""
    read = set()
    for table in files.tables:
        for graph, output in table.references():
            if graph not in files.graphs:
                raise InputError(
                    f"{files.path}: [{table.name}.inputs] names {graph}.{output}, and there is no graph "
                    f"[{graph}]: {nearest(graph, files.graphs)}"
                )
            opened[graph].output(output)
            read.add(graph)
    for name in files.graphs:
        if name not in read:
            raise InputError(
                f"{files.path}: nothing reads [{name}]: name one of its outputs in [{DENOISER}.inputs], or leave "
                f"it out (the graph that makes the picture is called [{DECODER}])"
            )


def _in_order(files: OnnxFiles) -> list[GraphTable]:
    """The further graphs, each behind those that it reads."""
    done: dict[str, GraphTable] = {}
    left = dict(files.graphs)
    while left:
        ready = [t for t in left.values() if all(graph in done for graph, _ in t.references())]
        if not ready:
            raise InputError(f"{files.path}: {' and '.join(left)} read each other: no graph can run first")
        done |= {table.name: table for table in ready}
        left = {name: table for name, table in left.items() if name not in done}
    return [*done.values()]


def _guide(files: OnnxFiles, parts: Parts) -> None:
    """Decides how guidance works: by negative rows, or by an input that takes the scale."""
    wires = [wire for table in files.tables for wire in table.inputs.values()]
    takes_scale = any(isinstance(wire, Host) and wire.kind == "guidance" for wire in wires)
    parts.guidance = files.guidance
    parts.classifier_free = files.guidance is not None and not takes_scale
    if takes_scale and files.guidance is None:
        raise InputError(
            f"{files.path}: an input takes the guidance scale and there is none: add guidance = 3.5"
        )
    if parts.classifier_free and not any(isinstance(wire, Tokens | Label) for wire in wires):
        raise InputError(
            f"{files.path}: guidance = {files.guidance:g} needs a prompt or a class to guide by, and no input "
            "reads tokens or a class: leave guidance out"
        )


# ---- once the sampler is in ----


def _check_whole_steps(program: Program, foreign: Foreign) -> None:
    for task in program.tasks.values():
        for name, schedule in task.schedules.items():
            for step in schedule.steps:
                # What follows the picture's size is in a table of the program's, and not whole.
                value = step.constants.get("timestep", (math.nan,))[0]
                if not value.is_integer():
                    moved = math.isnan(value)
                    has = "time steps that follow the size" if moved else f"the time step {value:g}"
                    raise ExportError(
                        f"the schedule {name} has {has} and {foreign.file.name} takes whole ones: export it with a "
                        "float32 time step, or choose another scheduler"
                    )


def _fix_rows(graph: ir.Graph, rows: int, classifier_free: bool) -> None:
    """Writes a fixed batch into the fused denoiser's interface, so that another is refused when it is bound.

    With classifier-free guidance the state's batch stays open: two rows are one picture's or two pictures'.
    """
    fixed = {ROWS_BATCH} | (set() if classifier_free else {"batch"})
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape(
            [rows if not isinstance(d, int) and d.value in fixed else d for d in value.shape]
        )
