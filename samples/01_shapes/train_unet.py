"""Train the text encoder and the U-Net together, and save them as a Stable Diffusion pipeline.

    python train_unet.py --minutes 55 --work /tmp/shapes

Needs the autoencoder that train_vae.py left in the same folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import latents
import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusion import loss_of, new_scheduler
from shapes import forget, sample_scenes
from torch import nn
from training import Trainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from vocabulary import MAX_LENGTH, new_tokenizer, write_files

MODEL = Path(__file__).parent / "models" / "shapes-sd"
WIDTH = 96  # of the text embeddings


class Denoiser(nn.Module):
    """Text encoder and U-Net as one module, to be trained and averaged as one."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_LENGTH,
                projection_dim=WIDTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D",) * 3,
            up_block_types=("CrossAttnUpBlock2D",) * 3,
            block_out_channels=(48, 64, 72),
            layers_per_block=2,
            attention_head_dim=(3, 4, 3),  # diffusers means the number of heads: 16, 16 and 24 wide
            cross_attention_dim=WIDTH,
            norm_num_groups=8,
        )

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Predict the noise.

        Args:
            noisy: (N, 4, 8, 8) float32.
            timesteps: (N,) int64.
            ids: (N, 32) int64.
        """
        return self.unet(noisy, timesteps, self.text_encoder(ids).last_hidden_state).sample


def save_pipeline(denoiser: Denoiser, tokenizer: CLIPTokenizer, vae: AutoencoderKL, folder: Path) -> None:
    """Write a StableDiffusionPipeline folder in FP16."""
    denoiser.to(memory_format=torch.contiguous_format)
    vae.register_to_config(_name_or_path="")  # not the folder of this machine
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    write_files(folder / "tokenizer")  # for readers that know no tokenizer.json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=55.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--pictures", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, default=MODEL, help="folder for the pipeline")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    tokenizer = new_tokenizer(options.work / "tokenizer")
    denoiser = Denoiser(tokenizer).to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    print(f"parameters {sum(p.numel() for p in denoiser.parameters())}")
    scenes = sample_scenes(3000, options.pictures)
    moments = latents.cached(options.work, "unet", scenes, 3000)
    alphas = new_scheduler().alphas_cumprod

    trainer = Trainer(denoiser, options.minutes, options.rate, options.work / "unet.pt")
    rng = np.random.default_rng(options.seed + trainer.step)
    for _ in trainer:
        chosen = rng.integers(len(scenes), size=options.batch)
        captions = [forget(scenes[n], rng).caption for n in chosen]
        ids = tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids
        clean = latents.draw_latents(moments[torch.from_numpy(chosen)])
        loss = loss_of(lambda noisy, t, ids=ids: denoiser(noisy, t, ids), clean, alphas)
        trainer.update(loss)
        trainer.report(100, loss=loss)

    vae = AutoencoderKL.from_pretrained(options.work / "vae")
    save_pipeline(trainer.ema.module, tokenizer, vae, options.out)


if __name__ == "__main__":
    main()
