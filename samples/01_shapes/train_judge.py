"""Train the judge on real pictures, roughened as a generator might roughen them.

python train_judge.py --minutes 7 --work /tmp/shapes
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import judge as judging
import torch
from draw import draw
from judge import Judge
from shapes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, Scene, batches, sample_scenes
from torch.nn import functional as F
from training import Trainer


def labels(scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
    """Class indices, int64: "shape", "colour" and "size" (N, 5), "background" (N,).

    Shape 0 is an empty cell; its colour and size are -1, which the loss leaves out.
    """
    shape = torch.zeros(len(scenes), 5, dtype=torch.long)
    colour, size = torch.full_like(shape, -1), torch.full_like(shape, -1)
    for n, scene in enumerate(scenes):
        for thing in scene.things:
            cell = POSITIONS.index(thing.position or "")
            shape[n, cell] = 1 + SHAPES.index(thing.shape)
            colour[n, cell] = tuple(COLOURS).index(thing.colour or "")
            size[n, cell] = SIZES.index(thing.size or "")
    background = torch.tensor([tuple(BACKGROUNDS).index(scene.background or "") for scene in scenes])
    return {"shape": shape, "colour": colour, "size": size, "background": background}


def roughen(pictures: torch.Tensor) -> torch.Tensor:
    """Blur, shift the tone and add noise, each picture by its own random amount.

    The blur goes through half or a quarter of the resolution, as an autoencoder's does.
    """
    number = len(pictures)
    factor = 2 if torch.rand(()) < 0.7 else 4
    blurred = F.interpolate(F.avg_pool2d(pictures, factor), scale_factor=factor, mode="bilinear")
    amount = torch.rand(number, 1, 1, 1) * (1.0 if factor == 2 else 0.6)
    rough = torch.lerp(pictures, blurred, amount) + 0.03 * torch.randn(number, 3, 1, 1)
    coarse = F.interpolate(torch.randn(number, 3, 16, 16), scale_factor=4, mode="bilinear")
    noise = torch.rand(number, 1, 1, 1) * (0.05 * torch.randn_like(pictures) + 0.05 * coarse)
    return (rough + noise).clamp(0.0, 1.0)


def loss_of(judge: Judge, pictures: torch.Tensor, wanted: dict[str, torch.Tensor]) -> torch.Tensor:
    """The cross-entropies of all heads, added."""
    found = judge(pictures)
    return sum(
        F.cross_entropy(found[name].flatten(0, -2), classes.flatten(), ignore_index=-1)
        for name, classes in wanted.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    judge = Judge()
    print(f"parameters {sum(p.numel() for p in judge.parameters())}")
    trainer = Trainer(judge, options.minutes, options.rate, options.work / "judge.pt")
    source = batches(2000 + trainer.step, options.batch)
    for step in trainer:
        scenes = next(source)
        pictures = torch.from_numpy(draw(scenes, 2000 + step)).permute(0, 3, 1, 2).contiguous()
        # Half of every batch stays as drawn: real pictures have to be read best of all.
        pictures[::2] = roughen(pictures[::2])
        loss = loss_of(judge, pictures, labels(scenes))
        trainer.update(loss)
        trainer.report(100, loss=loss)

    judging.save(trainer.ema.module)
    scenes = sample_scenes(92, 4000)
    result = judging.score(judging.load(), draw(scenes, 92), scenes)
    print(f"held-out real pictures: {len(scenes)}, overall {result.overall}")
    for name, estimate in result.by_attribute.items():
        print(f"  {name} {estimate}")


if __name__ == "__main__":
    main()
