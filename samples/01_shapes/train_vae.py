"""Train the autoencoder: 64x64 pictures to 8x8x4 latents and back.

python train_vae.py --minutes 14 --work /tmp/shapes
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from draw import draw
from shapes import batches, sample_scenes
from torch.nn import functional as F
from training import Trainer

KL_WEIGHT = 3e-4  # per latent element, against losses per pixel: enough to keep latents smooth, not to blur


def new_vae() -> AutoencoderKL:
    """The untrained autoencoder: 0.7 M parameters, factor 8."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        force_upcast=False,
    )


def to_tensor(pictures) -> torch.Tensor:
    """(N, 64, 64, 3) in 0..1 -> (N, 3, 64, 64) in -1..1, float32."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous() * 2.0 - 1.0


def edges(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences between neighbouring pixels, across and down."""
    return pictures[..., :, 1:] - pictures[..., :, :-1], pictures[..., 1:, :] - pictures[..., :-1, :]


def loss_of(
    vae: AutoencoderKL, pictures: torch.Tensor, edge_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and its plain L1 part.

    Objects cover a tenth of a picture, so their pixels count five times: otherwise the background is all
    that is learned for a long while. The corner pixel is always background.

    Args:
        vae: The autoencoder.
        pictures: (N, 3, 64, 64) in -1..1.
        edge_weight: Of the term that keeps outlines crisp.
    """
    posterior = vae.encode(pictures).latent_dist
    output = vae.decode(posterior.sample()).sample
    covered = ((pictures - pictures[..., :1, :1]).abs().amax(1, keepdim=True) > 0.02).float()
    error = (output - pictures).abs()
    pixel = ((1.0 + 4.0 * covered) * (error + error.square())).mean()
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(output), edges(pictures), strict=True))
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return pixel + edge_weight * edge + KL_WEIGHT * kl, error.mean()


@torch.no_grad()
def latent_std(vae: AutoencoderKL) -> float:
    """The standard deviation of sampled latents; its inverse is the scaling factor."""
    pictures = to_tensor(draw(sample_scenes(90, 1024), 90))
    parts = [vae.encode(part).latent_dist.sample() for part in pictures.split(128)]
    return float(torch.cat(parts).std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=14.0)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    vae = new_vae()
    print(f"parameters {sum(p.numel() for p in vae.parameters())}")
    trainer = Trainer(vae, options.minutes, options.rate, options.work / "vae.pt", weight_decay=0.0)
    source = batches(1000 + trainer.step, options.batch)
    for step in trainer:
        # The edge term comes in slowly: it would punish the first blobs for having an outline at all.
        edge_weight = trainer.budget.fraction
        loss, l1 = loss_of(vae, to_tensor(draw(next(source), 1000 + step)), edge_weight)
        trainer.update(loss)
        trainer.report(50, loss=loss, l1=l1)

    final = trainer.ema.module
    std = latent_std(final)
    final.register_to_config(scaling_factor=1.0 / std)
    final.save_pretrained(options.work / "vae")
    print(f"latent std {std:.4f}")


if __name__ == "__main__":
    main()
