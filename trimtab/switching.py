"""The denoisers that a recipe switches to, read from where the user says they are."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from trimtab.bundle import MANIFEST, open_bundle
from trimtab.errors import InputError, PassError
from trimtab.export.sampler.schedulers import SCHEDULERS
from trimtab.passes.calls import whole_loops
from trimtab.passes.experts import AddExperts, load_experts
from trimtab.passes.removal import load_plan, remove_layers
from trimtab.passes.student import WEIGHTS, check_weights, put_back
from trimtab.passes.switch import another_loop
from trimtab.program import DENOISER, Program, Segment
from trimtab.storage import read_program


@dataclasses.dataclass(frozen=True)
class Switches:
    """What `trimtab.passes.switch.switch` is given.

    Attributes:
        others: Name -> a program with another denoiser.
        ranges: (name, share of the evaluations at which it takes over), in the order given.
    """

    others: dict[str, Program]
    ranges: tuple[tuple[str, float], ...]


def check_switches(
    switches: Sequence[tuple[str, float]], steps: Sequence[int], scheduler: str | None
) -> None:
    """Refuses, before the hours of an export, what its own files say cannot be switched to.

    Args:
        switches: Of a recipe.
        steps: Numbers of steps that the program will have schedules of.
        scheduler: A name of `trimtab.export.sampler.schedulers.SCHEDULERS`; None for the pipeline's own, which is only
            known, and held against the bundle's, once it is exported.

    Raises:
        InputError: A path that is neither a bundle nor a plan, or a bundle without a single whole denoiser.
        PassError: A bundle that was compiled for other steps, or for another scheduler than the one that is given.
    """
    short = next((s for s, name in SCHEDULERS.items() if scheduler in (s, name)), scheduler)
    for given, name in _names(switches).items():
        path = Path(given)
        if not _is_bundle(path):
            check_carried_out(path)
            continue
        contents = open_bundle(path).contents
        _check_whole(path, contents.segments)
        loops = whole_loops(contents.tasks.values())
        for count in steps:
            loop = f"{short or next(iter(loops)).rpartition('-')[0]}-{count}"
            if loop not in loops:
                raise another_loop(name, loop)


def open_switches(program: Program, switches: Sequence[tuple[str, float]]) -> Switches:
    """Reads other denoisers: of bundles, or made from this program's by removal plans and students.

    Args:
        program: As it was exported; stays as it is.
        switches: (path, share) of a recipe. A denoiser has the name of its file or folder.

    Raises:
        InputError: A path that is neither, or a bundle that cannot be taken apart.
        PassError: A plan for another model.
    """
    names = _names(switches)
    others = {name: _other(program, Path(path)) for path, name in names.items()}
    return Switches(others, tuple((names[path], share) for path, share in switches))


def _names(switches: Sequence[tuple[str, float]]) -> dict[str, str]:
    """Path -> what its denoiser is called."""
    names: dict[str, str] = {}
    for path in dict.fromkeys(path for path, _ in switches):
        stem = re.sub(r"[^\w-]+", "-", Path(path).resolve().stem).strip("-") or "other"
        name, count = stem, 1
        while name in names.values():
            count += 1
            name = f"{stem}-{count}"
        names[path] = name
    return names


def check_carried_out(path: Path) -> None:
    """Refuses, before an export, a plan or a student whose files `carry_out` could not read.

    Raises:
        InputError: There is no plan, or the student's experts or weights are damaged.
    """
    load_plan(path)
    load_experts(path)
    check_weights(path)


def carry_out(program: Program, path: Path) -> Program:
    """A program without the layers that a removal plan names, and with a student's experts and weights if it has some.

    Args:
        program: Its denoiser is edited.
        path: A plan's file, or a student's folder.

    Raises:
        InputError: There is no plan, or the student's weights are damaged.
        PassError: Either was made for another model.
    """
    program = remove_layers(program, load_plan(path))
    model = program.segments[DENOISER].model
    if (experts := load_experts(path)) is not None:
        AddExperts(experts)(model)
    if (path / WEIGHTS).exists():
        put_back(model, path)
    return program


def _other(program: Program, path: Path) -> Program:
    if _is_bundle(path):
        other = read_program(open_bundle(path))
        _check_whole(path, other.segments)
        return other
    if DENOISER not in program.segments:
        raise PassError(f"the program has no segment {DENOISER} to prune")
    copy = Segment(DENOISER, program.segments[DENOISER].model.clone())
    return carry_out(dataclasses.replace(program, segments={**program.segments, DENOISER: copy}), path)


def _is_bundle(path: Path) -> bool:
    if not path.exists():
        raise InputError(
            f"{path} is not there: give a bundle, a removal plan or a student's folder to switch to"
        )
    return (path / MANIFEST).exists()


def _check_whole(path: Path, segments: Iterable[str]) -> None:
    """Refuses a bundle whose denoiser is cut, or that has several: which of them would take over?"""
    found = [name for name in segments if name.startswith(DENOISER)]
    if found != [DENOISER]:
        raise InputError(
            f"{path} has {', '.join(found) or 'nothing'} in the place of one whole denoiser, which is needed to switch "
            "to: compile it without --switch and without what its steps skip"
        )
