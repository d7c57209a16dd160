"""From a model to a removal plan: trajectories, scores, choice, and what the choice really costs."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from trimtab.calibration import choice, measures
from trimtab.calibration.choice import Wish
from trimtab.calibration.draft import draft
from trimtab.calibration.forecast import least_seconds
from trimtab.calibration.measures import Measure
from trimtab.calibration.sensitivity import (
    SAMPLES,
    GatedGraph,
    Progress,
    Scores,
    asked_for,
    clock,
    kept_losses,
    mark_of,
)
from trimtab.calibration.trajectories import record_each, stratified
from trimtab.calibration.workers import Workers
from trimtab.errors import InputError, PassError
from trimtab.passes.candidates import Candidates
from trimtab.passes.removal import RemovalPlan
from trimtab.passes.split_attention import SplitAttention
from trimtab.program import DENOISER, Program, Segment
from trimtab.recipe import HANDCRAFTED, METHODS
from trimtab.storage import write_contents
from trimtab.targets.bindings import Shapes, segment_shapes

logger = logging.getLogger(__name__)

_STEPS_PER_TRAJECTORY = 4
"""Four time steps of one trajectory for every one of its samples: neighbours say nearly the same."""

RANDOM_SETS = 16
"""Sets that the rank correlation is of. Each costs as much as one candidate's score."""

_LEAST_SETS = 4
"""Of fewer, ranks say nothing."""


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

    @classmethod
    def of_scores(cls, log: Path) -> Calibration:
        """What the losses that a file holds were measured on, or will be where there is none.

        Raises:
            CalibrationError: The file is of something else.
        """
        return cls(**asked_for(log), log=log)

    @property
    def asked(self) -> dict[str, object]:
        """What makes its samples others than those of the defaults, as JSON has it."""
        asked: dict[str, object] = {}
        if self.samples != SAMPLES:
            asked["samples"] = self.samples
        if self.prompts is not None:
            asked["prompts"] = list(self.prompts)
        return asked

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise InputError(
                f"{self.samples} samples were asked for: two give a standard error, 16 a usable one"
            )


def score_layers(
    program: Program,
    calibration: Calibration,
    folder: Path,
    progress: Progress | None = None,
    names: Iterable[str] | None = None,
) -> tuple[GatedGraph, Scores]:
    """Scores of what can be removed from a program's denoiser; says in the log early how long they will take.

    Args:
        program: Whole: nothing was removed from it or cut yet.
        calibration: What to measure on.
        folder: For a draft; weights of the program that lie in ``folder / "graphs"`` are not copied.
        progress: Told how far it is: steps of the trajectories count as evaluations.
        names: Of the candidates; None for all.
    """
    model = program.segments[DENOISER].model
    candidates = Candidates(model)
    names = tuple(candidates if names is None else names)
    mark, kept = None, 0
    if calibration.log is not None:
        mark = mark_of(candidates)
        kept = kept_losses(calibration.log, mark)
    thrifty, workers = _thrifty(program, folder), calibration.workers
    with draft(thrifty, folder, threads=workers.threads, lean=True) as pipeline:
        walk = stratified(
            pipeline,
            calibration.samples,
            _STEPS_PER_TRAJECTORY,
            prompts=calibration.prompts,
            seed=calibration.seed,
        )
        request, plan, _ = pipeline.prepare(**walk[0][0])
        steps = sum(own[-1] + 1 for _, own in walk)
        jobs = max(0, len(names) * sum(len(own) for _, own in walk) - kept)
        evaluations = steps + jobs / request.rows / workers.processes  # of all rows, one behind the other
        what = f"{steps} steps of the model's own trajectories, then {jobs} evaluations without a layer"
        read = next(call.inputs for call in plan.steps[0].calls if call.segment == DENOISER)
        shapes = {name: array.shape for name, array in read.items()}
        least = least_seconds(thrifty.segments[DENOISER].model, shapes, workers.threads)
        logger.info("%s: at least about %s", what, clock(least * evaluations))
        done, start = 0, time.monotonic()

        def on_step() -> None:
            nonlocal done, start
            done += 1
            # The first one loads the engine.
            if done == 2:
                logger.info("%s: at most about %s", what, clock((time.monotonic() - start) * evaluations))
            start = time.monotonic()
            if progress is not None:
                progress(done, steps + jobs)

        if progress is not None:
            progress(0, steps + jobs)
        samples = record_each(pipeline, walk, on_step=on_step)
    graph = GatedGraph(model, samples, folder, mark, calibration.asked)

    def on_loss(done: int, total: int) -> None:
        if progress is not None:
            progress(steps + done, steps + total)

    scores = graph.score(workers, log=calibration.log, progress=on_loss, names=names)
    return graph, scores


def _thrifty(program: Program, folder: Path) -> Program:
    """The program with a denoiser that holds few of its attention scores at a time."""
    model = program.segments[DENOISER].model.clone()
    SplitAttention(_shapes(program, folder))(model)
    return replace(program, segments={**program.segments, DENOISER: Segment(DENOISER, model)})


