"""Turning a diffusers scheduler into a table of coefficients.

The common schedulers are linear in their sample, the model's outputs and their noise, and work element by
element. So the scheduler object itself is run once, in float64, on latents that stand for basis elements
(`trimtab.export.sampler.onehot`), and the coefficients are read off. No formula of any scheduler is written down
here, so a new one needs no new code; and every table is checked against the scheduler before it is handed
out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.errors import ExportError, InputError
from trimtab.export.sampler.schedulers import check_supported
from trimtab.export.sampler.slots import BEFORE, Lifetime, assign_slots
from trimtab.export.sampler.table import Array, Evaluation, SamplerTable, replay
from trimtab.export.sampler.walk import Walk, blaming, model_input

if TYPE_CHECKING:
    import torch

    from trimtab.export.sampler.onehot import Basis, Row

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""Largest relative deviation of a table from its scheduler. Schedulers compute in float32 here and there,
which costs about 1e-7 a step; a coefficient that is missing or depends on the data costs far more."""

_ELEMENTS_PER_EVALUATION = 6  # a sample, an output, and up to four draws and clips


def probe(
    scheduler: Any,
    steps: int,
    *,
    start: int = 0,
    from_image: bool = False,
    keep_start: bool = False,
    timesteps_options: Mapping[str, Any] = {},
    step_options: Mapping[str, Any] = {},
    denoised: bool = False,
) -> SamplerTable:
    """Read the table of a scheduler at a number of steps.

    The table does what diffusers' pipelines do with the scheduler: text-to-image by default, image-to-image
    with ``from_image``, inpainting by blending (a model without mask channels) with ``keep_start``.

    Args:
        scheduler: A diffusers scheduler. It is copied and not changed.
        steps: The scheduler's steps.
        start: Steps to leave out: ``t_start`` of the pipelines' ``get_timesteps``. Needs ``from_image``.
        from_image: Begin from the image's latents (slot 1) with noise added for the first timestep.
        keep_start: Keep the start noise (slot 0) and the image's latents (slot 1) to the end, and say what
            inpainting puts outside of the mask after every evaluation. Exact for masks of zeros and ones, as
            diffusers' mask processors make them.
        timesteps_options: For ``set_timesteps``: ``mu``, ``sigmas``, ``timesteps``,
            ``original_inference_steps``.
        step_options: For ``step``: ``eta``, ``s_churn``. ``eta`` is left out where ``step`` does not take it.
        denoised: Take the picture that ``step`` foresees, its second result, in the place of the next sample, where the
            scheduler gives it.

    Returns:
        The table; coefficients are float64 and agree with the scheduler to `TOLERANCE`.

    Raises:
        InputError: Steps or options that the scheduler does not take.
        ExportError: A scheduler that is not linear, or that a table cannot hold for another reason.
    """
    if start and not from_image:
        raise InputError(f"start={start} was given without an image: a later start needs from_image=True")
    owner = type(scheduler).__name__
    _check_config(scheduler)
    walk = Walk(
        scheduler,
        steps,
        start,
        from_image,
        keep_start,
        dict(timesteps_options),
        dict(step_options),
        owner,
        denoised,
    )
    table = _tabulate(*_trace(walk), walk)
    deviation = _deviation(table, walk)
    if not deviation <= TOLERANCE:
        raise ExportError(
            f"{owner} is not reproduced by its table: the deviation is {deviation:.1e}, {TOLERANCE:.0e} is "
            "allowed (its step is not linear, or depends on the shape): use another scheduler"
        )
    logger.debug("%s, %d steps: %d slots, deviation %.1e", owner, steps, table.slots, deviation)
    return table


def _check_config(scheduler: Any) -> None:
    owner = type(scheduler).__name__
    check_supported(owner)
    config = scheduler.config
    if config.get("thresholding"):
        raise ExportError(
            f"{owner} has thresholding=True: dynamic thresholding takes a quantile over the whole latent, "
            "which is not linear; set thresholding=False (clip_sample=True is supported)"
        )
    if str(config.get("variance_type", "")).startswith("learned"):
        raise ExportError(
            f"{owner} has variance_type={config['variance_type']!r}: a variance that the model predicts "
            "scales the noise, which is not linear; use a fixed variance_type or another scheduler"
        )


@dataclass
class _Rows:
    """One evaluation, over the basis."""

    timestep: float
    output: int
    model_input: Row
    clips: list[tuple[int, Row, float]] = field(default_factory=list)  # element, argument, range
    draws: list[int] = field(default_factory=list)
    next_sample: Row = field(default_factory=dict)
    sample: int | None = None  # the element that stands for next_sample from here on
    known: tuple[float, float] | None = None


