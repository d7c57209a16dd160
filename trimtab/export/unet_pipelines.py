"""Pipelines whose denoiser is a U-Net: which graphs each has, and how text becomes its conditioning.

Each function fills a `PipelineParts` with everything but sampler and tasks, and adds the denoiser last.
Components are loaded, traced and let go one after another.
"""

from __future__ import annotations

import inspect

import torch

from trimtab.export import encoders, texts, unet_modules
from trimtab.export.denoisers import CONTROLNET, denoiser_module
from trimtab.export.examples import (
    ROWS,
    TOKENS,
    halving_example,
    hidden_example,
    odd_latent,
    pooled_example,
    sample_example,
    timestep_example,
)
from trimtab.export.parts import PipelineParts
from trimtab.export.trace import Example
from trimtab.export.unet_denoisers import check_conditions, conditions
from trimtab.program import TensorSpec

CONTROL_ENCODER = "control_encoder"


def stable_diffusion(parts: PipelineParts) -> None:
    """Stable Diffusion 1.x and 2.x, with a ControlNet or without, and LCM: one CLIP, a U-Net, a VAE."""
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
    if isinstance(wrapper, unet_modules.GuidedUNet):
        parts.read_guidance(inputs)
        strength = {}
        if source.pipeline_class.startswith("LatentConsistencyModel"):
            parts.guidance = 8.5
            strength = {"image-to-image": 0.8}
    elif isinstance(wrapper, unet_modules.ControlledUNet):
        _read_control(parts, inputs)
    elif isinstance(wrapper, unet_modules.EditingUNet):
        _change_picture(parts, inputs, 1.0)
        strength = {}
    elif isinstance(wrapper, unet_modules.InpaintingUNet):
        inputs |= _known_examples(parts)
        parts.inpainting_channels = True
    parts.start_from_pictures(strength)
    parts.denoiser(wrapper, inputs)
    del wrapper
    parts.vae()


def stable_diffusion_xl(parts: PipelineParts) -> None:
    """SDXL: two CLIPs side by side, or of a refiner the second; added time ids."""
    source = parts.source
    check_conditions(source)
    both = source.has("text_encoder")
    # The pooled text is that of the first encoder which projects it.
    first = both and source.class_name("text_encoder") == source.class_name("text_encoder_2")
    if both:
        texts.clip(parts, "", "penultimate", "projected" if first else None)
    texts.clip(parts, "_2", "penultimate", None if first else "projected")
    zeros = bool(source.index.get("force_zeros_for_empty_prompt", True))
    parts.inputs.append(TensorSpec("given", "float32", ("rows*batch", 1), {"kind": "given", "zeros": zeros}))
    wrapper = denoiser_module(source)
    config = wrapper.model.config
    told = conditions(source) * int(config.addition_time_embed_dim)
    pooled = int(config.projection_class_embeddings_input_dim) - told
    joined = {
        "hidden_2": hidden_example(parts.output_width("text_encoder_2", "hidden")),
        "pooled_2": pooled_example(pooled),
        "given": Example(torch.ones(ROWS, 1), ("prompts", None)),
    }
    if both:
        joined["hidden"] = hidden_example(parts.output_width("text_encoder", "hidden"))
    parts.add("text_join", encoders.JoinXLText(), joined, ["encoder_hidden_states", "text_embeds"])
    parts.conditioning = {"encoder_hidden_states": "encoder_hidden_states", "text_embeds": "text_embeds"}
    wires = {name: name for name in joined} | {"pooled_2": "pooled" if first else "pooled_2"}
    parts.call("text_join", wires, parts.conditioning)
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
    if isinstance(wrapper, unet_modules.XLRefiningUNet):
        inputs["positive"] = Example(torch.ones(ROWS, 1), ("prompts", None))
        parts.inputs.append(TensorSpec("positive", "float32", ("rows*batch", 1), {"kind": "positive"}))
        parts.conditioning["positive"] = "positive"
        parts.refines = True
    elif config.time_cond_proj_dim is not None:
        parts.read_guidance(inputs)
    elif isinstance(wrapper, unet_modules.ControlledXLUNet):
        _read_control(parts, inputs)
        strength["image-to-image"], parts.task_guidance = 0.8, {}  # as its own pipelines have it
    elif isinstance(wrapper, unet_modules.XLEditingUNet):
        cosxl = bool(source.index.get("is_cosxl_edit"))
        _change_picture(parts, inputs, float(source.config("vae")["scaling_factor"]) if cosxl else 1.0)
        strength = {}
    elif isinstance(wrapper, unet_modules.XLInpaintingUNet):
        inputs |= _known_examples(parts)
        parts.inpainting_channels = True
    parts.start_from_pictures(strength)
    parts.denoiser(wrapper, inputs)
    del wrapper
    parts.vae()


