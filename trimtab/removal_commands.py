"""The part of the command line that is about layer removal: score, distill, and options of compile."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab import options, render
from trimtab.errors import InputError

if TYPE_CHECKING:
    from trimtab.passes.experts import Experts

RECIPE = ("remove", "remove_of", "remove_by", "keep", "drop", "scores", "removal_plan")
"""Options of `add_options` that are fields of a recipe."""

_MODEL = "a diffusers folder, a hub id, or a .toml file that names .onnx files"


def add_options(command: argparse.ArgumentParser) -> None:
    """What `trimtab compile` is told of removal."""
    group = command.add_argument_group("layer removal (docs/removal.md)")
    group.add_argument(
        "--remove", type=float, metavar="R", help="the share of the denoiser to remove, 0 to 1"
    )
    group.add_argument(
        "--remove-of",
        metavar="WHAT",
        help="what the share is of: parameters (default), bytes, or time, of a step on the --target",
    )
    group.add_argument(
        "--remove-by", metavar="METHOD", help="output-loss (default), bk-sdm-small, magnitude, random, ..."
    )
    group.add_argument("--keep", action="append", metavar="GLOB", help="modules to keep; repeatable")
    group.add_argument("--drop", action="append", metavar="GLOB", help="modules to remove; repeatable")
    group.add_argument("--scores", metavar="FILE", help="losses that `trimtab score` wrote")
    group.add_argument(
        "--removal-plan",
        metavar="PATH",
        help="a saved plan, or what `trimtab distill` wrote, in the place of the above",
    )


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the commands, each with ``add(name, text, example, run, show)``."""
    command = add(
        "score",
        "measure what removing each layer costs, for compile --remove",
        "trimtab score ./stable-diffusion-v1-5 --samples 16 -o sd15.losses",
        _score,
        render.score,
    )
    command.add_argument("model", help=_MODEL)
    command.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="losses; what is there already stays"
    )
    command.add_argument("--samples", type=int, default=16, metavar="N", help="evaluations each (default 16)")
    command.add_argument("--prompt", action="append", metavar="TEXT", help="of the trajectories; repeatable")
    command.add_argument("--steps", type=int, metavar="N", help="of the trajectories (default 20)")
    command.add_argument("--scheduler", metavar="NAME")
    command.add_argument("--size", type=options.size, metavar="WxH")
    command.add_argument("--processes", type=int, default=1, metavar="N")
    command.add_argument("--threads", type=int, default=1, metavar="N", help="of each process (default 1)")
    command.add_argument("--ray", metavar="ADDRESS", help="of a Ray cluster, or local")

    command = add(
        "distill",
        "train a model with layers removed to answer as the whole one",
        "trimtab distill ./stable-diffusion-v1-5 --plan sd15.bundle/removal.json --minutes 60 -o student",
        _distill,
        render.distill,
    )
    command.add_argument("model", help=_MODEL)
    command.add_argument(
        "--plan", metavar="FILE", help="removal.json of a bundle: which layers the student lacks"
    )
    command.add_argument(
        "--experts",
        type=int,
        metavar="K",
        help="make convolutions mixtures of K by time step (docs/experts.md)",
    )
    command.add_argument(
        "--expert-ranges", type=int, metavar="N", help="of time steps, each with its own mixture (default K)"
    )
    command.add_argument(
        "--experts-in",
        action="append",
        metavar="GLOB",
        help="convolutions that become mixtures; repeatable (default: those of all blocks)",
    )
    command.add_argument("-o", "--output", required=True, metavar="FOLDER", help="for compile --removal-plan")
    command.add_argument("--minutes", type=float, metavar="M", help="how long to train")
    command.add_argument("--steps", type=int, metavar="N", help="of the optimizer; the first limit ends it")
    command.add_argument("--batch", type=int, metavar="N", help="evaluations a step (default 16)")
    command.add_argument("--rate", type=float, metavar="R", help="highest learning rate (default 3e-4)")
    command.add_argument("--features", metavar="KIND", help="normalized (default), plain or none")
    command.add_argument(
        "--start",
        action="append",
        type=_start,
        metavar="MODULE=OTHER",
        help="let a module start from the weights of another one of the whole model; repeatable",
    )
    command.add_argument(
        "--trajectories", type=int, default=32, metavar="N", help="of the teacher (default 32)"
    )
    command.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="captioned pictures to train on in the place of trajectories",
    )
    command.add_argument("--prompt", action="append", metavar="TEXT", help="of the trajectories; repeatable")
    command.add_argument("--guidance", type=float, metavar="G", help="of the trajectories")
    command.add_argument("--scheduler", metavar="NAME")
    command.add_argument("--size", type=options.size, metavar="WxH")


def _score(arguments: argparse.Namespace) -> dict[str, Any]:
    from trimtab.calibration.planning import Calibration
    from trimtab.calibration.workers import Workers
    from trimtab.scoring import score

    calibration = Calibration(
        samples=arguments.samples,
        prompts=tuple(arguments.prompt) if arguments.prompt else None,
        workers=Workers(arguments.processes, arguments.threads, arguments.ray),
        log=arguments.output,
    )
    recipe = {"scheduler": arguments.scheduler, "size": arguments.size, "steps": arguments.steps}
    with render.bar() as progress:
        return score(arguments.model, calibration, progress=progress, **recipe)


def _distill(arguments: argparse.Namespace) -> dict[str, Any]:
    from trimtab.distillation import distill

    limits = ("minutes", "steps", "batch", "rate", "features")
    budget = {name: value for name in limits if (value := getattr(arguments, name)) is not None}
    with render.bar() as bar:
        return distill(
            arguments.model,
            arguments.plan,
            arguments.output,
            trajectories=arguments.trajectories,
            prompts=tuple(arguments.prompt) if arguments.prompt else None,
            guidance=arguments.guidance,
            data=arguments.data,
            starts=_once(arguments.start or ()),
            experts=_experts(arguments),
            progress=None if bar is None else lambda share, _: bar(round(100 * share), 100),
            budget=budget,
            scheduler=arguments.scheduler,
            size=arguments.size,
        )


def _experts(arguments: argparse.Namespace) -> Experts | None:
    if arguments.experts is None:
        if arguments.expert_ranges is not None or arguments.experts_in:
            raise InputError("--expert-ranges and --experts-in say more of --experts: give it too")
        return None
    from trimtab.passes.experts import Experts

    ranges = arguments.experts if arguments.expert_ranges is None else arguments.expert_ranges
    return Experts(arguments.experts, ranges, tuple(arguments.experts_in or ()))


def _start(text: str) -> tuple[str, str]:
    """``MODULE=OTHER`` as a pair."""
    own, _, other = text.partition("=")
    if not own or not other:
        raise argparse.ArgumentTypeError(f"{text!r} is not MODULE=OTHER, two module paths")
    return own, other


def _once(starts: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Raises InputError for a module that is given twice, or inside of another."""
    found: dict[str, str] = {}
    for own, other in starts:
        for known in found:
            if f"{own}.".startswith(f"{known}.") or f"{known}.".startswith(f"{own}."):
                raise InputError(
                    f"--start says twice what {own} starts from, with {known}: leave one of them out"
                )
        found[own] = other
    return found
