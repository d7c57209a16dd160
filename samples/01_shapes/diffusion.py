"""What the two diffusion trainings share: the noise schedule and the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler

SNR_LIMIT = 5.0  # Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy"


def new_scheduler() -> DDIMScheduler:
    """The scheduler of the shipped pipelines: the schedule of Stable Diffusion 1.x."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def sample_timesteps(number: int, alphas: torch.Tensor) -> torch.Tensor:
    """Random timesteps, each as often as its min-SNR weight, min(SNR, 5) / SNR, says.

    In expectation the gradient of uniform timesteps with weighted losses, but nothing is spent on samples
    that hardly count. Stratified: every batch covers the whole range of noise, so its loss varies less.

    Args:
        number: How many.
        alphas: (1000,) cumulative products of the schedule.

    Returns:
        (number,) int64.
    """
    snr = alphas / (1.0 - alphas)
    shares = (snr.clamp(max=SNR_LIMIT) / snr).cumsum(0)
    strata = (torch.arange(number) + torch.rand(number)) / number
    return torch.searchsorted(shares, strata * shares[-1]).clamp(max=len(alphas) - 1)


def loss_of(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], latents: torch.Tensor, alphas: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of the predicted noise.

    Args:
        predict: (noisy (N, 4, 8, 8), timesteps (N,)) -> noise (N, 4, 8, 8).
        latents: (N, 4, 8, 8) float32, in random order.
        alphas: (1000,) cumulative products of the schedule.
    """
    timesteps = sample_timesteps(len(latents), alphas)
    alpha = alphas[timesteps].view(-1, 1, 1, 1)
    noise = torch.randn_like(latents)
    found = predict(alpha.sqrt() * latents + (1.0 - alpha).sqrt() * noise, timesteps)
    return (found - noise).square().mean()
