"""Models that read a picture beside the sample: what they draw along it, in it or of it, against diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import made_once
from PIL import Image

import trimtab
from trimtab.cli import main
from trimtab.comparison import compare

PROMPT = "a red cat"
SIZE = {"width": 80, "height": 64}

BundleFolder = Callable[[str], Path]


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (64, 80, 3), np.uint8)
    return Image.fromarray(pixels)


def mask() -> Image.Image:
    pixels = np.zeros((64, 80), np.uint8)
    pixels[16:48, 8:41] = 255  # ends within a latent
    return Image.fromarray(pixels)


def of_diffusers(pipeline: Any, **given: Any) -> npt.NDArray[Any]:
    """Two pictures of one seed, in three steps."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(4)
    options: dict[str, Any] = {"num_inference_steps": 3, "num_images_per_prompt": 2, "output_type": "np"}
    as_given = ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLImg2ImgPipeline")
    if type(pipeline).__name__ not in as_given:  # they draw as large as their picture is
        options |= SIZE
    pictures: npt.NDArray[Any] = pipeline(prompt=PROMPT, generator=generator, **options, **given).images
    return pictures


def ours(pipe: trimtab.Pipeline, schedule: int = 3, **given: Any) -> npt.NDArray[Any]:
    return pipe(PROMPT, seed=4, count=2, size=(80, 64), schedule=schedule, **given).pixels


@pytest.mark.parametrize("family", ["flux_control"])
@pytest.mark.parametrize(
    ("task", "strength"),
    [
        ("text-to-image", None),
        ("image-to-image", 0.5),
        ("image-to-image", 1.0),
        ("inpainting", 0.5),
        ("inpainting", 1.0),
    ],
)
def test_flux_control_draws_along_a_picture_as_diffusers_does(
    task: str,
    strength: float | None,
    family: str,
    bundle_folder: BundleFolder,
    diffusers_pipeline: Callable[[str], Any],
) -> None:
    from diffusers import FluxControlImg2ImgPipeline, FluxControlInpaintPipeline

    pipeline, edges = diffusers_pipeline(family), picture(1)
    given: dict[str, Any] = {}
    theirs: dict[str, Any] = {"control_image": edges}
    if task != "text-to-image":
        other = FluxControlImg2ImgPipeline if task == "image-to-image" else FluxControlInpaintPipeline
        pipeline, given = other(**pipeline.components), {"image": picture(), "strength": strength}
    theirs |= given
    if task == "inpainting":
        given["mask"] = theirs["mask_image"] = mask()
    expected = of_diffusers(pipeline, **theirs)
    with trimtab.load(bundle_folder(family)) as pipe:
        assert pipe.tasks == ("text-to-image", "image-to-image", "inpainting")
        np.testing.assert_allclose(ours(pipe, control=edges, **given), expected, atol=1e-4)
        assert np.abs(ours(pipe, control=picture(2), **given) - expected).max() > 1e-3


@pytest.mark.parametrize("family", ["flux_control"])
def test_a_model_without_a_control_scale_refuses_one(family: str, bundle_folder: BundleFolder) -> None:
    with trimtab.load(bundle_folder(family)) as pipe:
        assert "control_scale" not in pipe(PROMPT, control=picture(), size=(64, 64), schedule=3).settings
        with pytest.raises(trimtab.TrimtabError, match="a control scale was given and this model has none"):
            pipe(PROMPT, control=picture(), control_scale=0.5)
        with pytest.raises(trimtab.TrimtabError, match="this model draws along a picture and none was given"):
            pipe(PROMPT)


@pytest.mark.parametrize("family", ["flux_fill"])
@pytest.mark.parametrize("strength", [None, 0.5])
def test_flux_fill_inpaints_as_diffusers_does_to_the_pixel_of_the_mask(
    strength: float | None, family: str, bundle_folder: BundleFolder, diffusers_pipeline: Callable[[str], Any]
) -> None:
    given: dict[str, Any] = {"image": picture()} | ({} if strength is None else {"strength": strength})
    expected = of_diffusers(diffusers_pipeline(family), mask_image=mask(), **given)
    with trimtab.load(bundle_folder(family)) as pipe:
        assert pipe.tasks == ("inpainting",)
        np.testing.assert_allclose(ours(pipe, mask=mask(), **given), expected, atol=2e-4)
        moved = Image.fromarray(np.roll(np.asarray(mask()), 1, axis=1))
        assert np.abs(ours(pipe, mask=moved, **given) - expected).max() > 1e-3


