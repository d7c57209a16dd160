"""The whole job: a model in, a bundle out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from trimtab.apart import export_apart
from trimtab.bundle import MANIFEST, Bundle, open_bundle, write_manifest
from trimtab.calibration.kmeans import check_installed
from trimtab.calibration.ranges import FILE as RANGES
from trimtab.calibration.ranges import measure_ranges
from trimtab.calibration.sensitivity import asked_for
from trimtab.errors import InputError
from trimtab.export.onnx.files import export_onnx
from trimtab.export.pipeline import check_options, export_pipeline
from trimtab.export.source import Source, find
from trimtab.manifest import Engine
from trimtab.passes.hidiffusion import scale_of
from trimtab.program import Program, check_size, with_guidance
from trimtab.recipe import Recipe, make_recipe
from trimtab.staging import check_replaceable, staged_folder
from trimtab.storage import GRAPHS, with_engines, write_contents, write_graphs
from trimtab.switching import check_carried_out, check_switches
from trimtab.targets.device import Device, find_device
from trimtab.targets.engines import check_targets, make_engines, open_cache
from trimtab.targets.place import DEFAULT_CACHE, Place
from trimtab.targets.precision import by_precision, in_precision
from trimtab.targets.verdict import check_room
from trimtab.toml_file import read_toml
from trimtab.transforms import timed_device, transform
from trimtab.weights import WeightStore

if TYPE_CHECKING:
    from trimtab.targets.cache import EngineCache

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]
"""Told what is being worked on."""


def compile(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    device_file: str | Path | None = None,
    cache: Place = DEFAULT_CACHE,
    progress: Progress = logger.info,
    **options: Any,
) -> Bundle:
    """Compiles a model into a bundle.

    Args:
        model: A diffusers folder, a hub id, or a TOML file that names .onnx files.
        output: The bundle's folder. An older bundle there is replaced once the new one is whole.
        recipe: A TOML file with options; keywords go before what it says.
        device_file: A TOML file with devices of one's own, for the targets.
        cache: A folder or URL where engines are looked for and kept; None for none. Without a GPU among the targets
            it is not touched.
        progress: Told what is being worked on.
        **options: The fields of `trimtab.recipe.Recipe`: targets, steps, scheduler, size, ...

    Returns:
        The bundle, opened.

    Raises:
        InputError: The model, the recipe or an option cannot be used.
        ExportError: The model cannot be exported.
        TargetError: A target cannot be built for.
        CalibrationError: A file of scores holds none.
        MissingDependency: A target's builder is not installed, or what packs weights.
    """
    given = {name: value for name, value in options.items() if value is not None}
    chosen = make_recipe((read_toml(Path(recipe)) if recipe else {}) | given)
    devices = [find_device(name, device_file) for name in chosen.targets]
    groups = by_precision(devices, chosen.precision)
    halves = [device for precision, those in groups.items() if precision != "fp32" for device in those]
    check_targets(devices, kernels=halves if chosen.vq is not None else ())
    if chosen.vq is not None:
        check_installed()
    device = timed_device(chosen, devices)
    if chosen.removal_plan is not None:
        check_carried_out(Path(chosen.removal_plan))  # as all that files say: before the export
    if chosen.scores is not None:
        asked_for(Path(chosen.scores))
    check_switches(chosen.switch, chosen.steps, chosen.scheduler)
    output = Path(output)
    # What is replaced may be the working folder, which has no relative paths afterwards.
    place = output.absolute()
    check_replaceable(output, MANIFEST)
    path = find(str(model))
    if path.is_dir():
        check_options(Source(path), guidance=chosen.guidance, hidiffusion=chosen.hidiffusion)
    opened = _open_cache(cache, devices)  # what is wrong with it is said before hours of work

    with staged_folder(output, MANIFEST) as stage:
        (stage / GRAPHS).mkdir()
        store = WeightStore(stage / GRAPHS)

        def keep(name: str, graph: ir.Model) -> ir.Model:
            progress(f"exported {name}")
            return store.keep(name, graph)

        if chosen.remove is not None:
            # Layers are measured first, which takes long: what torch keeps of a checkpoint is gone by then.
            decide = {name: getattr(chosen, name) for name in ("steps", "scheduler", "size", "eta", "tasks")}
            decide = {name: value for name, value in decide.items() if value is not None}
            program = export_apart(path, decide, stage)
            progress(f"exported {', '.join(program.segments)}")
        else:
            program = export_model(path, chosen, keep, stage)
        if chosen.guidance is not None:
            program = with_guidance(program, chosen.guidance)
        for size in chosen.buckets:
            check_size(size, program.size, program.size_multiple, program.fixed_size, program.largest_side)
        if chosen.hidiffusion:
            _check_larger(program, (program.size, *chosen.buckets), devices)
        program = transform(program, chosen, stage, progress, device=device)
        store.compact({name: segment.model for name, segment in program.segments.items()})
        _drop_drafts(stage)
        write_graphs(program, stage, store)
        sizes = (program.size, *chosen.buckets)
        contents = write_contents(program, stage)
        check_room(program, contents, groups, sizes)
        ranges = None
        if "fp16" in groups:
            measured = measure_ranges(program, stage, earlier=output / RANGES, progress=progress)
            measured.save(stage / RANGES)
            ranges = measured.segments
            _drop_drafts(stage)  # they measured themselves
            write_graphs(program, stage, store)
        forms = {precision: in_precision(program, precision, ranges) for precision in groups}
        contents = replace(contents, passes=tuple(dict.fromkeys(e for f in forms.values() for e in f.passes)))
        engines: dict[str, tuple[Engine, ...]] = dict.fromkeys(program.segments, ())
        for precision, form in forms.items():
            write_graphs(form, stage, store)
            made = make_engines(
                form.segments, contents, groups[precision], sizes, store, stage, opened, progress
            )
            engines = {name: engines[name] + made[name] for name in engines}
        write_manifest(stage, with_engines(contents, engines))
    return open_bundle(place)


def _drop_drafts(stage: Path) -> None:
    """Removes the graphs that calibration ran: their names need not be those of the bundle's."""
    for path in (stage / GRAPHS).glob("*.onnx"):
        path.unlink()


