"""Train the autoencoder: 64x64 pictures to 8x8x4 latents and back.

python train_vae.py --minutes 23 --work /tmp/shapes
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

SCALING_FACTOR = 0.18215  # that of Stable Diffusion 1.x
KL_WEIGHT = 1e-3  # per latent element, against losses per pixel: enough to keep latents smooth, not to blur


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
        norm_num_groups=2,
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
def latent_statistics(vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel of sampled latents, (4,) float32 each."""
    pictures = to_tensor(draw(sample_scenes(90, 1024), 90))
    sampled = torch.cat([vae.encode(part).latent_dist.sample() for part in pictures.split(128)])
    return sampled.mean((0, 2, 3)), sampled.std((0, 2, 3))


@torch.no_grad()
def normalize(vae: AutoencoderKL) -> None:
    """Give every latent channel mean 0 and standard deviation 1 / SCALING_FACTOR.

    Exact: the 1x1 convolution after the encoder takes the change, the one before the decoder takes it back.
    Diffusion then starts from channels of equal size; a scaling factor alone evens out their average only.
    """
    mean, std = latent_statistics(vae)
    scale = std * SCALING_FACTOR
    means, log_variances = slice(0, len(mean)), slice(len(mean), None)
    vae.quant_conv.bias[means] -= mean
    vae.quant_conv.bias[means] /= scale
    vae.quant_conv.weight[means] /= scale.view(-1, 1, 1, 1)
    vae.quant_conv.bias[log_variances] -= 2.0 * scale.log()
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= scale.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=SCALING_FACTOR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=23.0)
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
    normalize(final)
    print("latent channels, mean {} std {}".format(*(v.tolist() for v in latent_statistics(final))))
    final.save_pretrained(options.work / "vae")


if __name__ == "__main__":
    main()