@pytest.mark.parametrize("family", ["flux_fill"])
def test_a_model_whose_steps_all_start_from_a_picture_can_switch_to_another(
    family: str,
    bundle_folder: BundleFolder,
    pipeline_folder: BundleFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = bundle_folder(family)
    trimtab.compile(pipeline_folder(family), tmp_path / "b", steps=(20, 3), switch=f"{whole}@0.5")
    given: dict[str, Any] = {"image": picture(), "mask": mask(), "strength": 0.9}
    with trimtab.load(tmp_path / "b") as pipe, trimtab.load(whole) as other:
        np.testing.assert_array_equal(ours(pipe, **given), ours(other, **given))
    assert main(["inspect", str(tmp_path / "b")]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["inpainting", "flow-euler-3", "1", f"denoiser-{whole.name}"] in shown


@pytest.mark.parametrize("family", ["taesd"])
def test_a_bundle_that_starts_from_pictures_alone_is_measured_by_all_its_steps(
    family: str, pipeline_folder: BundleFolder, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"tasks": "image-to-image", "targets": ("cpu", "orin-nano-8gb")}
    trimtab.compile(pipeline_folder(family), tmp_path / "b", steps=1, **options)  # 0.8 of which is none
    with trimtab.load(tmp_path / "b", target="cpu") as pipe:
        assert pipe.bundle.path("calibration/ranges.json").exists()
        assert ours(pipe, image=picture(), strength=1.0, schedule=1).shape == (2, 64, 80, 3)
    assert compare(tmp_path / "b", tmp_path / "b")["steps"] == [0.0]


@pytest.fixture(scope="module")
def editor(workshop: Path, pipeline_folder: BundleFolder) -> Iterator[Callable[[str], trimtab.Pipeline]]:
    """Family -> its bundle for editing, loaded."""
    pipes: dict[str, trimtab.Pipeline] = {}

    def loaded(family: str) -> trimtab.Pipeline:
        if family not in pipes:
            folder = made_once(
                workshop / "editing" / family,
                lambda folder: trimtab.compile(pipeline_folder(family), folder, steps=3, tasks="editing"),
            )
            pipes[family] = trimtab.load(folder)
        return pipes[family]

    yield loaded
    for pipe in pipes.values():
        pipe.close()


SLOW_EDITORS = [pytest.param(name, marks=pytest.mark.slow) for name in ("flux2", "pix2pix_xl")]


@pytest.mark.parametrize("family", ["flux_kontext", "pix2pix", *SLOW_EDITORS])
def test_a_picture_is_changed_as_diffusers_does_it(
    family: str, editor: Callable[[str], trimtab.Pipeline], diffusers_pipeline: Callable[[str], Any]
) -> None:
    whole = {"_auto_resize": False, "max_area": 80 * 64} if family == "flux_kontext" else {}
    expected = of_diffusers(diffusers_pipeline(family), image=picture(), **whole)
    pipe = editor(family)
    assert pipe.tasks == ("editing",)
    np.testing.assert_allclose(ours(pipe, image=picture()), expected, atol=1e-4)
    assert np.abs(ours(pipe, image=picture(1)) - expected).max() > 1e-3


@pytest.mark.parametrize("family", ["pix2pix", pytest.param("pix2pix_xl", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("guidance", "of_picture", "negative"),
    [(7.5, 1.0, None), (3.0, 2.5, "blue"), (1.0, 1.5, None)],
)
def test_text_and_picture_guide_as_in_diffusers(
    guidance: float,
    of_picture: float,
    negative: str | None,
    family: str,
    editor: Callable[[str], trimtab.Pipeline],
    diffusers_pipeline: Callable[[str], Any],
) -> None:
    given: dict[str, Any] = {"image": picture(), "negative_prompt": negative}
    theirs = given | {"guidance_scale": guidance, "image_guidance_scale": of_picture}
    expected = of_diffusers(diffusers_pipeline(family), **theirs)
    pipe = editor(family)
    drawn = ours(pipe, **given, guidance=guidance, image_guidance=of_picture)
    np.testing.assert_allclose(drawn, expected, atol=1e-4)
    assert np.abs(ours(pipe, **given) - expected).max() > 1e-3  # 7.5 and 1.5


@pytest.mark.parametrize(
    ("family", "scale", "reason"),
    [
        ("pix2pix", 0.5, "the image guidance scale 0.5 is below 1: give 1, which guides nothing, or more"),
        ("pix2pix", np.nan, "is not a finite number of 32 bits"),
        ("flux_kontext", 1.5, "this model has none, only InstructPix2Pix has: leave it out"),
    ],
)
def test_an_image_guidance_scale_that_does_not_fit_is_refused(
    family: str, scale: float, reason: str, editor: Callable[[str], trimtab.Pipeline]
) -> None:
    with pytest.raises(trimtab.TrimtabError, match=reason):
        editor(family)(PROMPT, image=picture(), image_guidance=scale)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl_refiner"])
@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("image-to-image", {"strength": 0.7}),
        ("image-to-image", {"guidance": 1.0, "strength": 1.0}),
        ("inpainting", {"negative_prompt": "blue", "strength": 0.7}),
    ],
)
def test_a_refiner_goes_on_from_pictures_as_in_diffusers(
    task: str,
    given: dict[str, Any],
    family: str,
    bundle_folder: BundleFolder,
    diffusers_pipeline: Callable[[str], Any],
) -> None:
    from diffusers import StableDiffusionXLInpaintPipeline

    pipeline = diffusers_pipeline(family)
    given = given | {"image": picture()}
    theirs = {"guidance_scale" if name == "guidance" else name: value for name, value in given.items()}
    if task == "inpainting":
        config = {
            name: pipeline.config[name]
            for name in ("requires_aesthetics_score", "force_zeros_for_empty_prompt")
        }
        pipeline = StableDiffusionXLInpaintPipeline(**pipeline.components, **config, add_watermarker=False)
        given["mask"] = theirs["mask_image"] = mask()
    expected = of_diffusers(pipeline, **theirs)
    with trimtab.load(bundle_folder(family)) as pipe:
        assert pipe.tasks == ("image-to-image", "inpainting")
        np.testing.assert_allclose(ours(pipe, **given), expected, atol=1e-4)
        with pytest.raises(trimtab.TrimtabError, match="needs a picture and none was given"):
            pipe(PROMPT)


@pytest.mark.parametrize("family", ["flux_kontext"])
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, r"needs a picture and none was given: give image= \(--image FILE\)"),
        ({"image": picture(), "strength": 0.5}, "a strength was given without a picture to start from"),
        ({"image": picture(), "mask": mask()}, "cannot do inpainting: it does editing"),
    ],
)
def test_what_does_not_fit_a_model_that_changes_pictures_is_refused(
    given: dict[str, Any], reason: str, family: str, editor: Callable[[str], trimtab.Pipeline]
) -> None:
    with pytest.raises(trimtab.TrimtabError, match=reason):
        editor(family)(PROMPT, **given)


