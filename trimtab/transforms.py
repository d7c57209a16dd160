"""What a recipe does to a Program between export and engines, in the order in which it is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trimtab.export.source import Source
from trimtab.passes.hidiffusion import hidiffusion
from trimtab.passes.inherit import inherit
from trimtab.passes.inherit_plan import InheritPlan
from trimtab.passes.partition import partition
from trimtab.program import Program
from trimtab.recipe import Recipe

Progress = Callable[[str], None]


def transform(
    program: Program, recipe: Recipe, folder: Path, progress: Progress, *, source: Source | None = None
) -> Program:
    """Packs and skips, as the recipe says.

    Each step is a function from Program to Program. Weights are packed before anything names values inside of
    the graph, and the graph is cut at those values at the very end, once for all.

    Args:
        program: As it was exported. Its graphs are edited.
        recipe: What is wanted.
        folder: Where a program is drafted that has to be run; weights in ``folder / "graphs"`` are not copied.
        progress: Told what is being worked on.
        source: The pipeline that it was exported from, where it was one: calibration trains its denoiser.

    Raises:
        InputError: Something that the recipe names is not there.
        PassError: A graph that a pass cannot take.
        CalibrationError: Weights or measurements that cannot be used.
    """
    if recipe.vq is not None:
        program = _packed(program, recipe, recipe.vq, folder, source, progress)
    if recipe.hidiffusion:
        program = hidiffusion(program)
    if recipe.inherit is not None:
        program = inherit(program, _searched(program, recipe.inherit, folder, progress))
    return partition(program)


def _searched(program: Program, plan: InheritPlan, folder: Path, progress: Progress) -> InheritPlan:
    """The plan with its schedule, where it asks for a speed."""
    if plan.speed is None:
        return plan
    from trimtab.calibration.drift import search

    return search(program, plan, folder, progress=progress)


def _packed(
    program: Program, recipe: Recipe, bits: int, folder: Path, source: Source | None, progress: Progress
) -> Program:
    """The denoisers' weights as codes into codebooks."""
    from trimtab.calibration.kmeans import Settings
    from trimtab.calibration.packing import packed

    return packed(
        program,
        Settings(bits, recipe.vq_rules, recipe.vq_scale),
        folder,
        source=source,
        minutes=recipe.vq_minutes,
        store=recipe.vq_codebooks,
        progress=progress,
    )
