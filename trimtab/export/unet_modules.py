"""The U-Nets that are traced, each behind its graph's interface (`trimtab.export.modules`)."""

# The wrapped models are untyped, and forwards differ by design.
# mypy: disable-error-code="no-any-return, override"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.export.modules import Denoiser, attended, for_rows, pixels


def _with_known(sample: Tensor, mask: Tensor, masked_latents: Tensor) -> Tensor:
    """What an inpainting U-Net reads: the sample, the mask and the masked picture, stacked along channels.

    One mask (1, 1, h, w) serves the batch; the batch of masked_latents (batch, C, h, w) serves every guidance
    row of the sample (rows * batch, C, h, w).
    """
    known = torch.cat([mask.expand(masked_latents.shape[0], -1, -1, -1), masked_latents], dim=1)
    return torch.cat([sample, for_rows(known, sample)], dim=1)


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


def _with_unseen(values: Tensor, batch: int) -> Tensor:
    """The guidance rows of what a U-Net reads, and the first ones, the negative prompt's, once more behind them."""
    return torch.cat([values, values[:batch]])


def _seen(sample: Tensor, reference: Tensor) -> Tensor:
    """A sample with the latents of the picture that is changed along its channels, and `_with_unseen` none.

    sample: (rows * batch, C, h, w); reference: (batch, C, h, w). Returns ((rows + 1) * batch, 2 C, h, w).
    """
    pictures = torch.cat([for_rows(reference, sample), torch.zeros_like(reference)])
    return torch.cat([_with_unseen(sample, reference.shape[0]), pictures], dim=1)


def _guided_by_picture(prediction: Tensor, reference: Tensor, image_guidance: Tensor) -> Tensor:
    """Moves the guidance rows of a prediction away from the last ones, which saw no picture.

    With p, n and u what is predicted for the prompt, the negative prompt, and that without the picture, the sampler's
    n' + s (p' - n') then is u + s (p - n) + t (n - u) (Brooks et al. 2023, https://arxiv.org/abs/2211.09800, eq. 3),
    for the scales s of the text and t of the picture.
    """
    batch = reference.shape[0]
    guided, unseen = prediction[:-batch], prediction[-batch:]
    return guided + for_rows((image_guidance - 1) * (guided[:batch] - unseen), guided)


class EditingUNet(Denoiser):
    """InstructPix2Pix's U-Net, which reads the latents of the picture that it changes beside the sample.

    reference: (batch, C, h, w); image_guidance: a scalar, 1 where the text does not guide either.
    """

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        reference: Tensor,
        image_guidance: Tensor,
    ) -> Tensor:
        text = _with_unseen(encoder_hidden_states, reference.shape[0])
        prediction = self.model(_seen(sample, reference), timestep, text, return_dict=False)[0]
        return _guided_by_picture(prediction, reference, image_guidance)


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


def _time_ids(sample: Tensor, factor: int) -> Tensor:
    """SDXL's size conditioning, (rows, 6): the picture is drawn whole, at the size asked for."""
    height, width = pixels(sample, factor)
    crop = torch.zeros_like(height)
    return torch.cat([height, width, crop, crop, height, width], dim=1)


class XLUNet(Denoiser):
    """SDXL's U-Net.

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
        embedding = None
        if guidance is not None and self.frequencies is not None:
            embedding = _guidance_embedding(guidance, sample, self.frequencies, self.width)
        return self.model(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=embedding,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": _time_ids(sample, self.factor)},
            return_dict=False,
        )[0]


class XLRefiningUNet(Denoiser):
    """The U-Net of SDXL's refiner, which is told a score in the place of the size asked for.

    positive: (rows, 1), 1 for rows of prompts, 0 for negative ones. The scores are those that diffusers tells it.
    """

    SCORE, NEGATIVE_SCORE = 6.0, 2.5

    def __init__(self, model: nn.Module, factor: int) -> None:
        super().__init__(model)
        self.factor = factor

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        positive: Tensor,
    ) -> Tensor:
        score = self.NEGATIVE_SCORE + (self.SCORE - self.NEGATIVE_SCORE) * positive
        told = torch.cat([_time_ids(sample, self.factor)[:, :4], score], dim=1)
        conditions = {"text_embeds": text_embeds, "time_ids": told}
        return self.model(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=conditions, return_dict=False
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


class XLEditingUNet(XLUNet):
    """The same as `EditingUNet` of SDXL."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        reference: Tensor,
        image_guidance: Tensor,
    ) -> Tensor:
        text, pooled = (_with_unseen(x, reference.shape[0]) for x in (encoder_hidden_states, text_embeds))
        prediction = super().forward(_seen(sample, reference), timestep, text, pooled)
        return _guided_by_picture(prediction, reference, image_guidance)