@pytest.mark.parametrize("family", ["flux_fill"])
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "needs a picture and none was given"),
        ({"image": picture()}, r"inpaints, and no mask was given: give mask= \(--mask FILE\) too"),
        (
            {"image": picture(), "mask": mask(), "control_scale": 0.5},
            "a control scale was given and this model",
        ),
    ],
)
def test_what_inpainting_lacks_is_said_before_an_engine_is_loaded(
    given: dict[str, Any],
    reason: str,
    family: str,
    bundle_folder: BundleFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with trimtab.load(bundle_folder(family)) as pipe:
        monkeypatch.setattr(pipe.engines, "session", lambda _: pytest.fail("an engine is loaded"))
        with pytest.raises(trimtab.TrimtabError, match=reason):
            pipe(PROMPT, **given)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("flux_control", "hands over both as one"),
        ("flux_fill", "hands over all three as one"),
        ("flux_kontext", "puts behind the sample's"),
        ("pix2pix", "hands over a third row"),
    ],
)
def test_a_denoiser_that_reads_a_picture_is_no_drop_in(
    family: str, reason: str, editor: Callable[[str], trimtab.Pipeline], bundle_folder: BundleFolder
) -> None:
    edits = family in ("flux_kontext", "pix2pix")
    folder = editor(family).bundle.folder if edits else bundle_folder(family)
    original = torch.nn.Module()
    original.config = SimpleNamespace()
    with pytest.raises(trimtab.TrimtabError, match=reason):
        trimtab.Denoiser(folder, original)


@pytest.mark.parametrize("family", ["taesd"])
@pytest.mark.parametrize(
    ("tasks", "segments"),
    [
        (["text-to-image"], {"text_encoder", "denoiser", "vae_decoder"}),
        (["image-to-image"], {"text_encoder", "denoiser", "vae_decoder", "vae_encoder"}),
    ],
)
def test_a_bundle_for_some_tasks_has_what_they_need_and_draws_as_the_whole_one(
    tasks: list[str],
    segments: set[str],
    family: str,
    pipeline_folder: BundleFolder,
    bundle_folder: BundleFolder,
    tmp_path: Path,
) -> None:
    given = {} if tasks == ["text-to-image"] else {"image": picture()}
    trimtab.compile(pipeline_folder(family), tmp_path / "b", steps=3, tasks=tasks)
    with trimtab.load(tmp_path / "b") as pipe, trimtab.load(bundle_folder(family)) as whole:
        assert list(pipe.tasks) == tasks
        assert set(pipe.bundle.contents.segments) == segments
        np.testing.assert_array_equal(ours(pipe, **given), ours(whole, **given))