def dreamlite(parts: PipelineParts) -> None:
    """DreamLite: a language model asked in a template, a U-Net that is told which tokens are words.

    The mobile one is distilled: without guidance.
    """
    template, left_out, kept = _dreamlite_text()
    before, after = template.split("{}")
    texts.templated(parts, kept, (before, after), left_out, instruction="[Generate]: ")
    wrapper = denoiser_module(parts.source)
    parts.conditioning = {"encoder_hidden_states": "hidden", "encoder_attention_mask": "hidden_mask"}
    parts.classifier_free = parts.pipeline == "DreamLitePipeline"
    parts.guidance = 3.5 if parts.classifier_free else None
    parts.guided_below = parts.classifier_free
    width = parts.output_width("text_encoder", "hidden")
    parts.denoiser(
        wrapper,
        {
            "sample": _unet_sample(parts),
            "timestep": timestep_example(),
            "encoder_hidden_states": hidden_example(width),
            "encoder_attention_mask": Example(torch.ones(ROWS, TOKENS), ("prompts", "tokens")),
        },
    )
    del wrapper
    parts.vae()


def _dreamlite_text() -> tuple[str, int, int]:
    """The template of diffusers' pipelines, how many of its tokens they leave out in front, how many they keep."""
    from diffusers import DreamLitePipeline

    said = inspect.signature(DreamLitePipeline).parameters
    pipeline = DreamLitePipeline(**dict.fromkeys(said))  # of no models
    kept = inspect.signature(DreamLitePipeline.__call__).parameters["max_sequence_length"].default
    return (
        pipeline.prompt_template_encode_generate,
        pipeline.prompt_template_encode_generate_start_idx,
        kept,
    )


def unconditional(parts: PipelineParts) -> None:
    """DDPM and DDIM pipelines: a U-Net over pixels, no condition."""
    parts.step_options = {}  # DDPM's leaves eta to its scheduler, and TCD's own is not 0
    parts.guidance = None
    parts.classifier_free = False
    sample = halving_example(parts) if parts.multiple > 1 else sample_example(parts.channels, (6, 4))
    parts.denoiser(denoiser_module(parts.source), {"sample": sample, "timestep": timestep_example()})
    latents = Example(sample.tensor, ("batch", *sample.dims[1:]))
    parts.add("pixels", encoders.PixelDecoder(), {"latents": latents}, ["image"])


def _unet_sample(parts: PipelineParts) -> Example:
    if parts.multiple > parts.factor:
        return halving_example(parts)
    levels = parts.source.config(parts.source.denoiser).get("block_out_channels") or ()
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


def _read_control(parts: PipelineParts, inputs: dict[str, Example]) -> None:
    """Of a denoiser with a ControlNet: the picture that it draws along, which is embedded once."""
    controlnet = parts.source.load(CONTROLNET)
    sample, unit = inputs["sample"], parts.factor
    height, width = (side * unit for side in sample.tensor.shape[2:])
    image = Example(
        torch.rand(1, height, width, 3), (None, "height", "width", None), {"height": unit, "width": unit}
    )
    parts.add(CONTROL_ENCODER, encoders.ControlEncoder(controlnet), {"image": image}, ["control"])
    parts.read_control()
    parts.inputs.append(TensorSpec("control_scale", "float32", (), {"kind": "control_scale"}))
    parts.call(CONTROL_ENCODER, {"image": "control_image"}, {"control": "control"})
    parts.conditioning |= {"control": "control", "control_scale": "control_scale"}
    features = torch.randn(1, controlnet.config.block_out_channels[0], *sample.tensor.shape[2:])
    inputs["control"] = Example(features, (None, None, "latent_height", "latent_width"), sample.multiples)
    inputs["control_scale"] = Example(torch.tensor(1.0))


def _change_picture(parts: PipelineParts, inputs: dict[str, Example], scale: float) -> None:
    """Of a denoiser that changes a picture: its latents, ``scale`` times, and how much it guides."""
    parts.look_at_picture(scale)
    parts.inputs.append(TensorSpec("image_guidance", "float32", (), {"kind": "image_guidance"}))
    parts.conditioning["image_guidance"] = "image_guidance"
    sample = inputs["sample"]
    latents = torch.randn_like(sample.tensor)
    inputs["reference"] = Example(latents, ("batch", *sample.dims[1:]), sample.multiples)
    inputs["image_guidance"] = Example(torch.tensor(1.5))
