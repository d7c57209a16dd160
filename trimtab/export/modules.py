"""The denoisers that are traced: thin wrappers that give every graph one plain interface.

The wrapped model is always the attribute ``model``, so that its module paths and parameter names can be
restored by dropping one prefix (`trimtab.export.trace`). Every denoiser takes ``sample`` (rows, C, h, w)
float32 and a scalar ``timestep`` first, and returns a prediction of the sample's shape: what the sampler is
fused to.
"""

# The wrapped models are untyped, and forwards differ by design.
# mypy: disable-error-code="no-any-return, override"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Denoiser(nn.Module):
    """Base of the wrappers around a U-Net or a transformer."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def _rows(timestep: Tensor, sample: Tensor) -> Tensor:
    """The scalar time step as one value a row: (rows,)."""
    return timestep.reshape(1).expand(sample.shape[0])


def _pixels(sample: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Height and width of the picture in pixels, (rows, 1) float32 each, taken from the latents' shape."""
    ones = torch.ones_like(sample[:, :1, 0, 0])
    height = ones * sample.shape[2] * factor
    width = ones * sample.shape[3] * factor
    return height, width


def _with_known(sample: Tensor, mask: Tensor, masked_latents: Tensor) -> Tensor:
    """What an inpainting U-Net reads: the sample, the mask and the masked picture, stacked along channels.

    One mask (1, 1, h, w) serves the batch; the batch of masked_latents (batch, C, h, w) serves every guidance
    row of the sample (rows * batch, C, h, w).
    """
    known = torch.cat([mask.expand(masked_latents.shape[0], -1, -1, -1), masked_latents], dim=1)
    return torch.cat([sample, known.repeat(sample.shape[0] // known.shape[0], 1, 1, 1)], dim=1)


class ConditionalUNet(Denoiser):
    """UNet2DConditionModel of Stable Diffusion 1.x and 2.x."""

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class InpaintingUNet(Denoiser):
    """A U-Net that reads the mask and the masked picture's latents beside the sample (4 + 1 + 4 channels)."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        mask: Tensor,
        masked_latents: Tensor,
    ) -> Tensor:
        sample = _with_known(sample, mask, masked_latents)
        return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]


def _guidance_frequencies(width: int) -> Tensor:
    """The frequencies of a guidance scale's embedding, (width // 2,).

    They are made before the trace: the scale is multiplied by 1000, so that the last bit of an exponential, which
    ONNX Runtime and torch round differently, is 2e-4 in the embedding of 7.5.
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32) * -(torch.full((), 10000.0).log() / (half - 1))
    return torch.exp(exponent)


def _guidance_embedding(guidance: Tensor, sample: Tensor, frequencies: Tensor, width: int) -> Tensor:
    """A scalar guidance scale as sines and cosines, (rows, width) (Luo et al. 2023, sec. 4.2)."""
    angle = (guidance - 1.0) * 1000.0 * frequencies[None]
    embedding = torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)
    embedding = nn.functional.pad(embedding, (0, width - 2 * len(frequencies)))
    return embedding.expand(sample.shape[0], -1)


class GuidedUNet(Denoiser):
    """An LCM's U-Net, which reads the guidance scale."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.width = self.model.config.time_cond_proj_dim
        self.frequencies = _guidance_frequencies(self.width)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, guidance: Tensor
    ) -> Tensor:
        embedding = _guidance_embedding(guidance, sample, self.frequencies, self.width)
        return self.model(
            sample, timestep, encoder_hidden_states, timestep_cond=embedding, return_dict=False
        )[0]


class XLUNet(Denoiser):
    """SDXL's U-Net; the size conditioning says that the picture is drawn whole, at the size asked for.

    Distilled into an LCM, it reads the guidance scale too.
    """

    def __init__(self, model: nn.Module, factor: int) -> None:
        super().__init__(model)
        self.factor = factor
        self.width = self.model.config.time_cond_proj_dim
        self.frequencies = None if self.width is None else _guidance_frequencies(self.width)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        height, width = _pixels(sample, self.factor)
        crop = torch.zeros_like(height)
        time_ids = torch.cat([height, width, crop, crop, height, width], dim=1)
        embedding = None
        if guidance is not None and self.frequencies is not None:
            embedding = _guidance_embedding(guidance, sample, self.frequencies, self.width)
        return self.model(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=embedding,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )[0]


class XLInpaintingUNet(XLUNet):
    """SDXL's U-Net with 9 input channels."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        mask: Tensor,
        masked_latents: Tensor,
    ) -> Tensor:
        sample = _with_known(sample, mask, masked_latents)
        return super().forward(sample, timestep, encoder_hidden_states, text_embeds)


class PixelUNet(Denoiser):
    """An unconditional UNet2DModel."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        if self.model.config.time_embedding_type == "learned":  # a row of a table
            timestep = timestep.to(torch.int64)
        return self.model(sample, timestep, return_dict=False)[0]


class ClassTransformer(Denoiser):
    """DiT: class labels in; a learned variance, where there is one, is dropped as its pipeline does."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        prediction = self.model(
            sample, timestep=_rows(timestep, sample), class_labels=class_labels, return_dict=False
        )[0]
        return prediction[:, : sample.shape[1]]


