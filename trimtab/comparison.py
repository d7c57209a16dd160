"""How far two bundles drift apart when they are given the same latents."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.bundle import Bundle
from trimtab.errors import InputError
from trimtab.program import DENOISER, STATE
from trimtab.runtime.load import Pipeline, load
from trimtab.runtime.stand_ins import stand_ins

_SAMPLER = ("state", "sample_weights", "next_weights", "clip_weights")
"""Inputs of the denoiser whose shape depends on the schedules that a bundle holds."""

Array = npt.NDArray[np.floating[Any]]


def compare(reference: Path, other: Path, *, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Runs two bundles side by side.

    Before every step the other bundle is given the reference's state, so that what is measured is what one step
    adds, not what earlier steps have piled up. The picture is each bundle's own, from the same start noise.

    Args:
        reference: A bundle.
        other: A bundle of the same pipeline, compiled in another way.
        seed: Of the start noise.
        options: For `Pipeline.prepare`: prompt, label, schedule.

    Returns:
        ``steps``: the relative error (L2) of the denoiser's guided output at every step; ``modules``: ``name``
        and ``error`` at the first step for the modules that both graphs have, in the graph's order, largest
        error of a module's output (needs the extra "compile", and graphs that have module names; else empty);
        ``picture``: the largest absolute difference of the pictures, 0..1.

    Raises:
        InputError: The bundles do not draw the same kind of picture, or not by the same schedule.
    """
    with load(reference) as ours, load(other) as theirs:
        if ours.tasks[0] != theirs.tasks[0]:
            raise InputError(
                f"{reference} does {ours.tasks[0]} and {other} {theirs.tasks[0]}: compare bundles of one pipeline"
            )
        wanted = {name: value for name, value in options.items() if value is not None} | {"seed": seed}
        for pipe in (ours, theirs):
            contents = pipe.bundle.contents
            wanted = stand_ins(contents.tasks[pipe.tasks[0]], contents.size) | wanted
        whole = [pipe(**wanted).pixels for pipe in (ours, theirs)]
        if whole[0].shape != whole[1].shape:
            raise InputError(
                f"{reference} draws {whole[0].shape[1:]} and {other} {whole[1].shape[1:]}: "
                "compare bundles of one pipeline"
            )
        steps = _steps(ours, theirs, wanted)
        modules = _modules(ours, theirs, wanted)
    return {
        "reference": str(reference),
        "other": str(other),
        "steps": steps,
        "modules": modules,
        "picture": float(np.abs(whole[0] - whole[1]).max()),
    }


def _steps(ours: Pipeline, theirs: Pipeline, options: dict[str, Any]) -> list[float]:
    prepared = [pipe.prepare(**options) for pipe in (ours, theirs)]
    plans = [plan for _, plan, _ in prepared]
    names = [settings["schedule"].partition("/")[0] for _, _, settings in prepared]
    if names[0] != names[1]:
        raise InputError(f"the schedules are {names[0]} and {names[1]}: choose one that both bundles have")
    state, twin_state = (plan.buffers[STATE] for plan in plans)
    draws = [[len(step.draws) for step in plan.steps] for plan in plans]
    if state.shape[1:] != twin_state.shape[1:] or draws[0] != draws[1]:
        raise InputError(
            f"the two draw other latents or other noise on {names[0]}: compare bundles of one pipeline, of one --eta"
        )
    for request, plan, _ in prepared:
        plan.begin(request)
    request, other = prepared[0][0], prepared[1][0]
    slots = min(len(state), len(twin_state))
    errors = []
    for first, second in zip(plans[0].steps, plans[1].steps, strict=True):
        twin_state[:slots] = np.asarray(state)[:slots]
        first.run(request)
        second.begin(other)
        for buffer, twin in zip(first.draws, second.draws, strict=True):
            twin[...] = np.asarray(buffer)
        for call in second.calls:
            call.run()
        value, reference = (np.asarray(step.results["model_output"]) for step in (second, first))
        errors.append(relative_error(value, reference))
    return errors


def _modules(ours: Pipeline, theirs: Pipeline, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Errors by module at the first step: both denoisers' graphs, run with the modules' outputs laid open."""
    if importlib.util.find_spec("onnx_ir") is None:
        return []
    found: list[tuple[dict[str, list[str]], dict[str, Array]]] = []
    cut = False
    shared: dict[str, Array] = {}
    for pipe in (ours, theirs):
        request, plan, _ = pipe.prepare(**options)
        plan.begin(request)
        plan.steps[0].begin(request)
        blocks: dict[str, list[str]] = {}
        values: dict[str, Array] = {}
        for call in plan.steps[0].calls:
            if call.segment.startswith(DENOISER):
                path = pipe.bundle.contents.segments[call.segment].graph
                # What both denoisers read is the reference's; the sampler's weights may differ, and are each
                # one's own; what crosses from one part of a denoiser to the next was just made.
                given = {name: np.asarray(buffer) for name, buffer in call.inputs.items()}
                common = {n: a for n, a in shared.items() if n not in _SAMPLER}
                feeds = {n: values.get(n, common.get(n, a)) for n, a in given.items()}
                if pipe is ours:
                    shared |= {n: a.copy() for n, a in given.items() if n not in values}
                values |= _laid_open(pipe.bundle, path, feeds, blocks)
        if not blocks:
            return []  # a foreign graph without module names
        found.append((blocks, values))
        cut |= sum(call.segment.startswith(DENOISER) for call in plan.steps[0].calls) > 1
    (ours_blocks, first), (theirs_blocks, second) = found
    results = []
    for module, names in ours_blocks.items():
        pair = _same_result(names, theirs_blocks.get(module, []), cut)
        if pair and first[pair[0]].shape == second[pair[1]].shape:
            results.append({"name": module, "error": relative_error(second[pair[1]], first[pair[0]])})
    return results


def _same_result(ours: list[str], theirs: list[str], cut: bool) -> tuple[str, str] | None:
    """Which of the values that a module gives, part by part, mean the same in both denoisers.

    Where a cut goes through a module, a part shows as its result what leaves that part: there only a name tells.
    """
    common = [name for name in ours if name in theirs]
    if common:
        return common[0], common[0]
    return (ours[0], theirs[0]) if theirs and not cut else None


def _laid_open(
    bundle: Bundle, path: str, feeds: dict[str, Array], blocks: dict[str, list[str]]
) -> dict[str, Array]:
    """All of a graph's outputs and its modules' results, by name.

    Args:
        bundle: Whose graph.
        path: The graph, relative to it.
        feeds: Its inputs.
        blocks: Gains the names of the modules' results, by module path; of several parts, part by part.
    """
    import onnx_ir as ir

    from trimtab.passes.scopes import expose_blocks
    from trimtab.runtime.sessions.onnxruntime import import_onnxruntime
    from trimtab.storage import read_graph

    onnxruntime = import_onnxruntime()

    model = read_graph(bundle, path)
    for block, name in expose_blocks(model).items():
        blocks.setdefault(block, []).append(name)
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str((bundle.folder / path).parent)
    )
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def relative_error(value: Array, reference: Array) -> float:
    """||value - reference|| / ||reference||, in float64."""
    reference = reference.astype(np.float64)
    scale = float(np.linalg.norm(reference))
    return float(np.linalg.norm(value - reference)) / (scale or 1.0)
