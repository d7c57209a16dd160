"""Measure everything this sample claims, and print it as a table.

    python evaluate.py --pictures 100

Pictures that the trainings never saw: seeds from 9000 on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import generate
import judge as judging
import numpy as np
import torch
from draw import draw
from judge import Estimate, Judge, Score
from PIL import Image
from shapes import Scene, forget, sample_scenes
from train_dit import CLASSES, class_scenes
from train_dit import MODEL as DIT
from train_unet import MODEL as SD

_WIDTH = 34


def row(name: str, *cells: object) -> None:
    """One line of the table."""
    print(f"{name:<{_WIDTH}}" + "".join(f"{cell!s:>15}" for cell in cells), flush=True)


def show(name: str, number: int, score: Score) -> None:
    """A score as a line: pictures, overall, and each attribute's share in percent."""
    parts = (f"{100 * estimate.value:.1f}" for estimate in score.by_attribute.values())
    numbers = "".join(f"{part:>11}" for part in parts)
    print(f"{name:<{_WIDTH}}{number:>9}{score.overall!s:>15}{numbers}", flush=True)


@torch.no_grad()
def reconstruct(pipeline, pictures: np.ndarray) -> np.ndarray:
    """Pictures through the autoencoder and back, (N, 64, 64, 3) in 0..1."""
    parts = []
    for part in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(100):
        latents = pipeline.vae.encode(part * 2.0 - 1.0).latent_dist.mode()
        parts.append((pipeline.vae.decode(latents).sample / 2.0 + 0.5).clamp(0.0, 1.0))
    return torch.cat(parts).permute(0, 2, 3, 1).numpy()


def class_score(judge: Judge, pictures: np.ndarray, classes: list[int]) -> Estimate:
    """Share of the pictures that hold one object, and it has the colour and the shape of the class."""
    wanted = [tuple(CLASSES[n].split()) for n in classes]
    right = np.array(
        [
            [(thing.colour, thing.shape) for thing in seen.things] == [want]
            for seen, want in zip(judging.read(judge, pictures), wanted, strict=True)
        ]
    )
    return Estimate(float(right.mean()), float(right.std() / np.sqrt(len(right))), len(right))


def write_sheet(path: Path, rows: list[np.ndarray], columns: int = 12) -> None:
    """Save the first pictures of each row as a PNG, at twice their size."""
    grid = np.concatenate([np.concatenate(list(pictures[:columns]), 1) for pictures in rows])
    image = Image.fromarray((grid * 255).round().astype(np.uint8))
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=100, help="generated per kind of caption")
    parser.add_argument("--per-class", type=int, default=10, help="generated per DiT class")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--dit-guidance", type=float, default=3.0)
    parser.add_argument("--dpm", action="store_true", help="DPM-Solver++ instead of the pipelines' DDIM")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet to this PNG")
    parser.add_argument("--sd", type=Path, default=SD)
    parser.add_argument("--dit", type=Path, default=DIT, help="'none' leaves it out")
    options = parser.parse_args()

    judge, number = judging.load(), options.pictures
    sd = generate.load_sd(options.sd, options.dpm)
    name = type(sd.scheduler).__name__.removesuffix("Scheduler")
    print(f"{name}, {options.steps} steps, guidance {options.guidance}, DiT {options.dit_guidance}")
    print(" " * _WIDTH + f"{'pictures':>9}{'overall':>15}" + "".join(f"{n:>11}" for n in _ATTRIBUTES))

    scenes = sample_scenes(9000, 2000)
    real = draw(scenes, 9000)
    show("judge, real pictures", 2000, judging.score(judge, real, scenes))
    rebuilt = reconstruct(sd, real[:1000])
    show("VAE reconstructions", 1000, judging.score(judge, rebuilt, scenes[:1000]))

    drawn: list[np.ndarray] = []
    stated: list[Scene] = []
    for count in (1, 2, 3):
        asked = sample_scenes(9100 + count, number, count)
        made = generate.from_captions(sd, [s.caption for s in asked], options.steps, options.guidance, count)
        show(f"U-Net, {count} object{'s' * (count > 1)}", number, judging.score(judge, made, asked))
        drawn.append(made)
        stated += asked
    made = np.concatenate(drawn)
    show("U-Net, 1 to 3 objects", len(made), judging.score(judge, made, stated))
    shuffled = [stated[n] for n in np.random.default_rng(0).permutation(len(stated))]
    show("  control: captions swapped", len(made), judging.score(judge, made, shuffled))
    rng = np.random.default_rng(9200)
    short = [forget(scene, rng, whole=0.0, empty=0.0) for scene in sample_scenes(9200, number)]
    brief = generate.from_captions(sd, [s.caption for s in short], options.steps, options.guidance, 4)
    show("U-Net, partial captions", number, judging.score(judge, brief, short))

    same = draw(stated, 9300)
    other = draw([s for count in (1, 2, 3) for s in sample_scenes(9400 + count, number, count)], 9400)
    row("Fréchet distance, U-Net to real", f"{distance(judge, made, same):.2f}")
    row("  real to other real, same number", f"{distance(judge, other, same):.2f}")

    rows = [draw(stated[:number], 1), drawn[0], drawn[1], drawn[2]]
    if str(options.dit) != "none":
        dit = generate.load_dit(options.dit, options.dpm)
        classes = [n for _ in range(options.per_class) for n in range(len(CLASSES))]
        made = generate.from_classes(dit, classes, options.steps, options.dit_guidance, 5)
        row("DiT, one object of its class", len(made), class_score(judge, made, classes))
        same = draw(class_scenes(classes, 9500), 9500)
        other = draw(class_scenes(classes, 9600), 9600)
        row("Fréchet distance, DiT to real", f"{distance(judge, made, same):.2f}")
        row("  real to other real, same number", f"{distance(judge, other, same):.2f}")
        rows.append(made)
    if options.sheet:
        write_sheet(options.sheet, rows)


_ATTRIBUTES = ("shape", "colour", "size", "position", "background", "count")


def distance(judge: Judge, first: np.ndarray, second: np.ndarray) -> float:
    """The Fréchet distance between two sets of pictures."""
    return judging.frechet_distance(judging.features(judge, first), judging.features(judge, second))


if __name__ == "__main__":
    main()
