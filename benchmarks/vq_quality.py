"""Claim: at 2 bits, calibrated codes keep the sample models' quality, where rounding and plain k-means lose it.

    python benchmarks/vq_quality.py --model dit|sd --work FOLDER [--pictures 1020] [--rows fp32 rounding k-means ...]
        [--rule PATTERN=BITS ...]

Puts decoded weights into the shipped models and draws judged pictures with them: DDIM, 25 steps, guidance 3 for the
DiT and 5 for the U-Net, the same noise for every row. A row is kept in FOLDER/MODEL.jsonl as soon as it is measured;
the table shows all that are there. A row "NAME=STORE" measures a folder of codebooks made elsewhere; "calibrated-N"
calibrates for --minutes with N candidates, from k-means, on 32 trajectories of the model's own; "rounding-3" rounds to
3 bits.

Bits are those of the weights that are packed, with codebooks, scales and offsets; rows of one model pack the same
ones. "kept" is the score's share of FP32's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = Path(__file__).parents[1] / "samples" / "01_shapes"
sys.path.insert(0, str(SHAPES))

import evaluate  # noqa: E402
import generate  # noqa: E402
import judge as judging  # noqa: E402
import torch  # noqa: E402
from shapes import sample_scenes  # noqa: E402

import trimtab  # noqa: E402
from trimtab.calibration.codebook_plan import Settings  # noqa: E402
from trimtab.calibration.codebook_store import CodebookStore, read_index  # noqa: E402
from trimtab.calibration.draft import draft  # noqa: E402
from trimtab.calibration.kmeans import make_codebooks  # noqa: E402
from trimtab.calibration.trajectories import record  # noqa: E402
from trimtab.calibration.vq4dit import Training, calibrate  # noqa: E402
from trimtab.passes import vq_op  # noqa: E402
from trimtab.passes.codebooks import Codebooks  # noqa: E402
from trimtab.recipe import make_recipe  # noqa: E402
from trimtab.storage import read_program  # noqa: E402

MODELS = {"dit": SHAPES / "models" / "shapes-dit", "sd": SHAPES / "models" / "shapes-sd"}
STEPS = 25
BITS = 2
SEED = 4200

Rows = Mapping[str, np.ndarray]
"""Parameter -> its weight as rows (O, n)."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=1020)
    parser.add_argument("--rows", nargs="+", default=["fp32", "rounding", "k-means", "k-means+scale"])
    parser.add_argument("--rule", nargs="*", default=[], help="as `trimtab compile --vq-rule` takes it")
    parser.add_argument("--minutes", type=float, default=10, help="of processor time for every calibration")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = options.work / f"{options.model}.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for row in options.rows:
        name, _, store = row.partition("=")
        if any(d["row"] == name and d["pictures"] == options.pictures for d in done):
            continue
        start = time.process_time()
        weights, bits = _weights(name, store, options)
        score = _measure(options.model, weights, options.pictures)
        record = {"row": name, "pictures": options.pictures, "bits": bits, **score}
        record["cpu_seconds"] = round(time.process_time() - start)
        done.append(record)
        with results.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
    _show(options.model, done)


def _weights(row: str, store: str, options: argparse.Namespace) -> tuple[Rows, float]:
    """A row's weights and biases, and the bits of the packed ones."""
    model, work = options.model, options.work
    if row == "fp32":
        return {}, 32.0
    books = _stored(Path(store)) if store else _codebooks(options, row.endswith("+scale"))
    if row.startswith("rounding"):
        bits = int(row.partition("-")[2] or BITS)
        module = _denoiser(_pipeline(model))
        dense = {_parameter(name): module.get_parameter(_parameter(name)) for name in books.layers}
        weights = {name: _rounded(p.detach().numpy(), bits) for name, p in dense.items()}
        count = sum(w.size for w in weights.values())
        channels = sum(len(w) for w in weights.values())
        return weights, bits + 2 * 32 * channels / count
    if row.startswith("calibrated-"):
        candidates = int(row.partition("-")[2].partition("+")[0])
        books = _calibrated(model, work, books, Training(options.minutes, candidates))
    count = sum(len(layer.codes) * layer.columns for layer in books.layers.values())
    made = {_parameter(name): layer.rows() for name, layer in books.layers.items()}
    return made | dict(books.parameters), 8 * books.nbytes / count


