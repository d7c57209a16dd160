"""A model exported in a process of its own: torch, and what it keeps of a checkpoint, are gone with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.bundle import open_bundle
from trimtab.child import Child, NoAnswer, serve
from trimtab.errors import ExportError
from trimtab.program import Program
from trimtab.storage import GRAPHS, read_program
from trimtab.weights import WeightStore


def export_apart(model: Path, options: Mapping[str, Any], folder: Path) -> Program:
    """The whole model as a Program whose weights are mapped from files; torch is not imported here.

    Args:
        model: A diffusers folder, or a TOML file that names .onnx files.
        options: Fields of `trimtab.recipe.Recipe` that decide the export: steps, scheduler, size, eta, tasks.
        folder: Becomes that of a draft.

    Raises:
        TrimtabError: Whatever the export raises.
    """
    job = {"model": str(model.resolve()), "options": dict(options), "folder": str(folder)}
    with Child(__name__) as child:
        try:
            child.ask(job)
        except NoAnswer as error:
            what = f"the process that exports {model}"
            raise ExportError(error.line(what, "make room, or choose a smaller size")) from error
    return read_program(open_bundle(folder))


def main() -> None:
    """The process that exports."""
    serve(_export)


def _export(job: dict[str, Any]) -> None:
    from trimtab.calibration.draft import draft
    from trimtab.compiler import export_model
    from trimtab.recipe import make_recipe

    folder = Path(job["folder"])
    (folder / GRAPHS).mkdir(exist_ok=True)
    store = WeightStore(folder / GRAPHS)
    program = export_model(Path(job["model"]), make_recipe(job["options"]), store.keep, folder)
    draft(program, folder).close()