def _trace(walk: Walk) -> tuple[list[_Rows], Basis]:
    """Run the scheduler on basis elements."""
    from trimtab.export.sampler.onehot import Basis, Interception, reduce_row

    scheduler, timesteps = walk.prepare()
    basis = Basis(2 + _ELEMENTS_PER_EVALUATION * len(timesteps), walk.owner)
    noise = basis.fresh("noise", BEFORE)
    image = basis.fresh("image", BEFORE) if walk.from_image or walk.keep_start else None
    rows: list[_Rows] = []
    relations: list[tuple[int, Row]] = []

    def draw() -> torch.Tensor:
        if not rows:
            raise ExportError(
                f"{walk.owner} draws noise before its first step; noise is needed in steps only"
            )
        rows[-1].draws.append(len(basis.elements))
        return basis.fresh("draw", len(rows) - 1)

    def clip(latent: torch.Tensor, limit: float) -> torch.Tensor:
        argument = reduce_row(basis.row(latent, "what it clips"), relations, basis.elements, len(rows) - 1)
        rows[-1].clips.append((len(basis.elements), argument, limit))
        return basis.fresh("clipped", len(rows) - 1)

    with Interception(basis.shape, draw, clip, walk.owner), blaming(walk.owner):
        sample = walk.first_sample(scheduler, timesteps, noise, image)
        for index, timestep in enumerate(timesteps):
            where = f"evaluation {index} (timestep {float(timestep):g})"
            scaled = basis.row(model_input(scheduler, sample, timestep), f"the model's input of {where}")
            evaluation = _Rows(float(timestep), len(basis.elements), {})
            evaluation.model_input = reduce_row(scaled, relations, basis.elements, index)
            rows.append(evaluation)
            output = basis.fresh("output", index)
            following = basis.row(walk.step(scheduler, output, timestep, sample), f"the sample after {where}")
            evaluation.next_sample = reduce_row(following, relations, basis.elements, index)
            if walk.keep_start:
                assert image is not None
                known = basis.row(walk.known(scheduler, timesteps, index, image, noise), "add_noise")
                evaluation.known = (known.get(0, 0.0), known.get(1, 0.0))
            if index + 1 < len(timesteps):
                evaluation.sample = len(basis.elements)
                # When inpainting, the sample that is kept is blended with the known one. Masks hold zeros and
                # ones: where it is one, nothing changed; where it is zero, what the scheduler computes from
                # here on is thrown away before the model sees it. So the relation holds wherever it matters.
                relations.append((evaluation.sample, following))
                sample = basis.fresh("sample", index)
    return rows, basis


def _tabulate(rows: Sequence[_Rows], basis: Basis, walk: Walk) -> SamplerTable:
    """Give the elements slots and write the rows over them."""
    last = len(rows) - 1
    last_read: dict[int, int] = {}
    for index, evaluation in enumerate(rows):
        _check_rows(evaluation, basis, index, walk.owner)
        for row in (evaluation.model_input, evaluation.next_sample, *(clip[1] for clip in evaluation.clips)):
            last_read.update(dict.fromkeys(row, index))
    fixed = {k: k for k, element in enumerate(basis.elements) if element.evaluation == BEFORE}
    if walk.keep_start:
        last_read.update(dict.fromkeys(fixed, last))
    lifetimes = [
        Lifetime(k, element.evaluation, last_read.get(k, BEFORE))
        for k, element in enumerate(basis.elements)
        if element.kind != "draw"
    ]
    slot_of, slots = assign_slots(lifetimes, fixed)
    ranges = {limit for evaluation in rows for _, _, limit in evaluation.clips}
    if len(ranges) > 1:
        raise ExportError(
            f"{walk.owner} clips to {len(ranges)} different ranges; a sampler table has one: "
            "use another scheduler"
        )
    clip_range = ranges.pop() if ranges else None

    def over_state(row: Row, index: int) -> tuple[float, ...]:
        # This evaluation's own output, clip and draw are not in the state yet: they have weights of their
        # own.
        weights = [0.0] * slots
        for k, value in row.items():
            if k in slot_of and basis.elements[k].evaluation < index:
                weights[slot_of[k]] = value
        return tuple(weights)

    evaluations = []
    for index, evaluation in enumerate(rows):
        following = evaluation.next_sample
        clip = evaluation.clips[0] if evaluation.clips else None
        argument = clip[1] if clip else {}
        used = [number for number, k in enumerate(evaluation.draws) if k in following]
        evaluations.append(
            Evaluation(
                timestep=evaluation.timestep,
                sample_weights=over_state(evaluation.model_input, index),
                next_weights=over_state(following, index),
                output_weight=following.get(evaluation.output, 0.0),
                clipped_weight=following.get(clip[0], 0.0) if clip else 0.0,
                noise_weight=following[evaluation.draws[used[0]]] if used else 0.0,
                clip_weights=None
                if clip_range is None
                else (*over_state(argument, index), argument.get(evaluation.output, 0.0)),
                next_slot=slot_of.get(evaluation.sample) if evaluation.sample is not None else None,
                output_slot=slot_of.get(evaluation.output),
                clipped_slot=slot_of.get(clip[0]) if clip else None,
                draws=len(evaluation.draws),
                noise_draw=used[0] if used else None,
                known_weights=evaluation.known,
            )
        )
    return SamplerTable(walk.owner, slots, clip_range, tuple(evaluations))


