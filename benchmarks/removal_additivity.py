"""Claim: the sum of single losses ranks sets of removed layers as their true joint loss does.

    python benchmarks/removal_additivity.py [--sets 70] [--samples 16] [--json]

Scores every candidate of the shipped U-Net, then measures random sets at 10, 30 and 50% of its parameters, and
prints Spearman's rank correlation of predicted and true loss with its 95% interval (bootstrap over sets). The
control is the same U-Net before training: what additivity a network has by its architecture alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import judged
import numpy as np
from scipy.stats import spearmanr

import trimtab
from trimtab.calibration.choice import Wish, by_chance
from trimtab.calibration.planning import Calibration, score_layers
from trimtab.storage import read_program

SHARES = (0.1, 0.3, 0.5)


def untrained(folder: Path) -> Path:
    """The shipped pipeline with a U-Net as its constructor makes it."""
    import torch
    from diffusers import UNet2DConditionModel

    shutil.copytree(judged.MODEL, folder)
    torch.manual_seed(0)
    config = UNet2DConditionModel.load_config(folder / "unet")
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


def correlation(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Spearman's, with a 95% interval."""
    generator = np.random.default_rng(0)
    resampled = []
    for _ in range(2000):
        rows = generator.integers(len(true), size=len(true))
        resampled.append(spearmanr(predicted[rows], true[rows]).statistic)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {
        "spearman": float(spearmanr(predicted, true).statistic),
        "low": float(low),
        "high": float(high),
        "sets": len(true),
        "median_true_over_predicted": float(np.median(true / predicted)),
    }


def measure(model: Path, scratch: Path, sets: int, samples: int) -> dict[str, dict[str, float]]:
    """Correlations by share, and over all sets."""
    program = read_program(trimtab.compile(model, scratch / "whole.bundle"))
    calibration = Calibration(samples=samples)
    graph, scores = score_layers(program, calibration, scratch / "draft")
    chosen = {
        share: [by_chance(graph.candidates, Wish(share), seed) for seed in range(sets)] for share in SHARES
    }
    predicted, true, result = [], [], {}
    for share, members in chosen.items():
        sums = np.array([sum(scores.mean(name) for name in names) for names in members])
        joint = np.array(graph.joint(members, calibration.workers))
        result[f"{share:.0%}"] = correlation(sums, joint)
        predicted.append(sums)
        true.append(joint)
    result["all"] = correlation(np.concatenate(predicted), np.concatenate(true))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", type=int, default=70, help="for each share")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(prefix="trimtab-") as temporary:
        scratch = Path(temporary)
        models = {"trained": judged.MODEL, "untrained": untrained(scratch / "untrained")}
        for name, model in models.items():
            results[name] = measure(model, scratch / f"{name}-work", options.sets, options.samples)
    if options.json:
        print(json.dumps(results))
        return
    print(
        f"{'network':<12}{'share':>6}{'sets':>6}{'Spearman':>10}{'95% interval':>18}{'true / predicted':>18}"
    )
    for name, by_share in results.items():
        for share, row in by_share.items():
            interval = f"{row['low']:.3f} to {row['high']:.3f}"
            print(
                f"{name:<12}{share:>6}{row['sets']:>6}{row['spearman']:>10.3f}{interval:>18}"
                f"{row['median_true_over_predicted']:>18.2f}"
            )


if __name__ == "__main__":
    main()
