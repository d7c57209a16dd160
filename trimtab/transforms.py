"""What a recipe does to a Program between export and engines, in the order in which it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from trimtab.errors import InputError
from trimtab.passes.context import hoist_context
from trimtab.passes.hidiffusion import check_places, hidiffusion
from trimtab.passes.hoist import hoist
from trimtab.passes.inherit import check_plan, inherit
from trimtab.passes.inherit_plan import FILE as INHERITED
from trimtab.passes.inherit_plan import InheritPlan, save_plan
from trimtab.passes.mix_kernels import mix_kernels
from trimtab.passes.partition import partition
from trimtab.passes.removal import PLAN, load_plan, remove_layers
from trimtab.passes.switch import switch
from trimtab.passes.time_tables import tabulate_times
from trimtab.passes.unread import drop_unread
from trimtab.program import Program
from trimtab.recipe import Recipe
from trimtab.switching import carry_out, open_switches
from trimtab.targets.device import Device
from trimtab.targets.precision import choose_precision

Progress = Callable[[str], None]


def transform(
    program: Program,
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    *,
    device: Device | None = None,
) -> Program:
    """Removes, packs and skips, as the recipe says.

    Each step is a function from Program to Program. Layers are removed from the whole model, as it was scored; what
    comes after that is done to every denoiser that the steps switch between.
    Weights are packed before anything names values inside of the graph, and the graph is cut at those values at
    the very end, once for all.

    Args:
        program: As it was exported. Its graphs are edited.
        recipe: What is wanted.
        folder: Where a program is drafted that has to be run; weights in ``folder / "graphs"`` are not copied.
        progress: Told what is being worked on.
        device: From `timed_device`.

    Raises:
        InputError: Something that the recipe names is not there.
        PassError: A graph that a pass cannot take.
        CalibrationError: Weights or measurements that cannot be used.
    """
    # Of the whole model: what is not there, or does not fit, is said before layers are scored and weights are trained.
    switches = open_switches(program, recipe.switch)
    whole = switch(program, switches.others, switches.ranges) if recipe.switch else program
    if recipe.hidiffusion:
        check_places(whole)
    if recipe.inherit is not None:
        check_plan(whole, recipe.inherit)
    program = _remove(program, recipe, folder, progress, device)
    if recipe.switch:
        program = switch(program, switches.others, switches.ranges)
    program = mix_kernels(program)  # every weight is a number from here on
    if recipe.vq is not None:
        program = _packed(program, recipe, recipe.vq, folder, progress)
    if recipe.hidiffusion:
        program = hidiffusion(program)
    if recipe.inherit is not None:
        program = inherit(program, _searched(program, recipe, recipe.inherit, folder, progress))
    if recipe.hoist:
        program = hoist(hoist_context(tabulate_times(program)))
    return drop_unread(partition(program))


def _searched(
    program: Program, recipe: Recipe, plan: InheritPlan, folder: Path, progress: Progress
) -> InheritPlan:
    """The plan with its schedule, where it asks for a speed; what was found lies in the bundle."""
    if plan.speed is None:
        return plan
    from trimtab.calibration.drift import Effort, search

    log = Path(recipe.drifts) if recipe.drifts is not None else None
    found = search(program, plan, folder, Effort(log=log), progress)
    save_plan(found, folder / INHERITED)
    return found


def _packed(program: Program, recipe: Recipe, bits: int, folder: Path, progress: Progress) -> Program:
    """The denoisers' weights as codes into codebooks."""
    from trimtab.calibration.codebook_plan import Settings
    from trimtab.calibration.packing import packed

    return packed(
        program,
        Settings(bits, recipe.vq_rules, recipe.vq_scale),
        folder,
        minutes=recipe.vq_minutes,
        store=recipe.vq_codebooks,
        progress=progress,
    )


def timed_device(recipe: Recipe, devices: Sequence[Device]) -> Device | None:
    """The target whose time a share is to be removed of; None where it is of something else.

    Raises:
        InputError: None of the targets has known peaks, or several have.
    """
    if recipe.remove_of != "time":
        return None
    known = [device for device in devices if device.fp32_tflops and device.bandwidth_gb_s]
    if len(known) != 1:
        found = "several" if known else "none"
        raise InputError(
            f"a share of time is of one device whose peaks are known, and {found} of the targets "
            f"{', '.join(device.name for device in devices)} is such a one: give one --target of trimtab devices"
        )
    return known[0]


def _remove(
    program: Program, recipe: Recipe, folder: Path, progress: Progress, device: Device | None
) -> Program:
    """The program with layers removed, where the recipe says so; the plan lies in the bundle."""
    if recipe.removal_plan is not None:
        path = Path(recipe.removal_plan)
        load_plan(path).save(folder / PLAN)
        return carry_out(program, path)
    if recipe.remove is None:
        return program
    from trimtab.calibration.choice import Wish
    from trimtab.calibration.planning import Calibration, plan_removal

    calibration = Calibration.of_scores(Path(recipe.scores)) if recipe.scores else Calibration()
    plan = plan_removal(
        program,
        Wish(
            recipe.remove,
            recipe.keep,
            recipe.drop,
            recipe.remove_of,
            device,
            "fp32" if device is None else choose_precision(recipe.precision, device),
        ),
        method=recipe.remove_by,
        calibration=calibration,
        folder=folder,
        progress=lambda done, total: progress(f"removal: {done} of {total} evaluations"),
    )
    plan.save(folder / PLAN)
    return remove_layers(program, plan)