class _Attention:
    """Attention whose mask (rows, 1, queries, keys) serves every head, with a query axis of full size.

    diffusers' own repeats the mask for every head and leaves its query axis at 1, which ONNX Runtime's
    Attention does not broadcast.
    """

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attention.to_q(hidden_states), attention.to_k(source), attention.to_v(source)
        if attention.norm_q is not None:  # across heads
            query, key = attention.norm_q(query), attention.norm_k(key)
        query, key, value = (
            projected.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for projected in (query, key, value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return attention.to_out[0](mixed.transpose(1, 2).flatten(2))


def _text_bias(sample: Tensor, mask: Tensor, patch: int) -> Tensor:
    """What attention to the text adds to its scores, (rows, 1, queries, tokens): -10000 where there is no word.

    PixArt and Sana make the same of a mask (rows, tokens).
    """
    queries = (sample.shape[2] // patch) * (sample.shape[3] // patch)
    return ((1 - mask) * -10000.0)[:, None, None].expand(-1, -1, queries, -1)


CONDITIONED_SIZE = 128
"""The ``sample_size`` of the PixArt models (1024 px) that diffusers' pipeline tells the picture's size and shape."""


class PixArtTransformer(Denoiser):
    """PixArt; with its size conditions (1024 px models) read off the latents' shape."""

    def __init__(self, model: nn.Module, factor: int) -> None:
        super().__init__(model)
        self.factor = factor
        self.model.set_attn_processor(_Attention())

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
    ) -> Tensor:
        conditions: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            height, width = _pixels(sample, self.factor)
            conditions = {"resolution": torch.cat([height, width], dim=1), "aspect_ratio": height / width}
        prediction = self.model(
            sample,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=_text_bias(sample, encoder_attention_mask, self.model.config.patch_size),
            timestep=_rows(timestep, sample),
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
        return prediction[:, : sample.shape[1]]


class SanaTransformer(Denoiser):
    """Sana: linear attention among the picture's tokens, and attention to the text."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        for block in self.model.transformer_blocks:
            block.attn2.set_processor(_Attention())

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
    ) -> Tensor:
        config = self.model.config
        prediction = self.model(
            sample,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=_text_bias(sample, encoder_attention_mask, config.patch_size),
            timestep=_rows(timestep, sample) * config.timestep_scale,
            return_dict=False,
        )[0]
        return prediction[:, : sample.shape[1]]


class SanaSprintTransformer(SanaTransformer):
    """A Sana of few steps. Trained on flow matching, it is run as TrigFlow, in whose angles its time steps are.

    As diffusers' pipeline does around it (Chen et al. 2025, https://arxiv.org/abs/2503.09641, sec. 3.1): a sample of
    cos(t) picture and sin(t) noise is scaled to one of (1 - s) picture and s noise, and the answer back.
    """

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        guidance: Tensor,
    ) -> Tensor:
        time = torch.sin(timestep) / (torch.cos(timestep) + torch.sin(timestep))
        scale = torch.sqrt(time**2 + (1 - time) ** 2)
        sample = sample * scale
        config = self.model.config
        velocity = self.model(
            sample,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=_text_bias(sample, encoder_attention_mask, config.patch_size),
            timestep=_rows(time, sample),
            guidance=(guidance * config.guidance_embeds_scale).reshape(1).expand(sample.shape[0]),
            return_dict=False,
        )[0]
        return ((1 - 2 * time) * sample + (1 - 2 * time + 2 * time**2) * velocity) / scale


class SD3Transformer(Denoiser):
    """Stable Diffusion 3's MMDiT."""

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        return self.model(
            hidden_states=sample,
            timestep=_rows(timestep, sample),
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            return_dict=False,
        )[0]


class FluxTransformer(Denoiser):
    """Flux: 2x2 patches are packed into channels and back here, so that latents stay pictures outside."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        rows, channels, height, width = sample.shape
        packed = sample.reshape(rows, channels, height // 2, 2, width // 2, 2)
        packed = packed.permute(0, 2, 4, 1, 3, 5).reshape(rows, (height // 2) * (width // 2), channels * 4)
        down = torch.arange(height // 2, dtype=sample.dtype)[:, None].expand(-1, width // 2)
        across = torch.arange(width // 2, dtype=sample.dtype)[None].expand(height // 2, -1)
        image_ids = torch.stack([torch.zeros_like(down), down, across], dim=-1).reshape(-1, 3)
        text_ids = torch.zeros(encoder_hidden_states.shape[1], 3, dtype=sample.dtype)
        prediction = self.model(
            hidden_states=packed,
            # The model multiplies by 1000 again.
            timestep=_rows(timestep, sample) / 1000,
            guidance=None if guidance is None else guidance.reshape(1).expand(rows),
            pooled_projections=pooled_projections,
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        prediction = prediction.reshape(rows, height // 2, width // 2, channels, 2, 2)
        return prediction.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels, height, width)
