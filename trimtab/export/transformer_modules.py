"""The transformers that are traced, each behind its graph's interface (`trimtab.export.modules`)."""

# The wrapped models are untyped, and forwards differ by design.
# mypy: disable-error-code="no-any-return, override"

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from trimtab.export.modules import Denoiser, attended, pixels, timestep_rows


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
        heads = [part.unflatten(-1, (attention.heads, -1)) for part in (query, key, value)]
        return attended(attention, heads, attention_mask)


def _bias(mask: Tensor, queries: int) -> Tensor:
    """What attention adds to its scores, (rows, 1, queries, keys): -10000 where a mask (rows, keys) is 0.

    PixArt and Sana make the same of their text's.
    """
    return ((1 - mask) * -10000.0)[:, None, None].expand(-1, -1, queries, -1)


CONDITIONED_SIZE = 128
"""The ``sample_size`` of the PixArt models (1024 px) that diffusers' pipeline tells the picture's size and shape."""


class _PatchTransformer(Denoiser):
    """One whose configuration says how many latents a side of a patch has."""

    def _tokens(self, sample: Tensor) -> int:
        patch = self.model.config.patch_size
        return (sample.shape[2] // patch) * (sample.shape[3] // patch)


class PixArtTransformer(_PatchTransformer):
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
            encoder_attention_mask=_bias(encoder_attention_mask, self._tokens(sample)),
            timestep=timestep_rows(timestep, sample),
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
        return prediction[:, : sample.shape[1]]


class SanaTransformer(_PatchTransformer):
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
            encoder_attention_mask=_bias(mask, self._tokens(sample)),
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


class _RotaryAttention:
    """`_Attention` to itself, with positions as angles (rows, tokens, 2 * pairs): of each pair cosine and sine."""

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        query, key, value = (
            project(hidden_states).unflatten(-1, (attention.heads, -1))
            for project in (attention.to_q, attention.to_k, attention.to_v)
        )
        if attention.norm_q is not None:  # in each head
            query, key = attention.norm_q(query), attention.norm_k(key)
        assert freqs_cis is not None
        return attended(attention, [_turn(query, freqs_cis), _turn(key, freqs_cis), value], attention_mask)


def _turn(heads: Tensor, angles: Tensor) -> Tensor:
    """Neighbouring pairs of numbers, (rows, tokens, heads, 2 * pairs), each turned by its angle."""
    first, second = heads.reshape(*heads.shape[:-1], -1, 2).unbind(-1)
    cosine, sine = angles.reshape(*angles.shape[:2], 1, -1, 2).unbind(-1)
    return torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1).flatten(-2)


class ZImageTransformer(Denoiser):
    """Z-Image: text and picture in one stream, each filled up to whole groups of tokens.

    diffusers' forward takes lists and cuts every text to its words. Here all texts have the length of the longest, a
    multiple of `GROUP`, and what is behind a text's last group is masked out of all attention, which comes to the same.
    """

    PATCH = "2-1"
    """Name of the patches that the pipeline draws with, of the sizes that a model may have: 2x2, one frame."""

    GROUP = 32
    """Text and picture have a multiple of so many tokens, as their last ones a learned one (SEQ_MULTI_OF)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        for block in (*self.model.noise_refiner, *self.model.context_refiner, *self.model.layers):
            block.attention.set_processor(_RotaryAttention())
        config = self.model.config
        tables = self.model.rope_embedder.precompute_freqs_cis(
            config.axes_dims, config.axes_lens, config.rope_theta
        )
        for axis, table in enumerate(tables):  # (positions, 2 * pairs): cosines and sines
            self.register_buffer(f"axis_{axis}", torch.view_as_real(table).flatten(1), persistent=False)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
    ) -> Tensor:
        model = self.model
        rows, channels, height, width = sample.shape
        down, across = height // 2, width // 2
        # The pipeline counts from noise, the scheduler to it. Its embedder's own forward switches autocast off, which
        # has no translation to ONNX.
        time = timestep_rows((1000 - timestep) / 1000, sample) * model.t_scale
        waves = get_timestep_embedding(
            time, model.t_embedder.frequency_embedding_size, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        time = model.t_embedder.mlp(waves)

        packed = sample.reshape(rows, channels, down, 2, across, 2).permute(0, 2, 4, 3, 5, 1)
        picture = model.all_x_embedder[self.PATCH](packed.reshape(rows, down * across, 4 * channels))
        padding = -(down * across) % self.GROUP
        picture = torch.cat([picture, model.x_pad_token.expand(rows, padding, -1)], dim=1)

        words = encoder_attention_mask[..., None]
        text = model.cap_embedder(encoder_hidden_states) * words + model.cap_pad_token * (1 - words)
        # Groups with a word in them. Of masks alone, which is known to be exact in FP16 (`trimtab.passes.precision`).
        groups = encoder_attention_mask.reshape(rows, -1, self.GROUP).amax(-1, keepdim=True)
        mask = groups.expand(-1, -1, self.GROUP).flatten(1)
        # The picture is a frame behind the text; its last tokens, which fill it up, are at no place.
        frame = mask.sum(1, keepdim=True).to(torch.int64)
        of_text, of_picture = self._angles(text.shape[1], frame, down, across, padding)

        for block in model.noise_refiner:
            picture = block(picture, None, of_picture, time)
        for block in model.context_refiner:
            text = block(text, _bias(mask, text.shape[1]), of_text)
        stream = torch.cat([picture, text], dim=1)
        angles = torch.cat([of_picture, of_text], dim=1)
        mask = nn.functional.pad(mask, (picture.shape[1], 0), value=1.0)
        for block in model.layers:
            stream = block(stream, _bias(mask, stream.shape[1]), angles, time)
        velocity = model.all_final_layer[self.PATCH](stream[:, : down * across], c=time)
        velocity = velocity.reshape(rows, down, across, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
        return -velocity.reshape(rows, channels, height, width)

    def _angles(
        self, tokens: int, frame: Tensor, down: int, across: int, padding: int
    ) -> tuple[Tensor, Tensor]:
        """Of text and of picture, (rows, tokens, 2 * pairs): those of three axes side by side.

        A text has the places from 1 on of the first axis; ``frame`` (rows, 1) of them are before the picture's one.
        """
        rows = frame.shape[0]
        sequence, lines, columns = (self.get_buffer(f"axis_{axis}") for axis in range(3))
        nowhere = torch.cat([sequence[0], lines[0], columns[0]])
        sequence = sequence[1 : tokens + 2]
        beside = nowhere[sequence.shape[1] :].expand(tokens, -1)
        of_text = torch.cat([sequence[:tokens], beside], dim=1).expand(rows, -1, -1)
        grid = [lines[:down, None].expand(-1, across, -1), columns[None, :across].expand(down, -1, -1)]
        cells = torch.cat(grid, dim=-1).flatten(0, 1).expand(rows, -1, -1)
        frames = nn.functional.embedding(frame, sequence).expand(-1, down * across, -1)
        of_picture = torch.cat([frames, cells], dim=-1)
        return of_text, torch.cat([of_picture, nowhere.expand(rows, padding, -1)], dim=1)
