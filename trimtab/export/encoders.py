"""The torch modules around a denoiser that are traced: text encoders, the VAE, masks.

As in `trimtab.export.modules`, the wrapped model is the attribute ``model``.
"""

# The wrapped models are untyped, and forwards differ by design.
# mypy: disable-error-code="no-any-return, override"

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class ClipText(nn.Module):
    """A CLIP text encoder: tokens (rows, length) int64 -> hidden states, and the pooled output where wanted.

    It is told which tokens are padding where the attention mask (rows, length) int64 is given too.

    Args:
        model: CLIPTextModel or CLIPTextModelWithProjection.
        hidden: "last" for the final layer norm's output (SD 1.x, 2.x), "penultimate" for the layer before the
            last (SDXL, SD3), None for none (Flux).
        pooled: None, "pooler" (end-of-text state) or "projected" (through the text projection).
    """

    model: Any

    def __init__(self, model: nn.Module, hidden: str | None, pooled: str | None) -> None:
        super().__init__()
        self.model = model
        self.hidden = hidden
        self.pooled = pooled

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        output = self.model(
            tokens, attention_mask=attention_mask, output_hidden_states=self.hidden == "penultimate"
        )
        results = []
        if self.hidden == "last":
            results.append(output.last_hidden_state)
        elif self.hidden == "penultimate":
            results.append(output.hidden_states[-2])
        if self.pooled == "pooler":
            results.append(output.pooler_output)
        elif self.pooled == "projected":
            results.append(output.text_embeds)
        return tuple(results)


