"""From a model to a removal plan: trajectories, scores, choice, and what the choice really costs."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.calibration import choice
from trimtab.calibration.choice import Wish
from trimtab.calibration.draft import draft
from trimtab.calibration.sensitivity import SAMPLES, GatedGraph, Progress, Scores
from trimtab.calibration.trajectories import Sample, own_requests, record
from trimtab.calibration.workers import Workers
from trimtab.errors import InputError, PassError
from trimtab.passes.removal import DENOISER, RemovalPlan
from trimtab.program import Program
from trimtab.runtime.load import Pipeline

logger = logging.getLogger(__name__)

METHODS = ("output-loss", *choice.HANDCRAFTED, "magnitude", "random")

_STEPS_PER_TRAJECTORY = 4
"""Four time steps of one trajectory for every one of its samples: neighbours say nearly the same."""


@dataclass(frozen=True)
class Calibration:
    """What scores are measured on.

    Attributes:
        samples: Evaluations of the denoiser.
        prompts: For text models; None for plain ones.
        seed: Of trajectories and time steps.
        workers: Where they are computed.
        log: A file that keeps the losses, so that a run that was stopped goes on.
    """

    samples: int = SAMPLES
    prompts: tuple[str, ...] | None = None
    seed: int = 0
    workers: Workers = field(default_factory=Workers)
    log: Path | None = None

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise InputError(
                f"{self.samples} samples were asked for: two give a standard error, 16 a usable one"
            )


def sample_denoiser(pipeline: Pipeline, calibration: Calibration) -> list[Sample]:
    """Evaluations along the model's own trajectories: time steps stratified, each trajectory with its own."""
    count = calibration.samples
    requests = own_requests(
        pipeline,
        -(-count // _STEPS_PER_TRAJECTORY),
        prompts=calibration.prompts,
        seed=calibration.seed,
    )
    _, plan, _ = pipeline.prepare(**requests[0])
    generator = np.random.default_rng(calibration.seed)
    # One draw from each of `count` equal parts of the schedule, dealt to the trajectories in turn.
    strata = (np.arange(count) + generator.random(count)) / count
    steps = np.minimum((strata * len(plan.steps)).astype(int), len(plan.steps) - 1)
    samples: list[Sample] = []
    for number, request in enumerate(requests):
        own = sorted(set(steps[number :: len(requests)].tolist()))
        samples += record(pipeline, [request], steps=own)
    return samples


def score_layers(
    program: Program,
    calibration: Calibration,
    folder: Path,
    progress: Progress | None = None,
) -> tuple[GatedGraph, Scores]:
    """Scores of everything that can be removed from a program's denoiser.

    Args:
        program: Whole: nothing was removed from it or cut yet.
        calibration: What to measure on.
        folder: For a draft; weights of the program that lie in ``folder / "graphs"`` are not copied.
        progress: Told how far it is.
    """
    with draft(program, folder, threads=calibration.workers.threads) as pipeline:
        samples = sample_denoiser(pipeline, calibration)
    graph = GatedGraph(program.segments[DENOISER].model, samples, folder)
    return graph, graph.score(calibration.workers, log=calibration.log, progress=progress)


def plan_removal(
    program: Program,
    wish: Wish,
    *,
    method: str = "output-loss",
    calibration: Calibration = Calibration(),
    folder: Path | None = None,
    progress: Progress | None = None,
) -> RemovalPlan:
    """Chooses layers, and measures what removing them costs.

    Args:
        program: Whole.
        wish: How much, and what in any case or in no case. The handcrafted methods have their own shares.
        method: One of `METHODS`.
        calibration: What to measure on.
        folder: For a draft; None for one that goes again.
        progress: Told how far it is.

    Raises:
        InputError: The share cannot be reached; no such method.
        PassError: Nothing can be removed from the model; a glob matches nothing.
    """
    if method not in METHODS:
        raise InputError(f"there is no method {method}: choose one of {', '.join(METHODS)}")
    if DENOISER not in program.segments:
        raise PassError(f"the program has no segment {DENOISER}: choose before anything cuts it")
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="trimtab-") as temporary:
            return plan_removal(
                program,
                wish,
                method=method,
                calibration=calibration,
                folder=Path(temporary),
                progress=progress,
            )
    graph, scores = score_layers(program, calibration, folder, progress)
    try:
        removed = chosen(graph, wish, method, scores, calibration.seed)
        return plan_of(graph, scores, removed, method, wish.share, calibration.workers)
    finally:
        graph.remove()


def chosen(graph: GatedGraph, wish: Wish, method: str, scores: Scores, seed: int) -> tuple[str, ...]:
    """The layers that a method removes."""
    candidates = graph.candidates
    choose: dict[str, Callable[[], tuple[str, ...]]] = {
        "output-loss": lambda: choice.by_loss(candidates, wish, {n: scores.mean(n) for n in candidates}),
        "magnitude": lambda: choice.by_magnitude(candidates, wish),
        "random": lambda: choice.by_chance(candidates, wish, seed),
    }
    return choose[method]() if method in choose else choice.by_hand(candidates, method)


def plan_of(
    graph: GatedGraph,
    scores: Scores,
    removed: Sequence[str],
    method: str,
    share: float | None,
    workers: Workers,
) -> RemovalPlan:
    """A plan with its predicted and its true loss."""
    candidates = graph.candidates
    freed, _ = candidates.freed(removed)
    joint = graph.joint([tuple(removed)], workers)[0]
    details: dict[str, Any] = {"samples": len(graph.samples)}
    details["loss_errors"] = {name: scores.error(name) for name in removed}
    return RemovalPlan(
        fingerprint=candidates.fingerprint,
        removed=tuple(removed),
        method=method,
        share=share,
        reached=freed / candidates.parameters,
        parameters=(candidates.parameters, candidates.parameters - freed),
        predicted_loss=sum(scores.mean(name) for name in removed),
        joint_loss=joint,
        details=details,
    )