def _shapes(program: Program, folder: Path) -> Shapes:
    """What the denoiser is bound to for a picture of the native size."""
    contents = write_contents(program, folder)
    return segment_shapes(contents, contents.size)[DENOISER][0]


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
        method: One of `METHODS`. Only for "output-loss" every candidate is scored.
        calibration: What to measure on.
        folder: For a draft; None for one that goes again.
        progress: Told how far it is.

    Raises:
        InputError: The share cannot be reached, which is found before anything is measured; no such method, or a
            handcrafted one with modules to keep or drop; a share of time on a device whose peaks are not known.
        PassError: Nothing can be removed from the model; a glob matches nothing.
    """
    if method not in METHODS:
        raise InputError(f"there is no method {method}: choose one of {', '.join(METHODS)}")
    if method in HANDCRAFTED and (wish.keep or wish.drop):
        raise InputError(
            f"{method} is a choice of its own, and modules to keep or drop are given: leave them out, or choose by "
            f"{METHODS[0]}"
        )
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
    measure = measure_of(program, wish, folder)
    candidates = Candidates(program.segments[DENOISER].model)
    by_losses = method == METHODS[0]
    # Whether the share can be reached does not depend on the losses.
    losses = dict.fromkeys(candidates, 1.0)
    removed = chosen(candidates, wish, method, losses, calibration.seed, measure)
    names = None if by_losses else removed
    graph, scores = score_layers(program, calibration, folder, progress, names)
    try:
        if by_losses:
            losses = {name: scores.mean(name) for name in candidates}
            removed = chosen(candidates, wish, method, losses, calibration.seed, measure)
        return plan_of(graph, scores, removed, method, wish, measure, calibration)
    finally:
        graph.remove()


def measure_of(program: Program, wish: Wish, folder: Path) -> Measure:
    """What the share of a wish is of.

    Args:
        program: Whole.
        wish: Says which, and the device whose time it is.
        folder: Of a draft.

    Raises:
        InputError: No such measure; time without a device, or on one whose peaks are not known.
    """
    model = program.segments[DENOISER].model
    candidates = Candidates(model)
    if wish.of == "parameters":
        return measures.parameters(candidates)
    if wish.of == "bytes":
        return measures.weight_bytes(candidates)
    if wish.of != "time" or wish.device is None:
        raise InputError(
            f"a share of {wish.of!r} is not known, or its device is not: choose parameters or bytes"
        )
    return measures.step_time(candidates, model, _shapes(program, folder), wish.device, wish.precision)


def chosen(
    candidates: Candidates,
    wish: Wish,
    method: str,
    losses: Mapping[str, float],
    seed: int,
    measure: Measure | None = None,
) -> tuple[str, ...]:
    """The layers that a method removes."""
    choose: dict[str, Callable[[], tuple[str, ...]]] = {
        "output-loss": lambda: choice.by_loss(candidates, wish, losses, measure),
        "magnitude": lambda: choice.by_magnitude(candidates, wish, measure),
        "random": lambda: choice.by_chance(candidates, wish, seed, measure),
    }
    return choose[method]() if method in choose else choice.by_hand(candidates, method)


def plan_of(
    graph: GatedGraph,
    scores: Scores,
    removed: Sequence[str],
    method: str,
    wish: Wish,
    measure: Measure,
    calibration: Calibration,
) -> RemovalPlan:
    """A plan with its predicted and its true loss; where all candidates have scores, with their rank correlation."""
    candidates = graph.candidates
    freed, gone = candidates.freed(removed)[0], measure.freed(removed)
    every = scores.losses.keys() == candidates.keys()
    sets = random_sets(candidates, wish, measure) if every else []
    *others, joint = graph.joint([*sets, removed], calibration.workers, log=calibration.log)
    predicted = [sum(map(scores.mean, names)) for names in sets]
    return RemovalPlan(
        fingerprint=candidates.fingerprint,
        removed=tuple(removed),
        method=method,
        measure=measure.name,
        share=wish.share,
        reached=gone / measure.total,
        parameters=(candidates.parameters, candidates.parameters - freed),
        amount=None if measure.name == "parameters" else (measure.total, measure.total - gone),
        predicted_loss=sum(map(scores.mean, removed)),
        joint_loss=joint,
        rank_correlation=rank_correlation(predicted, others),
        details={
            **measure.details,
            "samples": len(graph.samples),
            "random_sets": len(sets),
            "loss_errors": {name: scores.error(name) for name in removed},
        },
    )


def random_sets(candidates: Candidates, wish: Wish, measure: Measure) -> list[tuple[str, ...]]:
    """Different random choices of the same share: `RANDOM_SETS` of them, or as many as so many seeds give."""
    found: dict[tuple[str, ...], None] = {}
    for seed in range(RANDOM_SETS):
        try:
            found[tuple(sorted(choice.by_chance(candidates, wish, seed, measure)))] = None
        except InputError:  # this order gets stuck: what is left excludes what was taken
            continue
    return list(found)


def rank_correlation(predicted: Sequence[float], true: Sequence[float]) -> float | None:
    """Spearman's; None for too few sets, or where all are alike."""
    from scipy.stats import spearmanr

    if len(predicted) < _LEAST_SETS or len(set(predicted)) == 1 or len(set(true)) == 1:
        return None
    value = float(spearmanr(predicted, true).statistic)
    return None if math.isnan(value) else value
