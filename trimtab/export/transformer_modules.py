"""The transformers that are traced, each behind its graph's interface (`trimtab.export.modules`)."""

# The wrapped models are untyped, and forwards differ by design.
# mypy: disable-error-code="no-any-return, override"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.export.modules import Denoiser, pixels, timestep_rows


class ClassTransformer(Denoiser):
    """DiT: class labels in; a learned variance, where there is one, is dropped as its pipeline does."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        prediction = self.model(
            sample, timestep=timestep_rows(timestep, sample), class_labels=class_labels, return_dict=False
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
            height, width = pixels(sample, self.factor)
            conditions = {"resolution": torch.cat([height, width], dim=1), "aspect_ratio": height / width}
        prediction = self.model(
            sample,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=_text_bias(sample, encoder_attention_mask, self.model.config.patch_size),
            timestep=timestep_rows(timestep, sample),
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
        time = timestep * self.model.config.timestep_scale
        prediction = self._predict(sample, time, encoder_hidden_states, encoder_attention_mask)
        return prediction[:, : sample.shape[1]]

    def _predict(self, sample: Tensor, time: Tensor, text: Tensor, mask: Tensor, **told: Tensor) -> Tensor:
        return self.model(
            sample,
            encoder_hidden_states=text,
            encoder_attention_mask=_text_bias(sample, mask, self.model.config.patch_size),
            timestep=timestep_rows(time, sample),
            **told,
            return_dict=False,
        )[0]


class SanaSprintTransformer(SanaTransformer):
    """A Sana of few steps. Trained on flow matching, it is run as TrigFlow, in whose angles its time steps are.

    As diffusers' pipeline does around it (Chen et al. 2025, https://arxiv.org/abs/2503.09641): a sample of
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
        told = (guidance * self.model.config.guidance_embeds_scale).reshape(1).expand(sample.shape[0])
        velocity = self._predict(sample, time, encoder_hidden_states, encoder_attention_mask, guidance=told)
        return ((1 - 2 * time) * sample + (1 - 2 * time + 2 * time**2) * velocity) / scale


class SD3Transformer(Denoiser):
    """Stable Diffusion 3's MMDiT."""

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        return self.model(
            hidden_states=sample,
            timestep=timestep_rows(timestep, sample),
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
            timestep=timestep_rows(timestep, sample) / 1000,
            guidance=None if guidance is None else guidance.reshape(1).expand(rows),
            pooled_projections=pooled_projections,
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        prediction = prediction.reshape(rows, height // 2, width // 2, channels, 2, 2)
        return prediction.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels, height, width)
