"""Pictures from the shipped pipelines, in batches, as the judge takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiTPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline

_BATCH = 60


def load_sd(folder: Path, dpm: bool = False) -> StableDiffusionPipeline:
    """The text-to-image pipeline in float32; `dpm` puts DPM-Solver++ in the place of its own DDIM."""
    return _quiet(StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32), dpm)


def load_dit(folder: Path, dpm: bool = False) -> DiTPipeline:
    """The class-to-image pipeline in float32."""
    return _quiet(DiTPipeline.from_pretrained(folder, torch_dtype=torch.float32), dpm)


def _quiet(pipeline, dpm: bool):
    pipeline.set_progress_bar_config(disable=True)
    if dpm:
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def from_captions(
    pipeline: StableDiffusionPipeline, captions: Sequence[str], steps: int, guidance: float, seed: int
) -> np.ndarray:
    """(N, 64, 64, 3) float32 in 0..1, one picture per caption."""
    generator = torch.Generator().manual_seed(seed)
    return np.concatenate(
        [
            pipeline(
                list(captions[start : start + _BATCH]),
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generator,
                output_type="np",
            ).images
            for start in range(0, len(captions), _BATCH)
        ]
    )


def from_classes(
    pipeline: DiTPipeline, classes: Sequence[int], steps: int, guidance: float, seed: int
) -> np.ndarray:
    """(N, 64, 64, 3) float32 in 0..1, one picture per class index."""
    generator = torch.Generator().manual_seed(seed)
    return np.concatenate(
        [
            pipeline(
                list(classes[start : start + _BATCH]),
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generator,
                output_type="np",
            ).images
            for start in range(0, len(classes), _BATCH)
        ]
    )