class T5Text(nn.Module):
    """A T5 encoder: tokens (rows, length) int64 -> hidden states (rows, length, width)."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[0]


class MaskedT5Text(T5Text):
    """A T5 encoder that is told which tokens are padding; the mask goes on to the denoiser as float32.

    Args:
        model: T5EncoderModel.
        one_more: The denoiser is told that the first token of padding is a word too (Chroma).
    """

    def __init__(self, model: nn.Module, one_more: bool = False) -> None:
        super().__init__(model)
        self.one_more = one_more

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        mask = attention_mask
        if self.one_more:
            mask = torch.arange(tokens.shape[1]) <= attention_mask.sum(1, keepdim=True)
        return self.model(tokens, attention_mask=attention_mask)[0], mask.to(torch.float32)


class InstructedText(nn.Module):
    """A language model that reads an instruction before the prompt: tokens -> hidden states, and their mask.

    Of rows with the instruction all tokens behind it are kept, and the very first; of others as many, from the first
    (Xie et al. 2024, https://arxiv.org/abs/2410.10629, as in diffusers). Negative prompts come without it and are
    encoded here at the same length: a token of a causal model sees none behind it, so that what is kept is what
    diffusers has.

    Args:
        model: A decoder of transformers, without its head.
        left_out: Tokens of every row that are not kept.
    """

    model: Any

    def __init__(self, model: nn.Module, left_out: int) -> None:
        super().__init__()
        self.model = model
        self.left_out = left_out

    def forward(self, tokens: Tensor, attention_mask: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        # positive (rows, 1): 1 for rows with the instruction, else 0.
        hidden = self.model(tokens, attention_mask=attention_mask, use_cache=False)[0]
        words = attention_mask.to(torch.float32)
        chosen = positive > 0
        return self._keep(hidden, chosen[..., None]), self._keep(words, chosen)

    def _keep(self, values: Tensor, chosen: Tensor) -> Tensor:
        without_instruction = torch.cat([values[:, :1], values[:, self.left_out + 1 :]], dim=1)
        return torch.where(chosen, without_instruction, values[:, : values.shape[1] - self.left_out])


class ChatText(nn.Module):
    """A language model that is asked as in a chat: tokens -> hidden states of some of its layers, and their mask.

    Args:
        model: A decoder of transformers.
        layers: Which hidden states, side by side along the width: 0 is the embedding, -1 behind the last norm.
        masks: Whether the denoiser is told which tokens are words too.
        left_out: Tokens in front that are not kept.
    """

    model: Any

    def __init__(self, model: nn.Module, layers: tuple[int, ...], masks: bool, left_out: int = 0) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.masks = masks
        self.left_out = left_out

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        states: Any = self.model(
            tokens, attention_mask=attention_mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        kept = (torch.cat([states[layer] for layer in self.layers], dim=-1), attention_mask.to(torch.float32))
        return tuple(each[:, self.left_out :] for each in kept[: 1 + self.masks])


class TextPlaces(nn.Module):
    """The rotary embedding of a language model that sees (Qwen3-VL), for texts alone: exact.

    Words have the same place along all of its three axes, and its own forward interleaves them, which it does by writes
    in place that a trace has to take apart.

    Args:
        embedding: The model's own.
    """

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.register_buffer("frequencies", embedding.inv_freq, persistent=False)
        self.scale = embedding.attention_scaling

    def forward(self, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        # places (3, rows, tokens)
        angles = places[0, ..., None] * self.get_buffer("frequencies")
        angles = torch.cat([angles, angles], dim=-1)
        return torch.cos(angles) * self.scale, torch.sin(angles) * self.scale


class JoinXLText(nn.Module):
    """SDXL's two encoders side by side, or the second alone; a negative prompt that is absent may be zeros.

    given: (rows, 1), 0 for rows of an absent negative prompt, else 1.
    """

    def forward(
        self, hidden_2: Tensor, pooled_2: Tensor, given: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        both = hidden_2 if hidden is None else torch.cat([hidden, hidden_2], dim=-1)
        return both * given[..., None], pooled_2 * given


class JoinSD3Text(nn.Module):
    """SD3: both CLIPs side by side, padded to T5's width, T5 behind along the sequence."""

    def forward(
        self, hidden: Tensor, hidden_2: Tensor, hidden_3: Tensor, pooled: Tensor, pooled_2: Tensor
    ) -> tuple[Tensor, Tensor]:
        clip = torch.cat([hidden, hidden_2], dim=-1)
        clip = nn.functional.pad(clip, (0, hidden_3.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, hidden_3], dim=-2), torch.cat([pooled, pooled_2], dim=-1)


class JoinSD3TextWithoutT5(nn.Module):
    """SD3 with its T5 encoder left out: zeros in its place, as the pipeline does."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.length = length
        self.width = width

    def forward(
        self, hidden: Tensor, hidden_2: Tensor, pooled: Tensor, pooled_2: Tensor
    ) -> tuple[Tensor, Tensor]:
        clip = torch.cat([hidden, hidden_2], dim=-1)
        clip = nn.functional.pad(clip, (0, self.width - clip.shape[-1], 0, self.length))
        return clip, torch.cat([pooled, pooled_2], dim=-1)


def to_picture(values: Tensor) -> Tensor:
    """-1..1 (batch, 3, H, W) -> 0..1 (batch, H, W, 3). What is not finite stays so; all else is exact.

    ONNX does not say what Clip makes of NaN, and a Clip that is a maximum and a minimum, as on a GPU, makes a bound
    of it: a decoder that overflows would draw black, and nobody would know. So Clip never decides alone. The
    comparison is false for NaN and for both infinities, in every precision, and its operators are in every opset.
    """
    scaled = values / 2 + 0.5
    return torch.where(scaled.abs() < torch.inf, scaled.clamp(0, 1), scaled).permute(0, 2, 3, 1)


def latent_scale(pipeline: str, vae: Any) -> tuple[float | Tensor, float | Tensor]:
    """(scale, shift) between a pipeline's latents and its autoencoder's: ``latents / scale + shift`` is decoded.

    A configuration may say more than its pipeline reads: ``shift_factor`` is read by SD3's, Flux's, Chroma's, Z-Image's
    and DreamLite's alone, and the mean and deviation of every channel by SDXL's alone (Playground v2.5). SDXL's
    inpainting pipeline forgets them when it encodes, and blends latents of two scales; SD3's forgets the shift when it
    decodes. Here one scale serves all tasks. Flux.2's are what its autoencoder's batch norm has seen.

    Args:
        pipeline: A pipeline's class.
        vae: Its autoencoder.

    Returns:
        Numbers, or float32 (1, C, 1, 1) where every channel has its own.
    """
    config = vae.config
    if pipeline.startswith("Flux2"):
        inverse = torch.rsqrt(vae.bn.running_var + config.batch_norm_eps)
        return inverse.reshape(1, -1, 1, 1), vae.bn.running_mean.reshape(1, -1, 1, 1)
    scale = float(config.scaling_factor)
    if pipeline.startswith(("StableDiffusion3", "Flux", "Chroma", "ZImage", "DreamLite")):
        return scale, float(getattr(config, "shift_factor", None) or 0.0)
    mean, deviation = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if not pipeline.startswith("StableDiffusionXL") or mean is None or deviation is None:
        return scale, 0.0
    return scale / torch.tensor(deviation).reshape(1, -1, 1, 1), torch.tensor(mean).reshape(1, -1, 1, 1)


class VaeDecoder(nn.Module):
    """Latents (batch, C, h, w) -> picture (batch, H, W, 3) float32 in 0..1; scaled as by `latent_scale`.

    Where a latent stands for several of the autoencoder's (Flux.2), they are stacked along its channels.
    """

    model: Any

    def __init__(self, model: nn.Module, scale: float | Tensor = 1.0, shift: float | Tensor = 0.0) -> None:
        super().__init__()
        self.model = model
        self.scale, self.shift = scale, shift

    def forward(self, latents: Tensor) -> Tensor:
        latents = latents / self.scale + self.shift
        if (stacked := latents.shape[1] // self.model.config.latent_channels) > 1:
            latents = nn.functional.pixel_shuffle(latents, math.isqrt(stacked))
        return to_picture(self.model.decode(latents, return_dict=False)[0])


class VaeEncoder(nn.Module):
    """Picture (1, H, W, 3) in 0..1 and noise (batch, C, h, w) -> latents (batch, C, h, w), by `latent_scale`.

    They are draws from its posterior, or its mean where nothing is drawn; AutoencoderTiny has none and gives the
    latents. Where nothing is drawn all are the same, and the noise only says how many.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        scale: float | Tensor = 1.0,
        shift: float | Tensor = 0.0,
        *,
        draws: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.scale, self.shift = scale, shift
        self.draws = draws

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        encoded = self.model.encode((image * 2 - 1).permute(0, 3, 1, 2), return_dict=False)[0]
        if self.draws:
            latents = encoded.mean + encoded.std * noise
        else:
            latents = encoded if isinstance(encoded, Tensor) else encoded.mean
            latents = latents.expand(noise.shape[0], -1, -1, -1)
        if (stacked := noise.shape[1] // latents.shape[1]) > 1:
            latents = nn.functional.pixel_unshuffle(latents, math.isqrt(stacked))
        return (latents - self.shift) * self.scale


class ControlEncoder(nn.Module):
    """A ControlNet's picture (1, H, W, 3) in 0..1 -> what it adds to the sample, (1, C, h, w).

    Args:
        controlnet: A ControlNetModel, of which the embedding of the picture is taken.
    """

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        self.model = controlnet.controlnet_cond_embedding
        self.reversed = controlnet.config.controlnet_conditioning_channel_order == "bgr"

    def forward(self, image: Tensor) -> Tensor:
        channels = image.permute(0, 3, 1, 2)
        return self.model(channels.flip(1) if self.reversed else channels)


class PixelDecoder(nn.Module):
    """What stands in the VAE's place for a model that draws pixels: -1..1 (batch, 3, H, W) -> 0..1."""

    def forward(self, latents: Tensor) -> Tensor:
        return to_picture(latents)


class MaskEncoder(nn.Module):
    """Picture (1, H, W, 3) and mask (1, H, W, 1; 1 = draw anew) -> masked picture, latents' mask (1, M, h, w).

    The mask is made smaller by nearest neighbour (M = 1), as diffusers does; a masked pixel becomes mid grey (0 on
    the VAE's -1..1 scale).

    Args:
        factor: Pixels to a latent, along a side.
        pixels: The mask keeps its pixels (M = factor**2), as Flux Fill's pipeline has it.
    """

    def __init__(self, factor: int, pixels: bool = False) -> None:
        super().__init__()
        self.factor = factor
        self.pixels = pixels

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mask = (mask >= 0.5).to(image.dtype)
        masked = image * (1 - mask) + 0.5 * mask
        if self.pixels:
            return masked, nn.functional.pixel_unshuffle(mask.permute(0, 3, 1, 2), self.factor)
        return masked, mask[:, :: self.factor, :: self.factor].permute(0, 3, 1, 2)


class Blend(nn.Module):
    """Inpainting with a plain U-Net: outside of the mask the picture's own latents, noised to this step.

    state: (slots, batch, C, h, w); slot 0 holds the start noise and slot 1 the picture's latents.
    """

    def forward(self, proposal: Tensor, state: Tensor, known_weights: Tensor, mask: Tensor) -> Tensor:
        known = known_weights[0] * state[0] + known_weights[1] * state[1]
        return (1 - mask) * known + mask * proposal
