"""The whole job: a model in, a bundle out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trimtab import __version__
from trimtab.bundle import MANIFEST, Bundle, open_bundle, write_manifest
from trimtab.errors import InputError, TargetError
from trimtab.export.onnx.files import export_onnx
from trimtab.export.pipeline import export_pipeline
from trimtab.export.source import Source, find
from trimtab.manifest import Contents, SegmentEntry
from trimtab.program import Program, TensorSpec
from trimtab.recipe import Recipe, make_recipe, read_toml
from trimtab.staging import check_replaceable, staged_folder
from trimtab.targets.device import Device, find_device, known_devices
from trimtab.targets.onnxruntime import OnnxRuntimeBuilder
from trimtab.weights import WeightStore, parameter_count, weight_bytes

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
        graphs = stage / "graphs"
        graphs.mkdir()
        store = WeightStore(graphs)

        def keep(name: str, graph: ir.Model) -> ir.Model:
            progress(f"exported {name}")
            return store.keep(name, graph)

        program = _export(path, chosen, keep)
        store.compact({name: segment.model for name, segment in program.segments.items()})

        entries = {}
        for name, segment in program.segments.items():
            file = graphs / f"{name}.onnx"
            store.keep(name, segment.model)
            ir.save(segment.model, file)
            builder = OnnxRuntimeBuilder()
            engines = []
            for device in devices:
                progress(f"building {name} for {device.name}")
                engines.append(builder.build(builder.lower(segment.model, device), device, file, stage))
            entries[name] = SegmentEntry(
                name=name,
                graph=file.relative_to(stage).as_posix(),
                parameters=parameter_count(segment.model),
                weight_bytes=weight_bytes(segment.model),
                inputs=_specs(segment.model.graph.inputs),
                outputs=_specs(segment.model.graph.outputs),
                engines=tuple(engines),
            )
        tokenizers = _write_tokenizers(program, stage)
        write_manifest(stage, _contents(program, entries, tokenizers))
    return open_bundle(output)


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


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    """A graph's interface; open sizes as expressions over its own symbols."""
    specs = []
    for value in values:
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
        specs.append(TensorSpec(value.name, value.dtype.numpy().name, shape))
    return tuple(specs)


def _write_tokenizers(program: Program, stage: Path) -> Mapping[str, str]:
    folder = stage / "tokenizers"
    paths = {}
    for name, text in program.tokenizers.items():
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
        paths[name] = f"tokenizers/{name}.json"
    return paths


def _contents(
    program: Program, entries: Mapping[str, SegmentEntry], tokenizers: Mapping[str, str]
) -> Contents:
    return Contents(
        tasks=program.tasks,
        epilogue=program.epilogue,
        outputs=program.outputs,
        segments=entries,
        size=program.size,
        size_multiple=program.size_multiple,
        fixed_size=program.fixed_size,
        slots=program.slots,
        tokenizers=tokenizers,
        metadata=program.metadata,
        passes=program.passes,
        version=__version__,
    )
