"""Flux and what was made of it, behind the interface of their graphs (`trimtab.export.modules`)."""

# The wrapped models are untyped, and forwards differ by design.
# mypy: disable-error-code="no-any-return, override"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.export.modules import Denoiser, for_rows, timestep_rows


class FluxTransformer(Denoiser):
    """Flux: 2x2 patches are packed into channels and back here, so that latents stay pictures outside.

    Beside the sample it reads what it was trained for: latents of a picture to draw along, (batch, C, h, w) (Canny,
    Depth), or those of a masked picture and the mask, (1, M, h, w) (Fill), stacked along channels; or latents of a
    picture to look at (Kontext), whose tokens stand behind the sample's.
    """

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
        control: Tensor | None = None,
        masked_latents: Tensor | None = None,
        mask: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> Tensor:
        rows, _, height, width = sample.shape
        beside = [for_rows(each, sample) for each in (control, masked_latents, mask) if each is not None]
        tokens = _packed(torch.cat([sample, *beside], dim=1) if beside else sample)
        image_ids = _places(sample, 0)
        if reference is not None:
            tokens = torch.cat([tokens, _packed(for_rows(reference, sample))], dim=1)
            image_ids = torch.cat([image_ids, _places(reference, 1)])
        text_ids = torch.zeros(encoder_hidden_states.shape[1], 3, dtype=sample.dtype)
        prediction = self.model(
            hidden_states=tokens,
            # The model multiplies by 1000 again.
            timestep=timestep_rows(timestep, sample) / 1000,
            guidance=None if guidance is None else guidance.reshape(1).expand(rows),
            pooled_projections=pooled_projections,
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        if reference is not None:
            prediction = prediction[:, : (height // 2) * (width // 2)]
        return _unpacked(prediction, sample)


def _packed(latents: Tensor) -> Tensor:
    """Patches of 2x2 latents as tokens: (rows, C, h, w) -> (rows, h / 2 * w / 2, 4 * C)."""
    rows, channels, height, width = latents.shape
    packed = latents.reshape(rows, channels, height // 2, 2, width // 2, 2)
    return packed.permute(0, 2, 4, 1, 3, 5).reshape(rows, (height // 2) * (width // 2), channels * 4)


def _unpacked(tokens: Tensor, sample: Tensor) -> Tensor:
    """The way back from `_packed`, to latents of a sample's shape."""
    rows, channels, height, width = sample.shape
    patches = tokens.reshape(rows, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels, height, width)


def _places(latents: Tensor, picture: int) -> Tensor:
    """Where the patches are, (tokens, 3): the number of their picture, down, across."""
    height, width = latents.shape[2] // 2, latents.shape[3] // 2
    down = torch.arange(height, dtype=latents.dtype)[:, None].expand(-1, width)
    across = torch.arange(width, dtype=latents.dtype)[None].expand(height, -1)
    return torch.stack([torch.full_like(down, picture), down, across], dim=-1).reshape(-1, 3)


class ChromaTransformer(Denoiser):
    """Chroma: a Flux whose modulations the time step alone makes, and that is told which tokens are words.

    As in diffusers' pipelines the mask (1 for a word) is added to the scores, so that it hides nothing: words and
    picture count for each other by a factor of e more than padding does.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model.time_text_embed = _ChromaTimes(self.model.time_text_embed)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
    ) -> Tensor:
        tokens = _packed(sample)
        prediction = self.model(
            hidden_states=tokens,
            timestep=timestep_rows(timestep, sample) / 1000,  # the model multiplies by 1000 again
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=nn.functional.pad(encoder_attention_mask, (0, tokens.shape[1]), value=1.0),
            txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3, dtype=sample.dtype),
            img_ids=_places(sample, 0),
            return_dict=False,
        )[0]
        return _unpacked(prediction, sample)


class _ChromaTimes(nn.Module):
    """What Chroma makes its modulations of, (rows, modulations, channels): waves of the time and of their numbers.

    diffusers' own makes a list of as many zeros as there are rows, whose number is open here.

    Args:
        model: diffusers' own, which has no weights.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.time_proj = model.time_proj
        self.register_buffer("unguided", model.guidance_proj(torch.zeros(1)), persistent=False)
        self.register_buffer("numbers", model.mod_proj, persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        rows, numbers = timestep.shape[0], self.get_buffer("numbers")
        time = torch.cat([self.time_proj(timestep), self.get_buffer("unguided").expand(rows, -1)], dim=1)
        time = time[:, None].expand(-1, numbers.shape[0], -1)
        return torch.cat([time, numbers.expand(rows, -1, -1)], dim=-1)


class Flux2Transformer(Denoiser):
    """Flux.2: latents come packed, so that each is a token; words have places in a row of their own.

    Tokens of a picture to look at, whose latents are ``reference`` (batch, C, h, w), stand behind the sample's.
    """

    PICTURE = 10
    """Number of the picture to look at, along the first axis of places."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        reference: Tensor | None = None,
    ) -> Tensor:
        rows, channels, height, width = sample.shape
        tokens, image_ids = sample.flatten(2).transpose(1, 2), self._places(sample, 0)
        if reference is not None:
            tokens = torch.cat([tokens, for_rows(reference, sample).flatten(2).transpose(1, 2)], dim=1)
            image_ids = torch.cat([image_ids, self._places(reference, self.PICTURE)])
        words = torch.arange(encoder_hidden_states.shape[1], dtype=sample.dtype)
        text_ids = torch.stack([*[torch.zeros_like(words)] * 3, words], dim=-1)
        prediction = self.model(
            hidden_states=tokens,
            timestep=timestep_rows(timestep, sample) / 1000,  # the model multiplies by 1000 again
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        if reference is not None:
            prediction = prediction[:, : height * width]
        return prediction.transpose(1, 2).reshape(rows, channels, height, width)

    @staticmethod
    def _places(latents: Tensor, picture: int) -> Tensor:
        """Where latents are, (tokens, 4): the number of their picture, down, across, and no place in a text."""
        down, across = torch.meshgrid(
            *(torch.arange(side, dtype=latents.dtype) for side in latents.shape[2:]), indexing="ij"
        )
        numbers = torch.full_like(down, picture)
        return torch.stack([numbers, down, across, torch.zeros_like(down)], dim=-1).reshape(-1, 4)
