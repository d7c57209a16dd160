"""A model exported in a process of its own: torch, and what it keeps of a checkpoint, are gone with it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab import errors
from trimtab.bundle import open_bundle
from trimtab.program import Program
from trimtab.storage import GRAPHS, read_program
from trimtab.weights import WeightStore

_CODE = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from trimtab.apart import main
main()
"""
# multiprocessing would import the caller's script anew. Ctrl-C reaches both processes: the parent kills this one, and
# says so in one line.


def export_apart(model: Path, options: Mapping[str, Any], folder: Path) -> Program:
    """The whole model as a Program whose weights are mapped from files; torch is not imported here.

    Args:
        model: A diffusers folder, or a TOML file that names .onnx files.
        options: Fields of `trimtab.recipe.Recipe` that decide the export: steps, scheduler, size, eta.
        folder: Becomes that of a draft.

    Raises:
        TrimtabError: Whatever the export raises.
    """
    job = {"model": str(model.resolve()), "options": dict(options), "folder": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", _CODE, json.dumps(sys.path)],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    answer = json.loads((done.stdout.splitlines() or ["{}"])[-1]) if not done.returncode else {}
    if "failed" in answer:
        kind = getattr(errors, answer["kind"])
        raise (errors.TrimtabError if kind is errors.MissingDependency else kind)(answer["failed"])
    if done.returncode:
        raise errors.ExportError(f"the process that exports {model} {_ended(done.returncode)}")
    return read_program(open_bundle(folder))


def _ended(code: int) -> str:
    """How a process ended that gave no answer, and what to do; below 0 are signals."""
    if code == -signal.SIGKILL:
        return "was killed, as the system does when memory runs out: make room, or choose a smaller size"
    how = f"failed with exit code {code}" if code > 0 else f"was ended by signal {-code}"
    return f"{how}: see what it said above, and run it with --debug"


def main() -> None:
    """Reads a job from stdin, and answers with one line on stdout."""
    from trimtab.calibration.draft import draft
    from trimtab.compiler import export_model
    from trimtab.recipe import make_recipe

    job = json.loads(sys.stdin.read())
    folder = Path(job["folder"])
    answer: dict[str, str] = {}
    try:
        (folder / GRAPHS).mkdir(exist_ok=True)
        store = WeightStore(folder / GRAPHS)
        draft(export_model(Path(job["model"]), make_recipe(job["options"]), store.keep), folder).close()
    except errors.TrimtabError as error:
        answer = {"failed": str(error), "kind": type(error).__name__}
    print(json.dumps(answer))
