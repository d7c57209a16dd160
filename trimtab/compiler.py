"""The whole job: a model in, a bundle out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trimtab.bundle import MANIFEST, Bundle, open_bundle, write_manifest
from trimtab.errors import InputError, TargetError
from trimtab.export.onnx.files import export_onnx
from trimtab.export.pipeline import export_pipeline
from trimtab.export.source import Source, find
from trimtab.manifest import Engine
from trimtab.passes.inherit import inherit
from trimtab.passes.partition import partition
from trimtab.program import Program
from trimtab.recipe import Recipe, make_recipe, read_toml
from trimtab.staging import check_replaceable, staged_folder
from trimtab.storage import GRAPHS, write_contents, write_graphs
from trimtab.targets.device import Device, find_device, known_devices
from trimtab.targets.onnxruntime import OnnxRuntimeBuilder
from trimtab.weights import WeightStore

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]
"""Told what is being worked on."""


def compile(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    device_file: str | Path | None = None,
    progress: Progress = logger.info,
    **options: Any,
) -> Bundle:
    """Compiles a model into a bundle.

    Args:
        model: A diffusers folder, a hub id, or a TOML file that names .onnx files.
        output: The bundle's folder. An older bundle there is replaced once the new one is whole.
        recipe: A TOML file with options; keywords go before what it says.
        device_file: A TOML file with devices of one's own, for the targets.
        progress: Told what is being worked on.
        **options: The fields of `trimtab.recipe.Recipe`: targets, steps, scheduler, size, ...

    Returns:
        The bundle, opened.

    Raises:
        InputError: The model, the recipe or an option cannot be used.
        ExportError: The model cannot be exported.
        TargetError: A target cannot be built for.
    """
    given = {name: value for name, value in options.items() if value is not None}
    chosen = make_recipe((read_toml(Path(recipe)) if recipe else {}) | given)
    devices = _buildable(chosen.targets, device_file)
    output = Path(output)
    check_replaceable(output, MANIFEST)
    path = find(str(model))

    with staged_folder(output, MANIFEST) as stage:
        (stage / GRAPHS).mkdir()
        store = WeightStore(stage / GRAPHS)

        def keep(name: str, graph: ir.Model) -> ir.Model:
            progress(f"exported {name}")
            return store.keep(name, graph)

        program = _export(path, chosen, keep)
        program = _transform(program, chosen)
        store.compact({name: segment.model for name, segment in program.segments.items()})

        files = write_graphs(program, stage, store)
        builder = OnnxRuntimeBuilder()
        engines: dict[str, list[Engine]] = {name: [] for name in program.segments}
        for name, segment in program.segments.items():
            for device in devices:
                progress(f"building {name} for {device.name}")
                lowered = builder.lower(segment.model, device)
                engines[name].append(builder.build(lowered, device, files[name], stage))
        write_manifest(stage, write_contents(program, stage, engines))
    return open_bundle(output)


def _transform(program: Program, recipe: Recipe) -> Program:
    """What the recipe does to the pipeline: each a function from Program to Program."""
    if recipe.inherit is not None:
        program = inherit(program, recipe.inherit)
    return partition(program)


def _buildable(names: Iterable[str], device_file: str | Path | None) -> list[Device]:
    """The targets; before any work, those that no builder serves are refused."""
    able = OnnxRuntimeBuilder.backend
    devices = [find_device(name, device_file) for name in names]
    for device in devices:
        if device.backend != able:
            others = [d.name for d in known_devices(device_file).values() if d.backend == able]
            raise TargetError(
                f"{device.name} needs engines of {device.backend}, and only those of {able} can be built yet: "
                f"choose {' or '.join(others)} as the target"
            )
    return devices


def _export(path: Path, recipe: Recipe, keep: Callable[[str, ir.Model], ir.Model]) -> Program:
    options: dict[str, Any] = {} if recipe.eta is None else {"eta": recipe.eta}
    if path.suffix == ".onnx" and path.is_file():
        raise InputError(
            f"{path} is one graph, and how to run it is not in it: write a model.toml beside it with "
            f'size = [W, H], [scheduler] class = "DDIMScheduler" and [denoiser] file = "{path.name}", and give '
            "that (docs/onnx.md)"
        )
    if path.is_file() and path.suffix != ".toml":
        raise InputError(f"{path} is a file, and a diffusers folder, a hub id or a .toml is needed: give one")
    if path.is_file():
        return export_onnx(
            path,
            keep,
            steps=recipe.steps,
            scheduler=recipe.scheduler,
            size=recipe.size,
            step_options=options,
        )
    return export_pipeline(
        Source(path),
        keep,
        steps=recipe.steps,
        scheduler=recipe.scheduler,
        size=recipe.size,
        step_options=options,
    )
