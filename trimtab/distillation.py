"""Distillation, from the model itself to a student's folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab.calibration.batches import Batches, Trajectories
from trimtab.calibration.draft import draft, with_whole_texts
from trimtab.calibration.noising import noising_of
from trimtab.calibration.pictures import Pictures, captioned, check_takes_pictures
from trimtab.calibration.trajectories import own_requests, record
from trimtab.compiler import export_model
from trimtab.errors import InputError
from trimtab.export.pipeline import check_options
from trimtab.export.source import Source, find
from trimtab.passes.candidates import Candidates
from trimtab.passes.experts import Experts
from trimtab.passes.removal import PLAN, RemovalPlan, check_plan, load_plan
from trimtab.passes.student import WEIGHTS, save_weights
from trimtab.program import DENOISER
from trimtab.recipe import make_recipe
from trimtab.staging import check_replaceable, staged_folder
from trimtab.storage import GRAPHS
from trimtab.weights import WeightStore

TRAJECTORIES = 32
"""From noise to picture, every step of which is trained on, unless the user says another number."""


def distill(
    model: str | Path,
    plan: str | Path | None,
    output: str | Path,
    *,
    trajectories: int = TRAJECTORIES,
    prompts: tuple[str, ...] | None = None,
    guidance: float | None = None,
    data: str | Path | None = None,
    starts: Mapping[str, str] | None = None,
    experts: Experts | None = None,
    progress: Callable[[float, float], None] | None = None,
    budget: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains a model with layers removed, or with experts added, to answer as the whole one does.

    Args:
        model: The teacher: a diffusers folder, a hub id, or a TOML file that names .onnx files.
        plan: A removal plan; None to keep all layers, where experts are added and learn from data.
        output: The student's folder: the plan, and weights that ``compile(removal_plan=...)`` puts back.
            ``OUTPUT.checkpoint`` lies beside it while it is trained; after an interruption it is gone on with.
        trajectories: Of the teacher, to train on.
        prompts: For text models; None for plain ones.
        guidance: Of the trajectories; None for the model's own.
        data: A folder of captioned pictures to train on in the place of trajectories, with a task term: see
            `trimtab.calibration.pictures.captioned`.
        starts: Module of the student -> module of the teacher that it starts from in the place of itself.
        experts: Of the student's convolutions: see `trimtab.passes.experts`. None leaves them plain.
        progress: Told (the share of the budget that is spent, the loss).
        budget: Fields of `trimtab.calibration.distill.Budget`.
        **options: Fields of `trimtab.recipe.Recipe` that decide the trajectories: steps, scheduler, size.

    Returns:
        ``student``, ``steps``, ``seconds``, ``parameters`` (before, after), ``losses`` (first, last), ``data``: what
        it was trained on.

    Raises:
        InputError: No budget; the plan or the data cannot be read, or the model cannot be trained on data; something
            else stands at the output.
        PassError: The plan is of another model; torch cannot train the graph; a module cannot start from another, or
            there is no convolution that experts are to be of.
        CalibrationError: The loss is not finite; the checkpoint is of another run.
    """
    if plan is None and (experts is None or data is None):
        raise InputError(
            "a student that lacks nothing has nothing to learn from its teacher: give a removal plan, or experts and "
            "data"
        )
    if trajectories < 1:
        raise InputError(f"{trajectories} trajectories to train on were asked for: give 1 or more")
    chosen = None if plan is None else load_plan(Path(plan))
    pairs = None if data is None else captioned(Path(data))
    output = Path(output)
    check_replaceable(output, PLAN)
    options["guidance"] = guidance
    recipe = make_recipe({name: value for name, value in options.items() if value is not None})
    path = find(str(model))
    if path.is_dir():
        check_options(Source(path), guidance=recipe.guidance)
    # These import torch, which takes seconds: what is wrong with the rest is said at once.
    from trimtab.calibration.distill import Budget
    from trimtab.calibration.distill import distill as train

    limits = Budget(**(budget or {}))
    checkpoint = output.with_name(output.name + ".checkpoint")
    with tempfile.TemporaryDirectory(prefix="trimtab-") as temporary:
        folder = Path(temporary)
        (folder / GRAPHS).mkdir()
        program = export_model(path, recipe, WeightStore(folder / GRAPHS).keep, folder)
        teacher = program.segments[DENOISER].model
        if chosen is None:
            chosen = RemovalPlan(Candidates(teacher).fingerprint, (), "none")
        candidates = check_plan(program, chosen)
        batches: Batches
        with draft(with_whole_texts(program), folder) as pipeline:
            if pairs is not None:
                check_takes_pictures(
                    pipeline
                )  # before a scheduler is looked for, which .onnx files have elsewhere
                batches = Pictures(pipeline, teacher, noising_of(Source(path).load("scheduler")), pairs)
            else:
                given: dict[str, Any] = {} if guidance is None else {"guidance": guidance}
                requests = own_requests(pipeline, trajectories, prompts=prompts, **given)
                batches = Trajectories(teacher, record(pipeline, requests))
        student = train(
            teacher,
            chosen,
            batches,
            limits,
            starts=starts,
            experts=experts,
            checkpoint=checkpoint,
            progress=progress,
        )
        freed, _ = candidates.freed(chosen.removed)
    with staged_folder(output, PLAN) as stage:
        how: dict[str, Any] = {"steps": student.steps, "features": limits.features, "data": batches.identity}
        how |= {"starts": dict(starts)} if starts else {}
        details = {**chosen.details, "distilled": how}
        replace(chosen, details=details).save(stage / PLAN)
        save_weights(stage, student.weights, student.teacher)
        if experts is not None:
            experts.save(stage)
    checkpoint.unlink(missing_ok=True)
    return {
        "student": str(output / WEIGHTS),
        "steps": student.steps,
        "seconds": round(student.seconds, 2),
        "parameters": [candidates.parameters, candidates.parameters - freed],
        "losses": list(student.losses),
        "data": batches.identity,
    }