def _check_rows(evaluation: _Rows, basis: Basis, index: int, owner: str) -> None:
    """Refuse what an evaluation of a table cannot hold."""
    own_draws = set(evaluation.draws)
    if len(own_draws & evaluation.next_sample.keys()) > 1:
        raise ExportError(
            f"{owner} uses two draws of noise in evaluation {index}; a sampler table has one: use another"
        )
    if len(evaluation.clips) > 1:
        raise ExportError(
            f"{owner} clips twice in evaluation {index}; a sampler table clips once: use another"
        )
    draws = {k for k, element in enumerate(basis.elements) if element.kind == "draw"}
    early = draws & (evaluation.model_input.keys() | {k for clip in evaluation.clips for k in clip[1]})
    if early or (draws & evaluation.next_sample.keys()) - own_draws:
        raise ExportError(
            f"{owner} uses noise in evaluation {index} that is not drawn for its next sample; "
            "a sampler table adds noise only where it is drawn: use another scheduler"
        )


def _deviation(table: SamplerTable, walk: Walk) -> float:
    """The largest relative difference between a table and its scheduler.

    Both run on random outputs and noise in float64, whatever the scheduler casts them to, with latents of another
    shape than the one probed, clipping for real; every input of the model and the final latents are compared.
    """
    import torch

    from trimtab.export.sampler.onehot import Interception

    shape = (2, 3, 5, 4)
    random = np.random.default_rng(0)
    noise, image = random.standard_normal((2, *shape))
    scale = table.clip_range or 1.0  # so that clips act on some elements and not on others
    outputs = [scale * random.standard_normal(shape) for _ in table.evaluations]
    mask = random.integers(0, 2, (2, 1, 5, 4)).astype(np.float64) if walk.keep_start else None
    drawn: list[Array] = []
    inputs: list[Array] = []

    def draw() -> torch.Tensor:
        drawn.append(random.standard_normal(shape))
        return torch.from_numpy(drawn[-1].copy())

    scheduler, timesteps = walk.prepare()
    with Interception(shape, draw, None, walk.owner), blaming(walk.owner):
        start, known_image = torch.from_numpy(noise), torch.from_numpy(image)
        sample = walk.first_sample(scheduler, timesteps, start, known_image)
        for index, timestep in enumerate(timesteps):
            inputs.append(model_input(scheduler, sample, timestep).to(torch.float64).numpy().copy())
            sample = walk.step(scheduler, torch.from_numpy(outputs[index].copy()), timestep, sample)
            if mask is not None:
                known = walk.known(scheduler, timesteps, index, known_image, start)
                sample = (1 - torch.from_numpy(mask)) * known + torch.from_numpy(mask) * sample
    if len(drawn) != sum(evaluation.draws for evaluation in table.evaluations):
        return float("inf")
    deviations = []

    def compare(index: int, found: Array) -> None:
        deviations.append(_relative(found, inputs[index]))

    following: Iterator[Array] = iter(outputs)
    given = image if walk.from_image or walk.keep_start else None
    latents = replay(table, lambda _, __: next(following), noise, drawn, given, mask, np.float64, compare)
    return max([*deviations, _relative(latents, sample.to(torch.float64).numpy())])


def _relative(found: Array, expected: Array) -> float:
    difference = float(np.abs(found - expected).max())
    # NaN on either side must not pass for agreement.
    return difference / max(float(np.abs(expected).max()), 1e-12) if np.isfinite(difference) else float("inf")
