"""The pipeline families: which graphs each has, and how text becomes its conditioning.

Each function fills a `PipelineParts` with everything but sampler and tasks, and adds the denoiser last.
Components are loaded, traced and let go one after another.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trimtab.errors import ExportError
from trimtab.export import encoders, modules, texts
from trimtab.export.denoisers import (
    SIZE_CONDITIONS,
    caption_width,
    check_conditions,
    denoiser_module,
    denoiser_name,
)
from trimtab.export.parts import (
    ROWS,
    TOKENS,
    PipelineParts,
    halving_example,
    hidden_example,
    odd_latent,
    patched_example,
    pooled_example,
    sample_example,
    timestep_example,
)
from trimtab.export.source import Source
from trimtab.export.trace import Example
from trimtab.program import TensorSpec

T5_LENGTH_SD3 = 256
T5_LENGTH_FLUX = 512
T5_LENGTH_PIXART_ALPHA = 120
T5_LENGTH_PIXART_SIGMA = 300
GEMMA_LENGTH_SANA = 300


def _unet_sample(parts: PipelineParts) -> Example:
    if parts.multiple > parts.factor:
        return halving_example(parts)
    levels = parts.source.config(denoiser_name(parts.source)).get("block_out_channels") or ()
    return sample_example(parts.channels, odd_latent(len(levels) - 1))


def _known_examples(parts: PipelineParts) -> dict[str, Example]:
    """What a denoiser with inpainting channels reads beside the sample."""
    sample = _unet_sample(parts)
    sizes = ("latent_height", "latent_width")
    mask = torch.rand(1, 1, *sample.tensor.shape[2:])
    return {
        "mask": Example(mask, (None, None, *sizes), sample.multiples),
        "masked_latents": Example(torch.randn_like(sample.tensor), ("batch", None, *sizes), sample.multiples),
    }


def _read_guidance(parts: PipelineParts, inputs: dict[str, Example]) -> None:
    """The denoiser of an LCM, Flux or Sana-Sprint reads the guidance scale itself: there is no second, negative row."""
    inputs["guidance"] = Example(torch.tensor(7.5))
    parts.inputs.append(TensorSpec("guidance", "float32", (), {"kind": "guidance"}))
    parts.conditioning["guidance"] = "guidance"
    parts.classifier_free = False


def stable_diffusion(parts: PipelineParts) -> None:
    """Stable Diffusion 1.x and 2.x, and LCM: one CLIP, a U-Net, a VAE."""
    source = parts.source
    texts.clip(parts, "", "last", None, masks=True)
    wrapper = denoiser_module(source)
    inputs = {
        "sample": _unet_sample(parts),
        "timestep": timestep_example(),
        "encoder_hidden_states": hidden_example(parts.output_width("text_encoder", "hidden")),
    }
    parts.conditioning = {"encoder_hidden_states": "hidden"}
    strength = {"image-to-image": 0.8, "inpainting": 1.0}
    parts.own_posteriors = True
    if isinstance(wrapper, modules.GuidedUNet):
        _read_guidance(parts, inputs)
        strength = {}  # an LCM's time steps depend on the strength, not only on where a schedule starts
        if source.pipeline_class == "LatentConsistencyModelPipeline":
            parts.guidance = 8.5
    elif isinstance(wrapper, modules.InpaintingUNet):
        inputs |= _known_examples(parts)
        parts.inpainting_channels = True
    parts.start_from_pictures(strength)
    parts.denoiser(wrapper, inputs)
    del wrapper
    parts.vae()


def stable_diffusion_xl(parts: PipelineParts) -> None:
    """SDXL: two CLIPs side by side, added time ids."""
    source = parts.source
    if not source.has("text_encoder"):
        raise ExportError(
            "this SDXL pipeline has one text encoder (a refiner), and trimtab takes the base model: give that"
        )
    check_conditions(source)
    # The pooled text is that of the first encoder which projects it.
    first = source.class_name("text_encoder") == source.class_name("text_encoder_2")
    texts.clip(parts, "", "penultimate", "projected" if first else None)
    texts.clip(parts, "_2", "penultimate", None if first else "projected")
    zeros = bool(source.index.get("force_zeros_for_empty_prompt", True))
    parts.inputs.append(TensorSpec("given", "float32", ("rows*batch", 1), {"kind": "given", "zeros": zeros}))
    wrapper = denoiser_module(source)
    config = wrapper.model.config
    pooled = int(config.projection_class_embeddings_input_dim) - SIZE_CONDITIONS * int(
        config.addition_time_embed_dim
    )
    parts.add(
        "text_join",
        encoders.JoinXLText(),
        _join_xl_examples(parts, pooled),
        ["encoder_hidden_states", "text_embeds"],
    )
    text = {"hidden": "hidden", "hidden_2": "hidden_2", "pooled_2": "pooled" if first else "pooled_2"}
    parts.conditioning = {"encoder_hidden_states": "encoder_hidden_states", "text_embeds": "text_embeds"}
    parts.call("text_join", {**text, "given": "given"}, parts.conditioning)
    inputs = {
        "sample": _unet_sample(parts),
        "timestep": timestep_example(),
        "encoder_hidden_states": hidden_example(parts.output_width("text_join", "encoder_hidden_states")),
        "text_embeds": pooled_example(pooled),
    }
    parts.guidance = 5.0
    strength = {"image-to-image": 0.3, "inpainting": 0.9999}
    parts.own_posteriors = True
    parts.task_guidance = {"inpainting": 7.5}
    if config.time_cond_proj_dim is not None:
        _read_guidance(parts, inputs)
    elif isinstance(wrapper, modules.XLInpaintingUNet):
        inputs |= _known_examples(parts)
        parts.inpainting_channels = True
    parts.start_from_pictures(strength)
    parts.denoiser(wrapper, inputs)
    del wrapper
    parts.vae()


def stable_diffusion_3(parts: PipelineParts) -> None:
    """Stable Diffusion 3 and 3.5: two CLIPs, T5 or zeros in its place, an MMDiT."""
    source = parts.source
    texts.clip(parts, "", "penultimate", "projected")
    texts.clip(parts, "_2", "penultimate", "projected", length_of="tokenizer")
    with_t5 = source.has("text_encoder_3")
    if with_t5:
        texts.t5(parts, "_3", T5_LENGTH_SD3)
    wrapper = denoiser_module(source)
    width = int(wrapper.model.config.joint_attention_dim)
    names = ["hidden", "hidden_2", *(["hidden_3"] if with_t5 else []), "pooled", "pooled_2"]
    join = encoders.JoinSD3Text() if with_t5 else encoders.JoinSD3TextWithoutT5(T5_LENGTH_SD3, width)
    examples = {}
    for name in names:
        suffix = name.removeprefix("hidden").removeprefix("pooled")
        size = parts.output_width("text_encoder" + suffix, name.removesuffix(suffix))
        examples[name] = hidden_example(size) if name.startswith("hidden") else pooled_example(size)
    if with_t5:
        t5 = examples["hidden_3"].tensor
        examples["hidden_3"] = Example(
            torch.randn(ROWS, TOKENS + 3, t5.shape[2]), ("prompts", "tokens_3", None)
        )
    outputs = {"encoder_hidden_states": "encoder_hidden_states", "pooled_projections": "pooled_projections"}
    parts.add("text_join", join, examples, list(outputs))
    parts.call("text_join", {n: n for n in names}, outputs)
    parts.conditioning = outputs
    parts.guidance = 7.0
    parts.start_from_pictures({"image-to-image": 0.6, "inpainting": 0.6})
    parts.strength_rounds_up = True
    parts.denoiser(
        wrapper,
        {
            "sample": patched_example(parts),
            "timestep": timestep_example(),
            "encoder_hidden_states": hidden_example(width),
            "pooled_projections": pooled_example(wrapper.model.config.pooled_projection_dim),
        },
    )
    del wrapper
    parts.vae()


def flux(parts: PipelineParts) -> None:
    """Flux: CLIP's pooled output, T5, guidance as an embedding."""
    source = parts.source
    texts.clip(parts, "", None, "pooler")
    texts.t5(parts, "_2", T5_LENGTH_FLUX)
    wrapper = denoiser_module(source)
    config = wrapper.model.config
    parts.conditioning = {"encoder_hidden_states": "hidden_2", "pooled_projections": "pooled"}
    inputs = {
        "sample": patched_example(parts),
        "timestep": timestep_example(),
        "encoder_hidden_states": hidden_example(config.joint_attention_dim),
        "pooled_projections": pooled_example(config.pooled_projection_dim),
    }
    parts.classifier_free = False
    parts.guidance = None
    if has_guidance(source):
        _read_guidance(parts, inputs)
        parts.guidance = 3.5
        parts.task_guidance = {"image-to-image": 7.0, "inpainting": 7.0}
    parts.start_from_pictures({"image-to-image": 0.6, "inpainting": 0.6})
    parts.inpaints_from_noise = False
    parts.strength_rounds_up = True
    parts.denoiser(wrapper, inputs)
    del wrapper
    parts.vae()


