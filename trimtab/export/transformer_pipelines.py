"""Pipelines whose denoiser is a transformer: which graphs each has, and how text becomes its conditioning.

As in `trimtab.export.unet_pipelines`, each function fills a `PipelineParts`, and adds the denoiser last.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch

from trimtab.errors import InputError
from trimtab.export import encoders, texts, transformer_modules
from trimtab.export.denoisers import denoiser_module
from trimtab.export.examples import (
    ROWS,
    TOKENS,
    hidden_example,
    patched_example,
    picture_example,
    pooled_example,
    timestep_example,
)
from trimtab.export.parts import PipelineParts
from trimtab.export.trace import Example
from trimtab.export.transformer_denoisers import Z_IMAGE_LENGTH, caption_width
from trimtab.program import TensorSpec

T5_LENGTH_SD3 = 256
T5_LENGTH_FLUX = 512
T5_LENGTH_CHROMA = 512
T5_LENGTH_PIXART_ALPHA = 120
T5_LENGTH_PIXART_SIGMA = 300
GEMMA_LENGTH_SANA = 300
QWEN_LENGTH_FLUX2 = 512
QWEN_LAYERS_FLUX2 = (9, 18, 27)


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
    """Flux: CLIP's pooled output, T5, guidance as an embedding; some read a picture beside the latents."""
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
    if bool(config.guidance_embeds):
        parts.read_guidance(inputs)
        parts.guidance = 3.5
        parts.task_guidance = {"image-to-image": 7.0, "inpainting": 7.0}
    strength = {"image-to-image": 0.6, "inpainting": 0.6}
    latents = picture_example(parts)
    if source.pipeline_class.startswith("FluxControl"):  # Canny, Depth
        inputs["control"] = latents
        parts.read_control()
        parts.read_latents("control_image", "control")
        parts.masked_first = True
    elif source.pipeline_class == "FluxFillPipeline":
        inputs["masked_latents"] = latents
        mask = torch.rand(1, parts.factor**2, *latents.tensor.shape[2:])
        inputs["mask"] = Example(mask, (None, None, "latent_height", "latent_width"))
        parts.inpainting_channels = parts.mask_pixels = True
        strength = {"inpainting": 1.0}
        if parts.guidance is not None:
            parts.task_guidance = {"inpainting": 30.0}
    elif source.pipeline_class == "FluxKontextPipeline":
        inputs["reference"] = latents
        parts.look_at_picture()
        strength = {}
    parts.start_from_pictures(strength)
    parts.inpaints_from_noise = False
    parts.strength_rounds_up = True
    parts.denoiser(wrapper, inputs)
    del wrapper
    parts.vae()


def chroma(parts: PipelineParts) -> None:
    """Chroma: T5 with a mask, a Flux whose modulations the time step alone makes, guidance by a negative row."""
    texts.masked_t5(parts, T5_LENGTH_CHROMA, lowercase=False, reads_padding=True)
    wrapper = denoiser_module(parts.source)
    parts.conditioning = {"encoder_hidden_states": "hidden", "encoder_attention_mask": "hidden_mask"}
    parts.guidance = 5.0
    parts.task_guidance = {"inpainting": 7.0}
    parts.start_from_pictures({"image-to-image": 0.9, "inpainting": 0.6})
    parts.inpaints_from_noise = False
    parts.strength_rounds_up = True
    parts.denoiser(wrapper, _masked_text(parts, wrapper.model.config.joint_attention_dim))
    del wrapper
    parts.vae()


def flux2(parts: PipelineParts) -> None:
    """Flux.2 klein: three layers of a language model, its padding among the text, guidance unless it is distilled.

    One graph looks at a picture, another does not: a program is for editing, where that is asked for, or for texts.
    """
    editing = "editing" in parts.tasks
    if editing and len(parts.tasks) > 1:
        raise InputError("a bundle of Flux.2 is for editing or for texts: compile one for each")
    texts.chat(parts, QWEN_LENGTH_FLUX2, QWEN_LAYERS_FLUX2, thinking=False, masks=False)
    wrapper = denoiser_module(parts.source)
    parts.conditioning = {"encoder_hidden_states": "hidden"}
    parts.classifier_free = not parts.source.index.get("is_distilled")
    parts.guidance = 4.0 if parts.classifier_free else None
    inputs = {
        "sample": patched_example(parts),
        "timestep": timestep_example(),
        "encoder_hidden_states": hidden_example(wrapper.model.config.joint_attention_dim),
    }
    if editing:
        parts.look_at_picture()
        inputs["reference"] = picture_example(parts)
    parts.denoiser(wrapper, inputs)
    del wrapper
    parts.vae()


def pixart(parts: PipelineParts) -> None:
    """PixArt alpha and sigma: T5 with a mask, a class-free DiT."""
    source = parts.source
    sigma = "Sigma" in source.pipeline_class
    length = T5_LENGTH_PIXART_SIGMA if sigma else T5_LENGTH_PIXART_ALPHA
    texts.masked_t5(parts, length, lowercase=True, reads_padding=False)
    wrapper = denoiser_module(source)
    parts.conditioning = {"encoder_hidden_states": "hidden", "encoder_attention_mask": "hidden_mask"}
    parts.guidance = 4.5
    parts.one_step_denoised = not sigma
    parts.denoiser(wrapper, _masked_text(parts, caption_width(wrapper.model)))
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
    inputs = _masked_text(parts, wrapper.model.config.caption_channels)
    if isinstance(wrapper, transformer_modules.SanaSprintTransformer):
        parts.read_guidance(inputs)
    parts.denoiser(wrapper, inputs)
    del wrapper
    parts.vae()


def z_image(parts: PipelineParts) -> None:
    """Z-Image: a language model's last layer but one, text and picture in one stream."""
    texts.chat(parts, Z_IMAGE_LENGTH, (-2,), thinking=True, masks=True)
    wrapper = denoiser_module(parts.source)
    parts.conditioning = {"encoder_hidden_states": "hidden", "encoder_attention_mask": "hidden_mask"}
    parts.guidance = 5.0
    parts.unguided = 0
    parts.start_from_pictures({"image-to-image": 0.6, "inpainting": 1.0})
    parts.inpaints_from_noise = False
    parts.strength_rounds_up = True
    group = transformer_modules.ZImageTransformer.GROUP
    parts.denoiser(wrapper, _masked_text(parts, wrapper.model.config.cap_feat_dim, group))
    del wrapper
    parts.vae()


def _masked_text(parts: PipelineParts, width: int, group: int = 1) -> dict[str, Example]:
    """What a denoiser reads that is told which tokens are words; texts have a multiple of ``group`` of them."""
    tokens, multiples = TOKENS * group, {"tokens": group}
    return {
        "sample": patched_example(parts),
        "timestep": timestep_example(),
        "encoder_hidden_states": Example(
            torch.randn(ROWS, tokens, width), ("prompts", "tokens", None), multiples
        ),
        "encoder_attention_mask": Example(torch.ones(ROWS, tokens), ("prompts", "tokens"), multiples),
    }


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
