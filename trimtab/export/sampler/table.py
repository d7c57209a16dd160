"""The sampler as a table of coefficients, and what running it means.

A run keeps one tensor ``state``, float32 (slots, batch, *latent), that starts as zeros with the start noise
in slot 0 and, where a picture is given, its latents in slot 1. Evaluation i of the denoiser is then:

    model_input = sum_k sample_weights[k] * state[k]
    output      = the guided prediction of the model at ``timestep``
    clipped     = clip(sum_k clip_weights[k] * state[k] + clip_weights[slots] * output, -r, r)
    next_sample = sum_k next_weights[k] * state[k] + output_weight * output
                  + clipped_weight * clipped + noise_weight * noise

and the slots named by the evaluation take ``next_sample``, ``output`` and ``clipped``. No evaluation writes a
slot that it reads itself, so an engine may write while the state is still being read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import InputError

Array = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the denoiser, and the sampler's update after it.

    Attributes:
        timestep: What the model is given, as the pipeline hands it over.
        sample_weights: (slots,) over the state: the model's input.
        next_weights: (slots,) over the state: the next sample.
        output_weight: Of this evaluation's guided prediction in the next sample.
        clipped_weight: Of this evaluation's clipped value in the next sample.
        noise_weight: Of the noise drawn in this evaluation.
        clip_weights: (slots + 1,) over the state and then the prediction: what is clipped. None in a table
            that does not clip; all zeros in an evaluation that does not.
        next_slot: Where the next sample goes; None after the last evaluation, whose next sample is the
            result.
        output_slot: Where the prediction goes, or None where nothing reads it later.
        clipped_slot: Where the clipped value goes, or None where nothing reads it later.
        draws: Standard normal tensors that diffusers draws in this evaluation, used or not.
        noise_draw: Which of them enters the next sample, or None.
        known_weights: (of the start noise, of the image's latents): what inpainting puts outside of the mask
            in place of the next sample; None unless the table was probed for it.
    """

    timestep: float
    sample_weights: tuple[float, ...]
    next_weights: tuple[float, ...]
    output_weight: float
    clipped_weight: float = 0.0
    noise_weight: float = 0.0
    clip_weights: tuple[float, ...] | None = None
    next_slot: int | None = None
    output_slot: int | None = None
    clipped_slot: int | None = None
    draws: int = 0
    noise_draw: int | None = None
    known_weights: tuple[float, float] | None = None


@dataclass(frozen=True)
class SamplerTable:
    """A scheduler at one number of steps, as plain numbers.

    Attributes:
        scheduler: The diffusers class it was read from.
        slots: First axis of the state.
        clip_range: r of the clip to [-r, r], or None where nothing is clipped.
        evaluations: In the order in which they run; a scheduler's step can take more than one.
    """

    scheduler: str
    slots: int
    clip_range: float | None
    evaluations: tuple[Evaluation, ...]

    @property
    def draws_noise(self) -> bool:
        """Whether any evaluation adds noise."""
        return any(evaluation.noise_draw is not None for evaluation in self.evaluations)

    @property
    def scales_input(self) -> bool:
        """Whether the model reads anything else than the start noise, and then the samples, as they are."""
        return any(
            [weight for weight in evaluation.sample_weights if weight] != [1.0]
            for evaluation in self.evaluations
        )

    def pad(self, slots: int) -> SamplerTable:
        """The same table over a state with more slots.

        Schedules of one bundle share one state tensor, as large as the largest of them needs. Exact.

        Args:
            slots: At least the table's own.

        Raises:
            InputError: The table needs more slots than that.
        """
        if slots < self.slots:
            raise InputError(
                f"{slots} slots were given and the table of {self.scheduler} needs {self.slots}: "
                "pad to at least that"
            )
        more = (0.0,) * (slots - self.slots)
        return replace(
            self,
            slots=slots,
            evaluations=tuple(
                replace(
                    evaluation,
                    sample_weights=evaluation.sample_weights + more,
                    next_weights=evaluation.next_weights + more,
                    clip_weights=evaluation.clip_weights
                    and (*evaluation.clip_weights[:-1], *more, evaluation.clip_weights[-1]),
                )
                for evaluation in self.evaluations
            ),
        )


def replay(
    table: SamplerTable,
    model: Callable[[Array, float], Array],
    noise: Array,
    draws: Iterable[Array] = (),
    image: Array | None = None,
    mask: Array | None = None,
    dtype: npt.DTypeLike = np.float32,
    on_input: Callable[[int, Array], None] | None = None,
) -> Array:
    """Run a table in numpy: what a bundle's runtime does, without an engine.

    Args:
        table: What to run.
        model: (model_input (batch, *latent), timestep) -> guided prediction of the same shape.
        noise: The start noise, (batch, *latent).
        draws: The noise of the evaluations in the order in which they are drawn, unused ones among them.
        image: The image's latents, (batch, *latent), for tables that start from one or keep one.
        mask: Inpainting: broadcasts against the latents, 1 where the sample is free and 0 where it is known,
            and nothing between.
        dtype: float32 as on a device, or float64.
        on_input: Told the index and the model's input of every evaluation.

    Returns:
        The final latents, (batch, *latent) of ``dtype``.

    Raises:
        InputError: A mask was given for a table without known weights.
    """
    state = np.zeros((table.slots, *noise.shape), dtype)
    state[0] = noise
    if image is not None:
        state[1] = image
    noise, image = state[0].copy(), None if image is None else state[1].copy()
    source = iter(draws)
    sample = state[0]
    for index, evaluation in enumerate(table.evaluations):
        model_input = _weigh(evaluation.sample_weights, state)
        if on_input is not None:
            on_input(index, model_input)
        output = np.asarray(model(model_input, evaluation.timestep), dtype)
        sample = _weigh(evaluation.next_weights, state) + _of(evaluation.output_weight, output)
        clipped = None
        if evaluation.clip_weights is not None and table.clip_range is not None:
            *weights, weight = evaluation.clip_weights
            limit = table.clip_range
            clipped = np.clip(_weigh(weights, state) + _of(weight, output), -limit, limit)
            sample = sample + _of(evaluation.clipped_weight, clipped)
        drawn = [next(source) for _ in range(evaluation.draws)]
        if evaluation.noise_draw is not None:
            sample = sample + _of(evaluation.noise_weight, drawn[evaluation.noise_draw].astype(dtype))
        if mask is not None:
            if evaluation.known_weights is None or image is None:
                raise InputError(
                    "a mask was given for a sampler table without known weights or without an image: "
                    "probe it with keep_start=True and give the image's latents"
                )
            of_noise, of_image = evaluation.known_weights
            known = _of(of_noise, noise) + _of(of_image, image)
            sample = (1 - mask) * known + mask * sample
        for slot, value in (
            (evaluation.next_slot, sample),
            (evaluation.output_slot, output),
            (evaluation.clipped_slot, clipped),
        ):
            if slot is not None:
                state[slot] = value
    return np.asarray(sample, dtype)


def _weigh(weights: Iterable[float], state: Array) -> Array:
    return np.tensordot(np.asarray(tuple(weights), state.dtype), state, axes=1)


def _of(weight: float, tensor: Array) -> Array:
    return np.asarray(weight, tensor.dtype) * tensor
