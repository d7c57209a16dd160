"""From sampler tables to tasks: which calls every step makes, with which constants."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trimtab.export.parts import START_NOISE, Parts, picture_input
from trimtab.export.sampler import SamplerTable, probe, scheduler_name
from trimtab.program import DENOISER, STATE, Call, Schedule, Step, Task, TensorSpec, first_step

logger = logging.getLogger(__name__)

ALL_STARTS = 50
"""Up to this many steps, image-to-image can start at any of them; above, at those of strengths in twentieths and of the
task's default: the tables of all starts grow with the square of the steps."""

DISCARD = "discard"
"""A noise tensor that nothing reads, drawn because diffusers draws it."""


KNOWN = f"{STATE}[1]"
"""Slot where sampler tables look for a given picture's latents."""


@dataclass(frozen=True)
class Sampling:
    """What a user chose about the sampler.

    Attributes:
        scheduler: A diffusers scheduler.
        steps: Numbers of steps, one schedule each.
        options: For the scheduler's ``step`` (``eta``).
    """

    scheduler: Any
    steps: tuple[int, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Sampler:
    """What the denoiser's graph must be able to do for all schedules of a program.

    Attributes:
        slots: First axis of the state.
        clip_range: r of the clip to [-r, r], or None.
        noise: Whether any step adds noise.
    """

    slots: int
    clip_range: float | None
    noise: bool


def plan_tasks(
    parts: Parts, tables: Mapping[str, Mapping[str, SamplerTable]]
) -> tuple[dict[str, Task], Sampler]:
    """Tasks with their schedules, and the sampler that serves them all.

    Args:
        parts: The exported pipeline.
        tables: Task -> schedule name -> table, from `probe_tasks`.
    """
    every = [table for schedules in tables.values() for table in schedules.values()]
    sampler = Sampler(
        slots=max(table.slots for table in every),
        clip_range=max((t.clip_range for t in every if t.clip_range is not None), default=None),
        noise=any(table.draws_noise for table in every),
    )
    known = _encode(parts, "image", "posterior_noise", KNOWN)
    tasks = {}
    for name, schedules in tables.items():
        inputs, prologue, conditioning = _task_wiring(name, parts)
        blend = name == "inpainting" and not parts.inpainting_channels
        loops = {}
        for schedule, table in schedules.items():
            steps = tuple(_steps(table.pad(sampler.slots), sampler, conditioning, blend))
            # A loop that starts from pure noise and has no use for the picture does not encode it, and so
            # does not draw from its posterior.
            encode = (known,) if blend or "/from-" in schedule else ()
            loops[schedule] = Schedule(steps, encode)
        tasks[name] = Task(
            inputs=tuple(inputs),
            prologue=tuple(prologue),
            schedules=loops,
            guidance=parts.task_guidance.get(name, parts.guidance),
            strength=parts.strength.get(name),
            strength_rounds_up=parts.strength_rounds_up,
            strength_steps=parts.strength_steps if name in parts.strength else None,
        )
    return tasks, sampler


def probe_tasks(parts: Parts, sampling: Sampling) -> dict[str, dict[str, SamplerTable]]:
    """Reads the tables of every task that the pipeline has: task -> schedule name -> table."""
    from_noise = parts.from_noise
    tasks: dict[str, dict[str, SamplerTable]] = {}
    short = scheduler_name(sampling.scheduler)
    for steps in sampling.steps:
        name = f"{short}-{steps}"
        options = timesteps_options(sampling.scheduler, steps, parts)

        def table(
            start: int | None, keep: bool = False, steps: int = steps, options: Any = options
        ) -> SamplerTable:
            first = start or 0
            if start is not None and (whole := parts.strength_steps) is not None:
                # The scheduler leaves them out itself. It rounds the share down to whole steps: half a step more is
                # the same.
                options, first = options | {"strength": (whole - start + 0.5) / whole}, 0
            return probe(
                sampling.scheduler,
                steps,
                start=first,
                from_image=start is not None,
                keep_start=keep,
                timesteps_options=options,
                step_options=sampling.options,
                denoised=parts.one_step_denoised and steps == 1,
            )

        if from_noise is not None and (not parts.tasks or from_noise in parts.tasks):
            tasks.setdefault(from_noise, {})[name] = table(None)
        if "image-to-image" in parts.strength:
            found = {k: table(k) for k in _starts(steps, parts, "image-to-image")}
            tasks.setdefault("image-to-image", {}).update({f"{name}/from-{k}": t for k, t in found.items()})
        if "inpainting" in parts.strength:
            keep = not parts.inpainting_channels
            schedules = tasks.setdefault("inpainting", {})
            if parts.inpaints_from_noise:
                schedules[name] = table(None, keep)
            starts = _starts(steps, parts, "inpainting")
            schedules.update({f"{name}/from-{k}": table(k, keep) for k in starts})
    return tasks


def _starts(steps: int, parts: Parts, task: str) -> Iterable[int]:
    whole, least = (steps, 1) if parts.strength_steps is None else (parts.strength_steps, steps)
    able = range(whole - least + 1)
    if whole <= ALL_STARTS:
        return able
    strengths = (parts.strength[task], *(twentieth / 20 for twentieth in range(1, 21)))
    starts = {first_step(whole, strength, parts.strength_rounds_up) for strength in strengths}
    return sorted(starts.intersection(able))


def timesteps_options(scheduler: Any, steps: int, parts: Parts) -> dict[str, Any]:
    """What the family's pipeline hands to ``set_timesteps`` beside the number of steps."""
    options: dict[str, Any] = {}
    own = parts.pipeline.startswith(("Flux", "ZImage")) and not scheduler.config.get("use_flow_sigmas")
    if own or parts.pipeline.startswith(("Chroma", "DreamLite")):
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    if parts.pipeline == "SanaSprintPipeline":
        # Of two steps the second has a time of its own; of other numbers the pipeline takes none.
        options |= {"max_timesteps": 1.57080, "intermediate_timesteps": 1.3 if steps == 2 else None}
    if scheduler.config.get("use_dynamic_shifting"):
        options["mu"] = time_shift(parts.pipeline, scheduler.config, steps, image_tokens(parts, parts.size))
    return options


def image_tokens(parts: Parts, size: tuple[int, int]) -> int:
    """How many tokens a transformer makes of a picture of (width, height) pixels, or is said to make."""
    width, height = size
    return (width // parts.multiple) * (height // parts.multiple) // patches_of_token(parts.pipeline)


def patches_of_token(pipeline: str) -> int:
    """How many patches count as one token: DreamLite's pipeline takes a quarter of the latents."""
    return 4 if pipeline.startswith("DreamLite") else 1


MANY_TOKENS = 4300
"""Up to so many image tokens Flux.2's shift is on one line, and on another behind."""


def time_shift(pipeline: str, config: Mapping[str, Any], steps: int, tokens: int) -> float:
    """mu of flow matching's time shift: linear in the image tokens (SD3 paper, sec. 5.3.2; Flux).

    Flux.2's are two lines, of which the first depends on the number of steps too.

    Args:
        pipeline: A pipeline's class.
        config: The scheduler's.
        steps: Of the schedule.
        tokens: From `image_tokens`.
    """
    if pipeline.startswith("Flux2"):
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return float(compute_empirical_mu(tokens, steps))
    # What these pipelines take for the larger shift of a scheduler that says none: not Flow matching's own, 1.15.
    most = 1.16 if pipeline.startswith(("StableDiffusion3", "DreamLite")) else 1.15
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", most)
    slope = (high - low) / (many - few)
    return float(tokens * slope + low - slope * few)


def _task_wiring(name: str, parts: Parts) -> tuple[list[TensorSpec], list[Call], dict[str, str]]:
    """A task's inputs in the order of their draws, its prologue, and what the denoiser reads."""
    noise = parts.noise(START_NOISE)
    guided: dict[str, str | int] = {"kind": "mix", "classifier_free": parts.classifier_free}
    if parts.unguided != 1:
        guided["unguided"] = parts.unguided
    if parts.guided_below:
        guided["below"] = True
    mix = TensorSpec("mix", "float32", ("rows",), guided)
    inputs, prologue = [*parts.inputs, mix], list(parts.prologue)
    conditioning = dict(parts.conditioning)
    if name not in ("image-to-image", "inpainting"):
        return [*inputs, noise], prologue, conditioning

    inputs.append(picture_input("image", "image"))
    own = name == "image-to-image" and parts.own_posteriors
    posterior = replace(noise, name="posterior_noise", source={"kind": "posterior_noise", "own": own})
    inputs += [posterior, noise] if parts.posterior else [noise]
    if name == "inpainting":
        inputs.append(TensorSpec("mask", "float32", (1, "height", "width", 1), {"kind": "mask"}))
        prologue.append(
            Call(
                "mask_encoder",
                {"image": "image", "mask": "mask"},
                {"masked_image": "masked_image", "latent_mask": "latent_mask"},
            )
        )
        if parts.posterior:
            # diffusers encodes the masked picture for plain U-Nets too and does not use it: its draw comes all
            # the same.
            source = {**posterior.source, "always": True}
            masked = replace(posterior, name="masked_posterior_noise", source=source)
            inputs.insert(0 if parts.masked_first else len(inputs), masked)
        if parts.inpainting_channels:
            prologue.append(_encode(parts, "masked_image", "masked_posterior_noise", "masked_latents"))
            conditioning |= {"mask": "latent_mask", "masked_latents": "masked_latents"}
    return inputs, prologue, conditioning


def _encode(parts: Parts, picture: str, posterior_noise: str, latents: str) -> Call:
    """The call that encodes a picture; without a posterior, it asks any noise for the batch."""
    noise = posterior_noise if parts.posterior else START_NOISE
    return Call("vae_encoder", {"image": picture, "noise": noise}, {"latents": latents})


def _steps(
    table: SamplerTable, sampler: Sampler, conditioning: Mapping[str, str], blend: bool
) -> Iterable[Step]:
    """The steps of one table."""
    for evaluation in table.evaluations:
        result = "latents" if evaluation.next_slot is None else f"{STATE}[{evaluation.next_slot}]"
        inputs = {"state": STATE, "mix": "mix", "timestep": "timestep", "sample_weights": "sample_weights"}
        inputs |= {"next_weights": "next_weights", **conditioning}
        outputs = {
            "next_sample": "proposal" if blend else result,
            "model_output": _slot(evaluation.output_slot, "model_output"),
        }
        weights = [*evaluation.next_weights, evaluation.output_weight]
        constants = {"timestep": (evaluation.timestep,), "sample_weights": evaluation.sample_weights}
        draws = [DISCARD] * evaluation.draws
        if sampler.clip_range is not None:
            inputs["clip_weights"] = "clip_weights"
            outputs["clipped"] = _slot(evaluation.clipped_slot, "clipped")
            constants["clip_weights"] = evaluation.clip_weights or (0.0,) * (sampler.slots + 1)
            weights.append(evaluation.clipped_weight)
        if sampler.noise:
            inputs["noise"] = "noise"
            weights.append(evaluation.noise_weight)
            if evaluation.noise_draw is not None:
                draws[evaluation.noise_draw] = "noise"
        constants["next_weights"] = tuple(weights)
        calls = [Call(DENOISER, inputs, outputs)]
        if blend:
            assert evaluation.known_weights is not None
            constants["known_weights"] = evaluation.known_weights
            blending = {"proposal": "proposal", "state": STATE, "known_weights": "known_weights"}
            calls.append(Call("blend", {**blending, "mask": "latent_mask"}, {"sample": result}))
        yield Step(tuple(calls), constants, tuple(draws))


def _slot(slot: int | None, scratch: str) -> str:
    return scratch if slot is None else f"{STATE}[{slot}]"
