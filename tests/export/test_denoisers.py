"""The denoiser as a torch module: the same that the graph was traced from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trimtab.errors import ExportError
from trimtab.export.denoisers import _WRAPPERS, denoiser_module, latent_space
from trimtab.export.families import FAMILIES
from trimtab.export.source import Source

PipelineFolder = Callable[[str], Path]


def test_every_family_has_a_denoiser() -> None:
    assert set(_WRAPPERS) == set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "wrapper"),
    [
        ("sd15", "ConditionalUNet"),
        ("inpaint9", "InpaintingUNet"),
        ("lcm", "GuidedUNet"),
        ("ddpm", "PixelUNet"),
    ],
)
def test_a_unet_is_wrapped_by_what_it_reads(
    pipeline_folder: PipelineFolder, family: str, wrapper: str
) -> None:
    assert type(denoiser_module(Source(pipeline_folder(family)))).__name__ == wrapper


def test_it_takes_the_graphs_inputs_by_name(pipeline_folder: PipelineFolder) -> None:
    source = Source(pipeline_folder("dit"))
    module = denoiser_module(source)
    channels, factor = latent_space(source)
    sample = torch.randn(2, channels, 8, 8)
    with torch.no_grad():
        prediction = module(sample=sample, timestep=torch.tensor(3.0), class_labels=torch.tensor([1, 2]))
    assert prediction.shape == sample.shape and factor > 1


def test_other_pipelines_and_channels_are_refused(pipeline_folder: PipelineFolder, tmp_path: Path) -> None:
    index = {"_class_name": "StableAudioPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match="StableAudioPipeline is not supported: give one of"):
        denoiser_module(Source(tmp_path))

    class Wide(Source):
        def load(self, name: str) -> object:
            unet = super().load(name)
            unet.register_to_config(in_channels=7)
            return unet

    with pytest.raises(ExportError, match="takes 7 channels, and 4 "):
        denoiser_module(Wide(pipeline_folder("sd15")))
