"""Transformers behind their graphs' interface, held against how diffusers' pipelines call them; nothing is traced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.export.denoisers import denoiser_module
from trimtab.export.source import Source

PipelineFolder = Callable[[str], Path]


@pytest.mark.parametrize("size", [(6, 4), (5, 7)])
def test_flux_2_is_called_as_its_pipeline_calls_it(
    size: tuple[int, int], pipeline_folder: PipelineFolder, diffusers_pipeline: Callable[[str], Any]
) -> None:
    pipe, ours = diffusers_pipeline("flux2"), denoiser_module(Source(pipeline_folder("flux2")))
    sample, text = torch.randn(2, 16, *size), torch.randn(2, 9, 24)
    places = pipe._prepare_latent_ids(sample)
    with torch.no_grad():
        tokens = pipe.transformer(
            hidden_states=pipe._pack_latents(sample),
            timestep=torch.full((2,), 0.25),
            encoder_hidden_states=text,
            txt_ids=pipe._prepare_text_ids(text),
            img_ids=places,
            return_dict=False,
        )[0]
        found = ours(sample=sample, timestep=torch.tensor(250.0), encoder_hidden_states=text)
    expected = pipe._unpack_latents_with_ids(tokens, places, *size)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ((5, 40), (12, 10)),  # of 30 tokens two are filled up to 32; texts of one group and of two
        ((33, 64), (8, 16)),  # 32 tokens: none
        ((32, 1), (2, 2)),
    ],
)
def test_z_image_reads_texts_of_their_own_lengths_from_one_array(
    lengths: tuple[int, int],
    size: tuple[int, int],
    pipeline_folder: PipelineFolder,
    diffusers_pipeline: Callable[[str], Any],
) -> None:
    pipe, ours = diffusers_pipeline("z_image"), denoiser_module(Source(pipeline_folder("z_image")))
    sample, text = torch.randn(2, 16, *size), torch.randn(2, 96, 32)
    mask = (torch.arange(96) < torch.tensor(lengths)[:, None]).float()
    with torch.no_grad():
        pictures = pipe.transformer(
            list(sample[:, :, None].unbind()),
            torch.full((2,), 0.75),
            [row[:length] for row, length in zip(text, lengths, strict=True)],
            return_dict=False,
        )[0]
        given = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
        found = ours(sample=sample, timestep=torch.tensor(250.0), **given)
    torch.testing.assert_close(found, -torch.stack(pictures)[:, :, 0], rtol=1e-5, atol=1e-5)
