"""The denoisers that a recipe switches to, read from where the user says they are."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from trimtab.bundle import MANIFEST, open_bundle
from trimtab.errors import InputError, PassError
from trimtab.passes.experts import AddExperts, load_experts
from trimtab.passes.removal import DENOISER, load_plan, remove_layers
from trimtab.passes.student import WEIGHTS, put_back
from trimtab.program import Program, Segment
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


def open_switches(program: Program, switches: Sequence[tuple[str, float]]) -> Switches:
    """Reads other denoisers: of bundles, or made from this program's by removal plans and students.

    Args:
        program: As it was exported; stays as it is.
        switches: (path, share) of a recipe. A denoiser has the name of its file or folder.

    Raises:
        InputError: A path that is neither, or a bundle that cannot be taken apart.
        PassError: A plan for another model.
    """
    names: dict[str, str] = {}
    others: dict[str, Program] = {}
    for path, _ in switches:
        if path in names:
            continue
        stem = re.sub(r"[^\w-]+", "-", Path(path).resolve().stem).strip("-") or "other"
        name, count = stem, 1
        while name in others:
            count += 1
            name = f"{stem}-{count}"
        names[path], others[name] = name, _other(program, Path(path))
    return Switches(others, tuple((names[path], share) for path, share in switches))


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
    if (path / MANIFEST).exists():
        other = read_program(open_bundle(path))
        if DENOISER not in other.segments:
            parts = ", ".join(name for name in other.segments if name.startswith(DENOISER))
            raise InputError(
                f"{path} has its denoiser in parts ({parts or 'none'}), and a whole one is needed to switch to: "
                "compile it without what its steps skip"
            )
        return other
    if not path.exists():
        raise InputError(
            f"{path} is not there: give a bundle, a removal plan or a student's folder to switch to"
        )
    if DENOISER not in program.segments:
        raise PassError(f"the program has no segment {DENOISER} to prune")
    copy = Segment(DENOISER, program.segments[DENOISER].model.clone())
    return carry_out(dataclasses.replace(program, segments={**program.segments, DENOISER: copy}), path)