def pixart(parts: PipelineParts) -> None:
    """PixArt alpha and sigma: T5 with a mask, a class-free DiT."""
    source = parts.source
    sigma = "Sigma" in source.pipeline_class
    length = T5_LENGTH_PIXART_SIGMA if sigma else T5_LENGTH_PIXART_ALPHA
    texts.masked_t5(parts, length)
    wrapper = denoiser_module(source)
    parts.conditioning = {"encoder_hidden_states": "hidden", "encoder_attention_mask": "hidden_mask"}
    parts.guidance = 4.5
    parts.one_step_denoised = not sigma
    parts.denoiser(
        wrapper,
        {
            "sample": patched_example(parts),
            "timestep": timestep_example(),
            "encoder_hidden_states": hidden_example(caption_width(wrapper.model)),
            "encoder_attention_mask": Example(texts.example_mask().float(), ("prompts", "tokens")),
        },
    )
    del wrapper
    parts.vae()


def sana(parts: PipelineParts) -> None:
    """Sana: a language model that is told to enhance the prompt, a transformer of linear attention, few latents.

    Sana-Sprint, of few steps, is told the guidance scale.
    """
    texts.instructed(parts, GEMMA_LENGTH_SANA, _instruction())
    wrapper = denoiser_module(parts.source)
    parts.conditioning = {"encoder_hidden_states": "hidden", "encoder_attention_mask": "hidden_mask"}
    parts.guidance = 4.5
    inputs = {
        "sample": patched_example(parts),
        "timestep": timestep_example(),
        "encoder_hidden_states": hidden_example(wrapper.model.config.caption_channels),
        "encoder_attention_mask": Example(texts.example_mask().float(), ("prompts", "tokens")),
    }
    if isinstance(wrapper, modules.SanaSprintTransformer):
        _read_guidance(parts, inputs)
    parts.denoiser(wrapper, inputs)
    del wrapper
    parts.vae()


