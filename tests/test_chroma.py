"""Chroma, of which every token of a text counts, against diffusers: its tasks, and its model in diffusers' place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from chains import entries, whole
from PIL import Image

import trimtab
from trimtab.calibration.draft import draft
from trimtab.passes.time_tables import tabulate_times
from trimtab.runtime.load import load

PROMPTS = ["a Red cat", "two dogs, " * 20]
NEGATIVES = ["", "blue"]
SIZE = {"width": 80, "height": 64}

BundleFolder = Callable[[str], Path]
Pipelines = Callable[[str], Any]

pytestmark = pytest.mark.xdist_group("chroma")


def picture() -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 256, (64, 80, 3), np.uint8)
    return Image.fromarray(pixels)


def mask() -> Image.Image:
    pixels = np.zeros((64, 80), np.uint8)
    pixels[16:48, 8:40] = 255
    return Image.fromarray(pixels)


def of_diffusers(pipeline: Any, **given: Any) -> npt.NDArray[Any]:
    """Pictures of two prompts, in three steps."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "np", **SIZE}
    pictures: npt.NDArray[Any] = pipeline(
        PROMPTS,
        negative_prompt=NEGATIVES,
        generator=torch.Generator("cpu").manual_seed(4),
        **options,
        **given,
    ).images
    return pictures


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("text-to-image", {}),
        ("text-to-image", {"guidance": 0.5}),
        ("image-to-image", {}),
        ("image-to-image", {"strength": 0.5}),
        ("inpainting", {}),
    ],
)
def test_chroma_draws_what_diffusers_draws(
    task: str, given: dict[str, Any], bundle_folder: BundleFolder, diffusers_pipeline: Pipelines
) -> None:
    from diffusers import ChromaImg2ImgPipeline, ChromaInpaintPipeline

    pipeline = diffusers_pipeline("chroma")
    theirs = {"guidance_scale" if name == "guidance" else name: value for name, value in given.items()}
    if task != "text-to-image":
        other = ChromaImg2ImgPipeline if task == "image-to-image" else ChromaInpaintPipeline
        pipeline = other(**pipeline.components)
        theirs["image"] = picture()
        given = {**given, "image": picture()}
    if task == "inpainting":
        given["mask"] = theirs["mask_image"] = mask()
        theirs["max_sequence_length"] = 512  # as the others', and not 256
    expected = of_diffusers(pipeline, **theirs)
    assert expected.std() > 0.05, "a flat picture proves nothing"
    pipe = trimtab.load(bundle_folder("chroma"))
    found = pipe(PROMPTS, negative_prompt=NEGATIVES, seed=4, size=(80, 64), schedule=3, **given)
    np.testing.assert_allclose(found.pixels, expected, atol=5e-5)


def test_all_of_chroma_s_modulations_are_a_table(bundle_folder: BundleFolder, tmp_path: Path) -> None:
    folder = bundle_folder("chroma")
    program = tabulate_times(whole(folder))
    assert entries(program, "TabulateTimes") == [("denoiser", 1, 0)]
    graph = program.segments["denoiser"].model.graph
    left = {name for name in graph.initializers if name.startswith("distilled_guidance_layer")}
    assert left == {"distilled_guidance_layer.out_proj.bias"}
    with load(folder) as plain, draft(program, tmp_path / "draft") as ours:
        given: dict[str, Any] = {"prompt": PROMPTS, "seed": 1, "schedule": 3, "size": (64, 64)}
        np.testing.assert_allclose(ours(**given).pixels, plain(**given).pixels, atol=1e-5)


def test_a_compiled_chroma_takes_its_transformers_place(
    bundle_folder: BundleFolder, pipeline_folder: Callable[[str], Path]
) -> None:
    from diffusers import ChromaPipeline

    pipeline = ChromaPipeline.from_pretrained(pipeline_folder("chroma"))
    expected = of_diffusers(pipeline)
    pipeline.transformer = trimtab.Denoiser(bundle_folder("chroma"), pipeline.transformer)
    np.testing.assert_allclose(of_diffusers(pipeline), expected, atol=5e-5)
