"""Captioned pictures to train on: a folder of files, as latents noised to any time step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from trimtab.calibration.batches import Batch, batch_axes, stack
from trimtab.calibration.noising import Noising
from trimtab.calibration.trajectories import Array
from trimtab.errors import InputError
from trimtab.program import DENOISER, STATE
from trimtab.runtime.images import read_image
from trimtab.runtime.load import Pipeline

ENCODER = "vae_encoder"
"""The segment that pictures go through."""

METADATA = "metadata.jsonl"
"""A line for each picture: ``{"file_name": ..., "text": ...}``, as the ImageFolder of Hugging Face's datasets has it
(https://huggingface.co/docs/datasets/image_dataset)."""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def captioned(folder: Path) -> list[tuple[Path, str]]:
    """Pictures of a folder and their captions, by name: from `METADATA`, or from NAME.txt beside NAME.png.

    Raises:
        InputError: No such folder; no pictures; one without a caption; a line that cannot be read, or is not UTF-8.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: give one of pictures with captions")
    metadata = folder / METADATA
    if metadata.exists():
        pairs = [_line(metadata, number, line) for number, line in _lines(metadata) if line.strip()]
    else:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
        if bare := [path.name for path in files if not path.with_suffix(".txt").exists()]:
            raise InputError(
                f"{folder}: {len(bare)} of {len(files)} pictures have no caption, {bare[0]} first: write "
                f"{Path(bare[0]).stem}.txt beside it, or {METADATA}"
            )
        pairs = [(path, _text(path.with_suffix(".txt")).strip()) for path in files]
    if not pairs:
        raise InputError(f"{folder} holds no pictures ({', '.join(_SUFFIXES)}): give some, with captions")
    return sorted(pairs)


def _lines(metadata: Path) -> list[tuple[int, str]]:
    # JSON's texts may hold what else ends a line to Python, such as U+2028.
    return list(enumerate(_text(metadata).split("\n"), 1))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from None


def _line(metadata: Path, number: int, line: str) -> tuple[Path, str]:
    try:
        entry = json.loads(line)
        name, text = entry["file_name"], entry["text"]
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError("both must be text")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{metadata}, line {number}, is not {{"file_name": ..., "text": ...}} ({error}): mend it'
        ) from None
    return metadata.parent / name, text


class Pictures:
    """Batches of noised pictures: one time step of training at a time, uniformly, and fresh noise for every picture.

    Args:
        pipeline: Of the whole model; it encodes pictures and captions, once.
        model: Its denoiser with the sampler fused.
        noising: Of its scheduler.
        pairs: From `captioned`.

    Raises:
        InputError: The model takes no captions, or has no encoder; a picture cannot be read.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        model: ir.Model,
        noising: Noising,
        pairs: Sequence[tuple[Path, str]],
    ) -> None:
        check_takes_pictures(pipeline)
        self._noising, self._axes = noising, batch_axes(model)
        self._texts: dict[str, dict[str, Array]] = {}
        self._captions = [caption for _, caption in pairs]
        generator = np.random.default_rng(0)  # of the draws from the encoder's posterior
        latents = []
        for path, caption in pairs:
            if caption not in self._texts:
                self._texts[caption] = _conditioning(pipeline, caption)
            state = self._texts[caption][STATE]
            latents.append(_encoded(pipeline, path, state.shape[1:], generator))
        self._latents = np.concatenate(latents)
        digest = hashlib.sha256(json.dumps(self._captions).encode() + self._latents.tobytes())
        self.identity = f"{len(pairs)} pictures {digest.hexdigest()[:16]}"

    def of(self, seed: int, step: int, size: int) -> Batch:
        """See `trimtab.calibration.batches.Batches`."""
        generator = np.random.default_rng([seed, step])
        index = int(generator.integers(len(self._noising.timesteps)))
        chosen = generator.integers(len(self._captions), size=size)
        latents = self._latents[chosen]
        drawn = generator.standard_normal(latents.shape, np.float32)
        inputs = stack([self._texts[self._captions[i]] for i in chosen], self._axes)
        inputs[STATE] = np.zeros_like(inputs[STATE])
        inputs[STATE][0] = self._noising.noised(index, latents, drawn)
        inputs["timestep"] = np.asarray(self._noising.timesteps[index], inputs["timestep"].dtype)
        return Batch(inputs, self._noising.target(index, latents, drawn))


def check_takes_pictures(pipeline: Pipeline) -> None:
    """Raises InputError for a model that has no encoder, or no captions."""
    contents = pipeline.bundle.contents
    if ENCODER not in contents.segments:
        raise InputError(
            "this model has no encoder of pictures, so that data cannot be noised for it: train without data, on its "
            "own trajectories"
        )
    kinds = {spec.source.get("kind") for spec in contents.tasks[pipeline.tasks[0]].inputs}
    if "tokens" not in kinds or kinds & {"image", "mask", "control"}:
        raise InputError(
            "this model does not draw from a caption alone: train without data, on its trajectories"
        )


def _conditioning(pipeline: Pipeline, caption: str) -> dict[str, Array]:
    """What the denoiser reads for a caption, unguided; the first slot of the state is its sample."""
    request, plan, _ = pipeline.prepare(caption, guidance=1.0, seed=0)
    plan.begin(request)
    plan.steps[0].begin(request)
    (call,) = (call for call in plan.steps[0].calls if call.segment.startswith(DENOISER))
    inputs: Mapping[str, Array] = {name: np.array(array) for name, array in call.inputs.items()}
    weights = np.zeros_like(inputs["sample_weights"])
    weights[0] = 1.0
    return {**inputs, "sample_weights": weights}


def _encoded(pipeline: Pipeline, path: Path, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    """A picture's latents, (1, C, h, w) float32: one draw from the encoder's posterior."""
    latents = np.zeros(shape, np.float32)
    inputs = {
        "image": read_image(path, pipeline.bundle.contents.size, crop=True),
        "noise": generator.standard_normal(shape, np.float32),
    }
    pipeline.session(ENCODER).bind(inputs, {"latents": latents})()
    if not np.isfinite(latents).all():
        raise InputError(f"{path} is encoded to numbers that are not finite: leave it out")
    return latents
