"""A diffusers pipeline in, a Program out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from trimtab.errors import ExportError, InputError
from trimtab.export.denoisers import CONTROLNET, check_denoiser
from trimtab.export.families import FAMILIES, has_guidance
from trimtab.export.parts import Keep, Parts, PipelineParts, reads_no_pictures
from trimtab.export.sampler import make_scheduler, probe
from trimtab.export.sampler.schedules import Sampling, plan_tasks, probe_tasks, timesteps_options
from trimtab.export.sampler.shift import follow_size
from trimtab.export.sampler.walk import can_add_noise
from trimtab.export.sizes import MENDING, measure
from trimtab.export.source import Source
from trimtab.export.transformer_pipelines import dit
from trimtab.export.unet_pipelines import unconditional
from trimtab.passes.sampler import FuseSampler
from trimtab.program import (
    DENOISER,
    Call,
    PassEntry,
    Program,
    Segment,
    TensorSpec,
    check_guidance,
    check_size,
)

logger = logging.getLogger(__name__)


def export_pipeline(
    source: Source,
    keep: Keep,
    *,
    steps: tuple[int, ...],
    scheduler: str | None = None,
    size: tuple[int, int] | None = None,
    step_options: Mapping[str, Any] | None = None,
    tasks: tuple[str, ...] = (),
) -> Program:
    """Exports every graph of a pipeline and compiles its sampler into the denoiser.

    Args:
        source: The pipeline.
        keep: Called with each segment's graph as soon as it is traced, to move the weights out of memory.
        steps: Numbers of steps, one schedule each.
        scheduler: A name of `trimtab.export.sampler.schedulers.SCHEDULERS`; None for the pipeline's own.
        size: (width, height) in pixels that becomes the program's native one; None for the model's.
        step_options: For the scheduler's ``step``: ``eta``.
        tasks: What the program is to do; none for all that it can.

    Raises:
        InputError: The pipeline is damaged, or an option does not fit it.
        ExportError: The pipeline's class is not supported, or a part of it cannot be exported.
    """
    family = FAMILIES.get(source.pipeline_class)
    if family is None:
        raise ExportError(
            f"{source.pipeline_class} is not supported: give one of {', '.join(sorted(FAMILIES))}, "
            "or export it yourself and name the .onnx files in a .toml file"
        )
    source.check_weights()
    check_denoiser(source)
    own = _own_scheduler(source)
    chosen = (
        make_scheduler(scheduler, {**own.config, "_class_name": type(own).__name__}) if scheduler else own
    )

    if family in (unconditional, dit):
        _warn_of_scaling(source.pipeline_class, chosen, min(steps))
    parts = PipelineParts(source, keep)
    parts.tasks = tasks
    measure(parts)
    parts.no_pictures = _no_pictures(source, chosen)
    if _is_lcm(source):
        parts.strength_steps = chosen.config.get("original_inference_steps")
    parts.posterior = source.has("vae") and source.class_name("vae") == "AutoencoderKL"
    _choose_size(parts, size)
    for count in steps:  # a scheduler that no table holds is said before the first model is exported
        probe(
            chosen,
            count,
            timesteps_options=timesteps_options(chosen, count, parts),
            step_options=dict(step_options or {}),
        )
    family(parts)
    sampling = Sampling(chosen, steps, parts.step_options | dict(step_options or {}))
    return finish(parts, sampling)


def check_options(source: Source, *, guidance: float | None, hidiffusion: bool = False) -> None:
    """Refuses what a pipeline's configurations say does not fit it, and the exported program would only say later.

    Args:
        source: The pipeline.
        guidance: The scale that is to be the program's own.
        hidiffusion: Whether larger pictures are wanted, which `trimtab.passes.hidiffusion` makes of U-Nets.

    Raises:
        InputError: A configuration is missing or cannot be read, or an option does not fit.
    """
    check_guidance(guidance, has_guidance(source))
    denoiser = source.class_name(source.denoiser)
    if hidiffusion and source.has(CONTROLNET):
        raise InputError(
            "HiDiffusion changes the sizes inside a U-Net, to which a ControlNet adds its own: leave out one of them"
        )
    if hidiffusion and denoiser != "UNet2DConditionModel":
        raise InputError(
            f"HiDiffusion rewrites a UNet2DConditionModel, and this pipeline's denoiser is {denoiser}: leave it out"
        )


def finish(parts: Parts, sampling: Sampling, size: tuple[int, int] | None = None) -> Program:
    """Compiles the sampler into the denoiser and draws up the tasks.

    Args:
        parts: Whole; their segment "denoiser" has an input ``sample`` and an output ``prediction``, and the
            picture is made by "vae_decoder" or, in pixel space, by "pixels".
        sampling: The user's choice.
        size: (width, height) in pixels that becomes the program's native one; None for the model's.

    Raises:
        InputError: A size or an option that does not fit.
        ExportError: The scheduler has no table, or the denoiser's graph cannot take it in.
    """
    _choose_size(parts, size)
    tables = probe_tasks(parts, sampling)
    planned, sampler = plan_tasks(parts, tables)
    tasks = follow_size(parts, sampling, planned)
    result = FuseSampler(slots=sampler.slots, clip_range=sampler.clip_range, noise=sampler.noise)(
        parts.segments[DENOISER]
    )
    if result.refused:
        raise ExportError(f"the sampler cannot be compiled into the denoiser: {result.refused[0].reason}")
    decoder = "vae_decoder" if "vae_decoder" in parts.segments else "pixels"
    return Program(
        segments={name: Segment(name, model) for name, model in parts.segments.items()},
        tasks=tasks,
        epilogue=(Call(decoder, {"latents": "latents"}, {"image": "picture"}),),
        outputs=(TensorSpec("picture", "float32", ("batch", "height", "width", parts.colors)),),
        size=parts.size,
        trained_size=parts.trained_size,
        size_multiple=parts.multiple,
        fixed_size=parts.fixed_size,
        largest_side=parts.largest_side,
        slots=sampler.slots,
        tokenizers=parts.tokenizers,
        metadata={
            "pipeline": parts.pipeline,
            "scheduler": type(sampling.scheduler).__name__,
        },
        passes=(PassEntry("FuseSampler", DENOISER, len(result.applied), len(result.refused)),),
    )


def _own_scheduler(source: Source) -> Any:
    """The pipeline's scheduler, as the pipeline takes it.

    DDIM's makes every scheduler one of DDIM; Stable Diffusion's own three mend its configuration.
    """
    scheduler = source.load("scheduler")
    if source.pipeline_class == "DDIMPipeline":
        return make_scheduler("ddim", {**scheduler.config, "_class_name": type(scheduler).__name__})
    mended = {}
    if source.pipeline_class in MENDING:
        if scheduler.config.get("steps_offset", 1) != 1:
            mended["steps_offset"] = 1
        if source.pipeline_class == "StableDiffusionInpaintPipeline":
            if scheduler.config.get("skip_prk_steps", True) is False:
                mended["skip_prk_steps"] = True
        elif scheduler.config.get("clip_sample", False):
            mended["clip_sample"] = False
    return type(scheduler).from_config(scheduler.config, **mended) if mended else scheduler


def _warn_of_scaling(pipeline: str, scheduler: Any, steps: int) -> None:
    """Says where a scheduler's scaling of noise and samples makes other pictures than a pipeline that leaves it out.

    diffusers' pipelines without conditions hand the model every sample as it is, and DiT's starts from noise as it is:
    with such a scheduler they draw noise, or nearly nothing.
    """
    if probe(scheduler, steps).scales_input:
        logger.warning(
            "%s scales noise and samples, and diffusers' %s leaves some of that out: its pictures are others",
            type(scheduler).__name__,
            pipeline,
        )


def _no_pictures(source: Source, scheduler: Any) -> str | None:
    """Why a pipeline cannot start from a picture, though its family can."""
    if _is_lcm(source) and (name := type(scheduler).__name__) != "LCMScheduler":
        return f"an LCM's pipeline tells its scheduler the strength, and {name} takes none"
    if not can_add_noise(scheduler):
        return f"{type(scheduler).__name__} adds no noise to a picture"
    return reads_no_pictures(source) if source.has("vae") else None


def _is_lcm(source: Source) -> bool:
    return source.pipeline_class.startswith("LatentConsistencyModel")


def _choose_size(parts: Parts, size: tuple[int, int] | None) -> None:
    if size is None:
        return
    check_size(size, parts.size, parts.multiple, parts.fixed_size, parts.largest_side)
    if size != parts.size:
        parts.trained_size = parts.trained_size or parts.size
    parts.size = size
