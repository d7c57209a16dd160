"""Taking layers out: the pass, and the plan that it carries out.

Exact: the graph that is left computes what the whole one does with the removed branches multiplied by 0.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common

from trimtab.errors import InputError, PassError
from trimtab.manifest import REMOVAL_PLAN
from trimtab.passes.base import Pass, PassResult, Refusal
from trimtab.passes.candidates import Candidates
from trimtab.program import DENOISER, PassEntry, Program, Segment
from trimtab.staging import write_file

PLAN = REMOVAL_PLAN
"""A plan's file in a bundle and in a student's folder."""

_REMOVED = "trimtab.removed"
"""On a model: JSON, the names of what was taken out of it."""

_SCHEMA = 1


@dataclass(frozen=True)
class RemovalPlan:
    """What to remove, and what it is expected to cost.

    Attributes:
        fingerprint: `Candidates.fingerprint` of the graph that it was made for.
        removed: Names of candidates.
        method: How they were chosen: "output-loss", "bk-sdm-small", "magnitude", "random", ...
        measure: What the share is of: "parameters", "bytes" or "time".
        share: What was asked for, of the whole.
        reached: The share that is gone.
        parameters: Before, and after.
        amount: The same of the measure, where it is another: bytes, or ns of a step.
        predicted_loss: Sum of the single losses (mean squared error of the denoiser's output), or None.
        joint_loss: The loss of removing all of them together, measured, or None.
        rank_correlation: Spearman's, of predicted and joint loss over random sets, or None.
        details: Where the numbers come from: samples, seeds, errors.
    """

    fingerprint: str
    removed: tuple[str, ...]
    method: str
    measure: str = "parameters"
    share: float | None = None
    reached: float | None = None
    parameters: tuple[int, int] | None = None
    amount: tuple[int, int] | None = None
    predicted_loss: float | None = None
    joint_loss: float | None = None
    rank_correlation: float | None = None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes the plan as JSON."""
        text = json.dumps({"schema": _SCHEMA, **dataclasses.asdict(self)}, indent=1)
        write_file(path, text.encode())


def load_plan(path: Path) -> RemovalPlan:
    """Reads a plan's file, or `PLAN` in a folder.

    Raises:
        InputError: There is none, or it is not one.
    """
    file = path / PLAN if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data.pop("schema") != _SCHEMA:
            raise ValueError("another schema")
        removed = data["removed"]
        if not isinstance(removed, list) or any(not isinstance(name, str) for name in removed):
            raise TypeError("names are needed")
        data["removed"] = tuple(removed)
        for name in ("parameters", "amount"):
            if data.get(name) is not None:
                before, after = data[name]
                data[name] = (int(before), int(after))
        return RemovalPlan(**data)
    except FileNotFoundError as error:
        raise InputError(f"{file} does not exist: give a removal plan that does") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): give a removal plan") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file} is no removal plan of this version ({error}): make it again") from error


class RemoveLayers(Pass):
    """Bypass some of a graph's `Candidates`, and drop whatever fed only them.

    Args:
        names: Names of candidates. Those that an earlier run removed are refused; so are those inside of another.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(dict.fromkeys(names))

    def call(self, model: ir.Model) -> PassResult:
        """Edits the graph.

        Raises:
            PassError: A name that is none of a candidate, with the nearest ones.
        """
        gone = list(json.loads(model.metadata_props.get(_REMOVED, "[]")))
        refused = [Refusal(name, "it is already gone") for name in self.names if name in gone]
        names = [name for name in self.names if name not in gone]
        if not names:
            return PassResult(model, False, refused=tuple(refused))
        candidates = Candidates(model)
        bypass = candidates.bypass(names)
        for value, stand_in in bypass.items():
            _replace(model.graph, value, stand_in)
        common.RemoveUnusedNodesPass()(model)
        covered = {inner for name in names for inner in candidates[name].inside}
        refused += [Refusal(name, "it lies inside of another one") for name in names if name in covered]
        model.metadata_props[_REMOVED] = json.dumps([*gone, *names, *sorted(covered - set(names))])
        applied = tuple(name for name in names if name not in covered)
        return PassResult(model, True, applied=applied, refused=tuple(refused))


def _replace(graph: ir.Graph, value: ir.Value, stand_in: ir.Value) -> None:
    """Lets every reader of a value read its stand-in; an output of the graph keeps its name."""
    if value.is_graph_output():
        # The stand-in may be read under its own name elsewhere.
        copy = ir.node("Identity", [stand_in])
        graph.append(copy)
        output, name = copy.outputs[0], value.name
        output.shape, output.type = value.shape, value.type
        value.name = f"{name}.removed"
        output.name = name
        graph.outputs[list(graph.outputs).index(value)] = output
    ir.convenience.replace_all_uses_with(value, stand_in)


def check_plan(program: Program, plan: RemovalPlan) -> Candidates:
    """The candidates of a program's denoiser, if a plan was made for it.

    Raises:
        PassError: The plan is of another model, or names something that cannot be removed.
    """
    if DENOISER not in program.segments:
        raise PassError(
            f"layers are removed from one graph called {DENOISER}, and this program has "
            f"{', '.join(program.segments)}: remove before anything cuts it"
        )
    candidates = Candidates(program.segments[DENOISER].model)
    if candidates.fingerprint != plan.fingerprint:
        raise PassError(
            "the plan was made for another model: this one has other parts or sizes; score it and choose again"
        )
    candidates.check(plan.removed)
    return candidates


def remove_layers(program: Program, plan: RemovalPlan) -> Program:
    """The program with a plan carried out on its denoiser.

    Raises:
        PassError: The plan is of another model, or names something that cannot be removed.
    """
    check_plan(program, plan)
    model = program.segments[DENOISER].model
    result = RemoveLayers(plan.removed)(model)
    entry = PassEntry(RemoveLayers.__name__, DENOISER, len(result.applied), len(result.refused))
    segments = {**program.segments, DENOISER: Segment(DENOISER, model)}
    return dataclasses.replace(program, segments=segments, passes=(*program.passes, entry))