def _check_larger(program: Program, sizes: Iterable[tuple[int, int]], devices: Iterable[Device]) -> None:
    """Refuses HiDiffusion where the engines would draw nothing that it is for."""
    trained = program.trained_size or program.size
    larger = any(scale_of(size, trained) > 1 for size in sizes)
    if not larger and all(device.backend != "onnxruntime" for device in devices):
        raise InputError(
            f"HiDiffusion is for pictures of more than {trained[0]}x{trained[1]}, and no engine would be made for one: "
            "give a larger --size too, or leave --hidiffusion out"
        )


def _open_cache(place: str | Path | None, devices: Iterable[Device]) -> EngineCache | None:
    needed = any(device.backend != "onnxruntime" for device in devices)
    return open_cache(place) if needed else None


def export_model(
    path: Path, recipe: Recipe, keep: Callable[[str, ir.Model], ir.Model], scratch: Path
) -> Program:
    """The whole model as a Program.

    Args:
        path: A diffusers folder, or a TOML file that names .onnx files.
        recipe: Steps, scheduler, size and tasks.
        keep: Writes a segment's weights to disk as soon as they are traced.
        scratch: A folder on a disk with as much room as the largest part takes in float32.
    """
    options: dict[str, Any] = {} if recipe.eta is None else {"eta": recipe.eta}
    if path.suffix == ".onnx" and path.is_file():
        raise InputError(
            f"{path} is one graph, and how to run it is not in it: write a model.toml beside it with "
            f'size = [W, H], [scheduler] class = "DDIMScheduler" and [denoiser] file = "{path.name}", and give '
            "that (docs/onnx.md)"
        )
    if path.is_file() and path.suffix != ".toml":
        whole = path.suffix in (".safetensors", ".ckpt")
        advice = (
            "save a folder from it with diffusers' from_single_file (docs/models.md)" if whole else "give one"
        )
        raise InputError(f"{path} is a file, and a diffusers folder, a hub id or a .toml is needed: {advice}")
    if path.is_file():
        return export_onnx(
            path,
            keep,
            steps=recipe.steps,
            scheduler=recipe.scheduler,
            size=recipe.size,
            step_options=options,
            tasks=recipe.tasks,
        )
    return export_pipeline(
        Source(path, scratch),
        keep,
        steps=recipe.steps,
        scheduler=recipe.scheduler,
        size=recipe.size,
        step_options=options,
        tasks=recipe.tasks,
    )