def _instruction() -> str:
    """What diffusers' pipelines say before each prompt by default."""
    from diffusers import SanaPipeline

    return "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


def dit(parts: PipelineParts) -> None:
    """DiT: class labels, at the size it was trained for."""
    source = parts.source
    wrapper = denoiser_module(source)
    names = _class_names(source.index.get("id2label"))
    parts.inputs.append(class_labels(int(wrapper.model.config.num_embeds_ada_norm), names))
    parts.conditioning = {"class_labels": "class_labels"}
    parts.step_options = {}
    parts.guidance = 4.0
    side = int(wrapper.model.config.sample_size)
    parts.denoiser(
        wrapper,
        {
            "sample": Example(torch.randn(ROWS, parts.channels, side, side), ("prompts", None, None, None)),
            "timestep": timestep_example(),
            "class_labels": Example(torch.tensor([1, 2]), ("prompts",)),
        },
    )
    del wrapper
    parts.vae()


def class_labels(classes: int, names: Mapping[str, int]) -> TensorSpec:
    """What a DiT of so many classes is asked for.

    The null class is the one behind the last, as the model's own table has it in training. diffusers' pipeline always
    writes 1000: the same for ImageNet's classes, and taken from it for larger tables; a smaller one has none of that.
    """
    source: dict[str, str | int] = {
        "kind": "label",
        "null": min(1000, classes),
        "classes": classes,
        "names": json.dumps(names),
    }
    return TensorSpec("class_labels", "int64", ("rows*batch",), source)


def _class_names(id2label: Any) -> dict[str, int]:
    """Every name of a class -> its number: "tench, Tinca tinca" names one class twice, as in diffusers."""
    if not isinstance(id2label, dict):
        return {}
    return {
        name.strip(): int(number)
        for number, names in id2label.items()
        for name in str(names).split(",")
        if str(number).isdecimal() and name.strip()
    }


def unconditional(parts: PipelineParts) -> None:
    """DDPM and DDIM pipelines: a U-Net over pixels, no condition."""
    parts.step_options = {}  # DDPM's leaves eta to its scheduler, and TCD's own is not 0
    parts.guidance = None
    parts.classifier_free = False
    sample = halving_example(parts) if parts.multiple > 1 else sample_example(parts.channels, (6, 4))
    parts.denoiser(denoiser_module(parts.source), {"sample": sample, "timestep": timestep_example()})
    latents = Example(sample.tensor, ("batch", *sample.dims[1:]))
    parts.add("pixels", encoders.PixelDecoder(), {"latents": latents}, ["image"])


def _join_xl_examples(parts: PipelineParts, pooled: int) -> dict[str, Example]:
    return {
        "hidden": hidden_example(parts.output_width("text_encoder", "hidden")),
        "hidden_2": hidden_example(parts.output_width("text_encoder_2", "hidden")),
        "pooled_2": pooled_example(pooled),
        "given": Example(torch.ones(ROWS, 1), ("prompts", None)),
    }


def has_guidance(source: Source) -> bool:
    """Whether a pipeline has a guidance scale, of whichever kind, by its configurations.

    Raises:
        InputError: A configuration is missing or cannot be read.
    """
    family = FAMILIES.get(source.pipeline_class)
    if family is flux:
        return bool(source.config(denoiser_name(source)).get("guidance_embeds"))
    return family is not unconditional


FAMILIES: Mapping[str, Callable[[PipelineParts], None]] = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionImg2ImgPipeline": stable_diffusion,
    "StableDiffusionInpaintPipeline": stable_diffusion,
    "LatentConsistencyModelPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusionXLImg2ImgPipeline": stable_diffusion_xl,
    "StableDiffusionXLInpaintPipeline": stable_diffusion_xl,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "StableDiffusion3Img2ImgPipeline": stable_diffusion_3,
    "StableDiffusion3InpaintPipeline": stable_diffusion_3,
    "FluxPipeline": flux,
    "FluxImg2ImgPipeline": flux,
    "FluxInpaintPipeline": flux,
    "PixArtAlphaPipeline": pixart,
    "PixArtSigmaPipeline": pixart,
    "SanaPipeline": sana,
    "SanaSprintPipeline": sana,
    "DiTPipeline": dit,
    "DDPMPipeline": unconditional,
    "DDIMPipeline": unconditional,
}
"""Pipeline class -> family."""
