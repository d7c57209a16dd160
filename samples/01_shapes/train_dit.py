"""Train the class-conditional transformer, and save it as a DiT pipeline. A class is a shape in a colour.

    python train_dit.py --minutes 30 --work /tmp/shapes

Needs the autoencoder that train_vae.py left in the same folder.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import latents
import numpy as np
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from diffusion import loss_of, new_scheduler
from shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, Thing
from training import Trainer

MODEL = Path(__file__).parent / "models" / "shapes-dit"
CLASSES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
NULL_CLASS = 1000  # written into DiTPipeline, so the embedding needs that many rows


def class_scenes(classes: Sequence[int], seed: int) -> list[Scene]:
    """A scene for each class index: one object in the center, its size and the background at random."""
    rng = np.random.default_rng(seed)
    scenes = []
    for n in classes:
        colour, shape = CLASSES[n].split()
        thing = Thing(shape, colour, SIZES[rng.integers(len(SIZES))], "center")
        scenes.append(Scene((thing,), tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]))
    return scenes


def new_transformer() -> DiTTransformer2DModel:
    """The untrained transformer: seven blocks over 16 tokens, each a 2x2 patch of latents.

    diffusers gives every block its own embedder of timestep and class; the published DiT has a single one.
    Here all blocks share the first one's while they are trained, and `untie` makes copies at the end.
    """
    transformer = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=7,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )
    first = transformer.transformer_blocks[0].norm1.emb
    torch.nn.init.normal_(first.class_embedder.embedding_table.weight, std=0.02)
    for block in transformer.transformer_blocks:
        block.norm1.emb = first
        # adaLN-Zero (Peebles and Xie 2023, section 3.2): each block starts as the identity.
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    for head in (transformer.proj_out_1, transformer.proj_out_2):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    return transformer


def untie(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Give each block its own copy of the embedder, and clear the rows of classes that do not exist."""
    transformer = copy.deepcopy(transformer)
    first = transformer.transformer_blocks[0].norm1.emb
    first.class_embedder.embedding_table.weight.data[len(CLASSES) : NULL_CLASS] = 0.0
    for block in transformer.transformer_blocks[1:]:
        block.norm1.emb = copy.deepcopy(first)
    return transformer


def save_pipeline(transformer: DiTTransformer2DModel, vae: AutoencoderKL, folder: Path) -> None:
    """Write a DiTPipeline folder in FP16."""
    vae.register_to_config(_name_or_path="")  # not the folder of this machine
    pipeline = DiTPipeline(
        transformer=untie(transformer),
        vae=vae,
        scheduler=new_scheduler(),
        id2label=dict(enumerate(CLASSES)),
    )
    pipeline.register_to_config(id2label=dict(enumerate(CLASSES)))  # the constructor does not
    pipeline.to(dtype=torch.float16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--pictures", type=int, default=6_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, default=MODEL, help="folder for the pipeline")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    transformer = new_transformer()
    print(f"parameters {sum(p.numel() for p in transformer.parameters())}")
    classes = torch.arange(options.pictures) % len(CLASSES)
    moments = latents.cached(options.work, "dit", class_scenes(classes.tolist(), 4000), 4000)
    alphas = new_scheduler().alphas_cumprod

    # In training mode the label embedder itself swaps 10% of the classes for the null class.
    trainer = Trainer(transformer, options.minutes, options.rate, options.work / "dit.pt", weight_decay=0.0)
    rng = np.random.default_rng(options.seed + trainer.step)
    for _ in trainer:
        chosen = torch.from_numpy(rng.integers(len(classes), size=options.batch))
        labels = classes[chosen]
        loss = loss_of(
            lambda noisy, t, labels=labels: transformer(noisy, timestep=t, class_labels=labels).sample,
            latents.draw_latents(moments[chosen]),
            alphas,
        )
        trainer.update(loss)
        trainer.report(100, loss=loss)

    save_pipeline(trainer.ema.module, AutoencoderKL.from_pretrained(options.work / "vae"), options.out)


if __name__ == "__main__":
    main()
