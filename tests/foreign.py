"""Small foreign .onnx files and the TOML files that wire them, for the tests of trimtab.export.onnx_files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from diffusers import DDIMScheduler

import trimtab

PIXELS = """
size = [8, 4]
[scheduler]
class = "DDIMScheduler"
clip_sample = false
[denoiser]
file = "denoiser.onnx"
"""
"""Wires a denoiser of pixels."""

LINEAR = (
    "float[N,3,H,W] sample, float timestep",
    "float[N,3,H,W] out_sample",
    "<float scale = {0.25}, float rate = {0.001}> "
    "{ t = Mul(timestep, rate) s = Mul(sample, scale) out_sample = Add(s, t) }",
)
"""Inputs, outputs and body of the graph sample / 4 + timestep / 1000."""


def linear(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """What `LINEAR` computes."""
    return 0.25 * sample + 0.001 * timestep


def write(path: Path, inputs: str, outputs: str, body: str, opset: int = 17) -> Path:
    """Writes a graph given in ONNX's own text form."""
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {body}'
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def compiled(folder: Path, toml: str, **options: Any) -> trimtab.Pipeline:
    """Compiles ``folder / "model.toml"`` with this text and loads the bundle."""
    (folder / "model.toml").write_text(toml)
    trimtab.compile(folder / "model.toml", folder / "bundle", **({"steps": 3} | options))
    return trimtab.load(folder / "bundle", threads=1)


def noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """The start noise that diffusers draws for a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sampled(
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    scheduler: Any = None,
    steps: int = 3,
) -> torch.Tensor:
    """diffusers' own loop: latents after all steps."""
    scheduler = scheduler or DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    sample = start * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        sample = scheduler.step(model(sample, timestep), timestep, sample).prev_sample
    return sample


def picture(latents: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(n, C, h, w) in -1..1 as (n, h, w, C) in 0..1."""
    return (latents / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
