"""Draws from a bundle with numpy, ONNX Runtime and tokenizers alone: what a runtime in any language has to do.

A schedule is a list of calls. A call runs a graph on tensors that have names, and names what comes out. There is no
sampler in here and no guidance: both are nodes of the denoiser's graph, and their numbers are constants of the steps.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from tokenizers import Tokenizer

Array = npt.NDArray[Any]

SLICE = re.compile(r"(.+)\[(\d+)\]")
"""``state[1]`` is a part of ``state``: the slots of the sampler are one tensor."""


class Bundle:
    """A bundle's tasks that start from noise, on the CPU.

    Args:
        folder: Of the bundle. Nothing is verified here: compare each file with its SHA-256 in bundle.json first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "bundle.json").read_bytes())
        self.segments = {segment["name"]: segment for segment in self.manifest["segments"]}
        self.tokenizers = {
            name: Tokenizer.from_file(str(folder / path))
            for name, path in self.manifest["tokenizers"].items()
        }
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}

    def draw(
        self,
        noise: Callable[[tuple[int, ...]], Array],
        *,
        prompt: str = "",
        negative: str = "",
        label: int = 0,
        guidance: float | None = None,
    ) -> Array:
        """One picture of the first task by its first schedule, at the native size: (height, width, 3) in 0..1.

        Args:
            noise: Gives standard normals of a shape, float32.
            prompt: What to draw, for a model that reads texts.
            negative: What not to draw.
            label: The class to draw, for a model that has classes.
            guidance: The guidance scale; None for the model's own.
        """
        task = self.manifest["tasks"][0]
        schedule = task["schedules"][0]
        width, height = self.manifest["size"]
        symbols = {"batch": 1, "width": width, "height": height}
        sources = {spec["source"]["kind"]: spec["source"] for spec in task["inputs"]}
        scale = task["guidance"] if guidance is None else guidance
        mix = sources["mix"]
        guided = bool(mix["classifier_free"]) and scale > mix.get("unguided", 1)
        weight = scale + 1 - mix.get("unguided", 1) if guided else 1
        texts = [negative, prompt] if guided else [prompt]

        def made(spec: dict[str, Any]) -> Any:
            source = spec["source"]
            kind = source["kind"]
            if kind in ("tokens", "token_mask"):
                if {"prefix", "suffix", "instruction", "lowercase"} & set(source):
                    raise SystemExit(f"{spec['name']}: this sample takes prompts as they are")
                encoded = self.tokenizers[source["tokenizer"]].encode_batch(texts)
                return [each.ids if kind == "tokens" else each.attention_mask for each in encoded]
            if kind == "label":
                return [source["null"], label] if guided else [label]
            if kind == "mix":
                return [1 - weight, weight] if guided else [1]
            if kind == "guidance":
                return scale
            if kind == "noise":
                return noise(tuple(size(dim, symbols) for dim in spec["shape"]))
            raise SystemExit(f"{spec['name']}: this sample makes no input of the kind {kind}")

        tensors: dict[str, Array] = {}
        for spec in task["inputs"]:  # in this order: it is that of the random numbers
            self._store(tensors, spec["name"], np.asarray(made(spec), spec["dtype"]))
        latent = tensors["state"].shape[1:]
        tensors["noise"] = np.zeros(latent, np.float32)  # for steps that draw none

        once = schedule.get("constants", {})
        for number in (*task["prologue"], *schedule["prologue"]):
            self._run(number, tensors, once)
        for step in schedule["steps"]:
            for name in step.get("draws", ()):
                tensors[name] = noise(latent)
            for number in step["calls"]:
                self._run(number, tensors, step["constants"])
        for number in self.manifest["epilogue"]:
            self._run(number, tensors, {})
        picture: Array = tensors[self.manifest["outputs"][0]["name"]][0]
        return picture

    def _run(self, number: int, tensors: dict[str, Array], constants: dict[str, list[float]]) -> None:
        """Makes a call: constants go before tensors of the same name."""
        call = self.manifest["calls"][number]
        segment = self.segments[call["segment"]]
        if segment["name"] not in self.sessions:
            path = self.folder / segment["graph"]
            self.sessions[segment["name"]] = onnxruntime.InferenceSession(str(path))
        feeds = {}
        for spec in segment["inputs"]:
            name = call["inputs"][spec["name"]]
            value = np.asarray(constants[name], spec["dtype"]) if name in constants else load(tensors, name)
            feeds[spec["name"]] = value if spec["shape"] else value.reshape(())
        names = [spec["name"] for spec in segment["outputs"]]
        for name, value in zip(names, self.sessions[segment["name"]].run(names, feeds), strict=True):
            self._store(tensors, call["outputs"][name], value)

    def _store(self, tensors: dict[str, Array], name: str, value: Array) -> None:
        if not (match := SLICE.fullmatch(name)):
            tensors[name] = value
            return
        if match[1] not in tensors:
            tensors[match[1]] = np.zeros((self.manifest["slots"], *value.shape), value.dtype)
        tensors[match[1]][int(match[2])] = value


def load(tensors: dict[str, Array], name: str) -> Array:
    """A tensor, or the slice of one."""
    match = SLICE.fullmatch(name)
    return np.asarray(tensors[match[1]][int(match[2])]) if match else tensors[name]


def size(dim: int | str, symbols: dict[str, int]) -> int:
    """A size of the start noise: a number, a symbol, or ``height//8``."""
    if isinstance(dim, int):
        return dim
    name, _, divisor = dim.partition("//")
    return symbols[name] // int(divisor or 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", default="")
    parser.add_argument("--negative", default="")
    parser.add_argument("--class", dest="label", type=int, default=0)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0, help="of numpy's generator: pictures are not torch's")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()

    from PIL import Image

    generator = np.random.default_rng(arguments.seed)
    picture = Bundle(arguments.bundle).draw(
        lambda shape: generator.standard_normal(shape, np.float32),
        prompt=arguments.prompt,
        negative=arguments.negative,
        label=arguments.label,
        guidance=arguments.guidance,
    )
    Image.fromarray(np.rint(picture * 255).astype(np.uint8)).save(arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