def _without_embedding(controlnet: Any) -> Any:
    """A ControlNet that is given its picture embedded already: that is computed once, and not in every step."""
    controlnet.controlnet_cond_embedding = nn.Identity()
    controlnet.register_to_config(controlnet_conditioning_channel_order="rgb")
    return controlnet


class ControlledUNet(Denoiser):
    """A U-Net of Stable Diffusion 1.x or 2.x, and a ControlNet whose features are added to its skips.

    control: (1, C, h, w), of `trimtab.export.encoders.ControlEncoder`; control_scale: a scalar.
    """

    def __init__(self, model: nn.Module, controlnet: nn.Module) -> None:
        super().__init__(model)
        self.controlnet = _without_embedding(controlnet)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        control: Tensor,
        control_scale: Tensor,
        **conditions: Any,
    ) -> Tensor:
        down, middle = self.controlnet(
            sample, timestep, encoder_hidden_states, control, control_scale, **conditions, return_dict=False
        )
        return self.model(
            sample,
            timestep,
            encoder_hidden_states,
            **conditions,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]


class ControlledXLUNet(ControlledUNet):
    """The same of SDXL; both models are told the picture's size."""

    def __init__(self, model: nn.Module, controlnet: nn.Module, factor: int) -> None:
        super().__init__(model, controlnet)
        self.factor = factor

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        control: Tensor,
        control_scale: Tensor,
    ) -> Tensor:
        told = {"text_embeds": text_embeds, "time_ids": _time_ids(sample, self.factor)}
        return super().forward(
            sample, timestep, encoder_hidden_states, control, control_scale, added_cond_kwargs=told
        )


class _SharedHeads:
    """Attention in which several heads share a key and a value, with a mask (rows, 1, keys) for all queries.

    As in `trimtab.export.transformer_modules`, the mask has a query axis of full size.
    """

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attention.to_q(hidden_states), attention.to_k(source), attention.to_v(source)
        width = query.shape[-1] // attention.heads
        query, key, value = (part.unflatten(-1, (-1, width)) for part in (query, key, value))
        if attention.norm_q is not None:  # in each head
            query, key = attention.norm_q(query), attention.norm_k(key)
        shared = attention.heads // key.shape[2]
        if shared > 1:
            key, value = (part.repeat_interleave(shared, dim=2) for part in (key, value))
        if attention_mask is not None:
            attention_mask = attention_mask[:, None].expand(-1, -1, query.shape[1], -1)
        return attended(attention, [query, key, value], attention_mask)


class DreamLiteUNet(Denoiser):
    """DreamLite's U-Net, which draws beside a picture to edit: beside nothing here, as its pipeline draws from texts.

    The sample is doubled along its width by zeros. Attention and convolutions see both halves, so that all of it is
    computed, and what is predicted for the zeros is dropped.
    """

    def __init__(self, model: nn.Module, factor: int) -> None:
        super().__init__(model)
        self.factor = factor
        self.model.set_attn_processor(_SharedHeads())

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
    ) -> Tensor:
        height, width = pixels(sample, self.factor)
        prediction = self.model(
            torch.cat([sample, torch.zeros_like(sample)], dim=3),
            timestep,
            encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            added_cond_kwargs={"time_ids": torch.cat([width, height], dim=1)},
            return_dict=False,
        )[0]
        return prediction[..., : sample.shape[3]]


class PixelUNet(Denoiser):
    """An unconditional UNet2DModel."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        if self.model.config.time_embedding_type == "learned":  # a row of a table
            timestep = timestep.to(torch.int64)
        return self.model(sample, timestep, return_dict=False)[0]