def _calibrated(model: str, work: Path, books: Codebooks, training: Training) -> Codebooks:
    """Eight trajectories at a time, 25 steps each, with guidance: 16 rows an evaluation."""
    program = read_program(trimtab.load(work / f"{model}.bundle").bundle)
    with draft(program, work / f"{model}-draft", threads=1) as pipeline:
        if model == "dit":
            asked = [{"label": [n % 30 for n in range(8 * k, 8 * k + 8)]} for k in range(4)]
        else:
            captions = [s.caption for s in sample_scenes(77, 32)]
            asked = [{"prompt": captions[8 * k : 8 * k + 8]} for k in range(4)]
        samples = record(pipeline, [{**a, "seed": k, "schedule": STEPS} for k, a in enumerate(asked)])
    inputs = [sample.unguided for sample in samples]
    graph = program.segments["denoiser"].model
    return calibrate(graph, books, inputs, training, progress=print, clock=time.process_time)


def _codebooks(options: argparse.Namespace, scale: bool) -> Codebooks:
    model, work = options.model, options.work
    bundle = work / f"{model}.bundle"
    if not bundle.exists():
        trimtab.compile(MODELS[model], bundle, steps=(STEPS,))
    rules = make_recipe({"vq": BITS, "vq_rules": options.rule}).vq_rules
    segments = read_program(trimtab.load(bundle).bundle).segments
    store = work / f"{model}-k-means{'-scale' if scale else ''}"
    return make_codebooks(
        {"denoiser": segments["denoiser"].model}, Settings(BITS, rules, scale), store, threads=1
    )


def _stored(folder: Path) -> Codebooks:
    index = read_index(folder)
    store = CodebookStore(folder, index["fingerprint"], index["settings"])
    return Codebooks(index["fingerprint"], {name: store.get(name) for name in store.names()})


def _rounded(weight: np.ndarray, bits: int) -> np.ndarray:
    """Every output channel on evenly spaced levels, four for 2 bits, of the range that suits the channel best.

    The best of 20 ranges around the channel's middle, by squared error; each costs an offset and a step.
    """
    rows = vq_op.to_rows(weight)
    low, high = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
    middle, half = (low + high) / 2, (high - low) / 2
    best, least = rows, np.full((len(rows), 1), np.inf)
    for share in np.linspace(0.05, 1, 20):
        step = np.maximum(2 * share * half / (2**bits - 1), 1e-30)
        bottom = middle - share * half
        levels = np.clip(np.round((rows - bottom) / step), 0, 2**bits - 1)
        made = bottom + levels * step
        lost = np.square(made - rows).sum(1, keepdims=True)
        best, least = np.where(lost < least, made, best), np.minimum(lost, least)
    return best


def _parameter(initializer: str) -> str:
    return initializer.removesuffix(".T")


def _pipeline(model: str) -> Any:
    return generate.load_dit(MODELS[model]) if model == "dit" else generate.load_sd(MODELS[model])


def _denoiser(pipeline: Any) -> torch.nn.Module:
    return pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet


@torch.no_grad()
def _measure(model: str, weights: Rows, pictures: int) -> dict[str, float]:
    """Draws and judges."""
    pipeline, judge = _pipeline(model), judging.load()
    module = _denoiser(pipeline)
    for name, rows in weights.items():
        parameter = module.get_parameter(name)
        if rows.ndim == 1:
            parameter.copy_(torch.from_numpy(rows))
            continue
        made = vq_op.from_rows(rows, parameter.shape)
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(made)))
    if model == "dit":
        classes = [n % len(evaluate.CLASSES) for n in range(pictures)]
        made = generate.from_classes(pipeline, classes, STEPS, 3.0, SEED)
        score = evaluate.class_score(judge, made, classes)
    else:
        scenes = [s for count in (1, 2, 3) for s in sample_scenes(SEED + count, pictures // 3, count)]
        made = generate.from_captions(pipeline, [s.caption for s in scenes], STEPS, 5.0, SEED)
        score = judging.score(judge, made, scenes).overall
    return {"score": score.value, "error": score.error}


def _show(model: str, done: list[dict[str, Any]]) -> None:
    whole = next((d["score"] for d in done if d["row"] == "fp32"), float("nan"))
    print(f"{model}: {'attributes' if model == 'sd' else 'pictures'} that the judge finds as asked for")
    print(f"{'row':<28}{'pictures':>9}{'bits':>7}{'score, %':>16}{'kept, %':>9}")
    for d in done:
        score = f"{100 * d['score']:.1f} ± {100 * d['error']:.1f}"
        print(f"{d['row']:<28}{d['pictures']:>9}{d['bits']:>7.2f}{score:>16}{100 * d['score'] / whole:>9.1f}")


if __name__ == "__main__":
    main()
