"""The training pictures as latents, encoded once: the diffusion trainings never run the encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from draw import draw
from shapes import Scene

_PART = 256


@torch.no_grad()
def moments(vae: AutoencoderKL, scenes: list[Scene], seed: int) -> np.ndarray:
    """Mean and standard deviation of the scenes' latents, scaled by the scaling factor.

    Returns:
        (N, 2, 4, 8, 8) float16. A latent is mean + deviation * noise, drawn anew each time it is used.
    """
    parts = []
    for start in range(0, len(scenes), _PART):
        pictures = torch.from_numpy(draw(scenes[start : start + _PART], seed + start))
        posterior = vae.encode(pictures.permute(0, 3, 1, 2) * 2.0 - 1.0).latent_dist
        both = torch.stack([posterior.mean, posterior.std], 1) * vae.config.scaling_factor
        parts.append(both.half().numpy())
    return np.concatenate(parts)


def cached(work: Path, name: str, scenes: list[Scene], seed: int) -> torch.Tensor:
    """The scenes' moments, from a file in `work` that is written if it is not there.

    Args:
        work: Folder that holds the trained `vae`.
        name: Of the file.
        scenes: Complete scenes.
        seed: Of the drawing.
    """
    path = work / f"latents-{name}-{len(scenes)}.npy"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(work / "vae").eval()
        np.save(path, moments(vae, scenes, seed))
    return torch.from_numpy(np.load(path))


def draw_latents(both: torch.Tensor) -> torch.Tensor:
    """(N, 2, 4, 8, 8) moments -> (N, 4, 8, 8) float32 latents."""
    mean, deviation = both.float().unbind(1)
    return mean + deviation * torch.randn_like(mean)
