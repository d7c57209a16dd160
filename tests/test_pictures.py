"""End to end: a bundle's pictures against the diffusers pipeline that it was compiled from, seed for seed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import trimtab
from trimtab.bundle import open_bundle, write_manifest

TOLERANCE = 1e-3
"""On a 0..1 scale. Measured: 4e-6 and less."""

STEPS = 20
TEXT = (
    "sd15",
    pytest.param("sd21_v", marks=pytest.mark.slow),
    "sdxl",
    "sd3",
    "pixart_sigma",
    pytest.param("pixart_alpha", marks=pytest.mark.slow),
    "sana",
    "sana_sprint",
    "flux",
    "z_image",
    "lcm",
    "dreamlite",
    # Its text encoder has 28 layers at the least, which take half a minute to trace; see test_transformer_modules too.
    pytest.param("flux2", marks=pytest.mark.slow),
)
ONE_AT_A_TIME = ("dreamlite",)
"""Whose pipeline draws one picture at a time: it has the size conditions of two rows, for any number of them."""

WITH_NEGATIVE = ("sd15", "sdxl", "sd3", "pixart_sigma", "sana", "z_image")
UNGUIDED = {"z_image": 0.0}
"""Guidance scale that changes nothing, where it is not 1."""
FROM_PICTURE = ("sd15", "lcm", "taesd", "sdxl", "sd3", "flux", "z_image")
INPAINTING = ("sd15", "taesd", "sdxl", "inpaint9", "sd3", "flux", "z_image")
PROMPT = "a red cat"

Load = Callable[[str], trimtab.Pipeline]


@pytest.fixture(scope="module")
def load(bundle_folder: Callable[[str], Path]) -> Load:
    pipes: dict[str, trimtab.Pipeline] = {}

    def loaded(family: str) -> trimtab.Pipeline:
        if family not in pipes:
            pipes[family] = trimtab.load(bundle_folder(family))
        return pipes[family]

    return loaded


def reference(pipeline: Any, seed: int, **options: Any) -> np.ndarray:
    """What diffusers draws."""
    generator = torch.Generator("cpu").manual_seed(seed)
    if type(pipeline).__name__.startswith(("PixArt", "Sana")):
        options["use_resolution_binning"] = False
    if type(pipeline).__name__ == "SanaSprintPipeline":
        options["intermediate_timesteps"] = None  # which is for two steps
    return pipeline(num_inference_steps=STEPS, generator=generator, output_type="np", **options).images


def assert_equal(ours: trimtab.Result, theirs: np.ndarray) -> None:
    assert ours.pixels.shape == theirs.shape
    assert theirs.std() > 0.05, "a flat picture proves nothing"
    assert np.abs(ours.pixels - theirs).max() <= TOLERANCE


@pytest.mark.parametrize("family", TEXT)
def test_text_to_image_equals_diffusers(family: str, load: Load, diffusers_pipeline: Any) -> None:
    ours = load(family)(PROMPT, seed=0, size=(64, 64))
    assert_equal(ours, reference(diffusers_pipeline(family), 0, prompt=PROMPT, width=64, height=64))


@pytest.mark.parametrize(
    "family", ["dreamlite_mobile", *(family for family in TEXT if family not in ONE_AT_A_TIME)]
)
def test_a_batch_at_a_size_never_seen_at_export_equals_diffusers(
    family: str, load: Load, diffusers_pipeline: Any
) -> None:
    width, height = (96, 128) if family.startswith("sana") else (80, 96)  # its pipeline wants multiples of 32
    ours = load(family)(PROMPT, seed=5, count=3, size=(width, height))
    theirs = reference(
        diffusers_pipeline(family), 5, prompt=PROMPT, width=width, height=height, num_images_per_prompt=3
    )
    assert_equal(ours, theirs)


@pytest.mark.parametrize("family", ONE_AT_A_TIME)
def test_a_batch_of_several_prompts_is_what_diffusers_draws_one_at_a_time(
    family: str, load: Load, diffusers_pipeline: Any
) -> None:
    prompts = [PROMPT, "two dogs of which one is far longer than the other"]
    ours = load(family)(prompts, seed=[7, 8], size=(64, 64))
    singles = [
        reference(diffusers_pipeline(family), seed, prompt=prompt, width=64, height=64)
        for seed, prompt in zip((7, 8), prompts, strict=True)
    ]
    assert_equal(ours, np.concatenate(singles))


@pytest.mark.parametrize("family", ["dreamlite"])
def test_a_guidance_towards_the_negative_prompt_equals_diffusers_where_it_is_no_end_of_guidance(
    family: str, load: Load, diffusers_pipeline: Any
) -> None:
    asked: dict[str, Any] = {"negative_prompt": "dog"}
    ours = load(family)(PROMPT, seed=1, size=(64, 64), guidance=-1.0, **asked)
    theirs = reference(
        diffusers_pipeline(family), 1, prompt=PROMPT, guidance_scale=-1.0, width=64, height=64, **asked
    )
    assert_equal(ours, theirs)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "dreamlite"])
def test_a_latent_size_that_does_not_halve_equals_diffusers(
    family: str, load: Load, diffusers_pipeline: Any
) -> None:
    ours = load(family)(PROMPT, seed=5, size=(72, 40))
    assert_equal(ours, reference(diffusers_pipeline(family), 5, prompt=PROMPT, width=72, height=40))


@pytest.mark.parametrize("family", WITH_NEGATIVE)
def test_a_negative_prompt_equals_diffusers(family: str, load: Load, diffusers_pipeline: Any) -> None:
    ours = load(family)(PROMPT, negative_prompt="dog", seed=1, size=(64, 64), guidance=3.0)
    theirs = reference(
        diffusers_pipeline(family),
        1,
        prompt=PROMPT,
        negative_prompt="dog",
        guidance_scale=3.0,
        width=64,
        height=64,
    )
    assert_equal(ours, theirs)


@pytest.mark.parametrize("family", ["pixart_sigma", "sana", "z_image", "dreamlite"])
def test_texts_have_as_many_tokens_as_the_longest_of_them_needs_and_equal_diffusers(
    family: str, load: Load, diffusers_pipeline: Any
) -> None:
    pipe, negative = load(family), "a dog that is far longer than any cat could ever be, even a long one"
    asked: dict[str, Any] = {"seed": 1, "size": (64, 64), "guidance": 3.0}
    found = {}
    for name, given in {"": {}, "negative": {"negative_prompt": negative}}.items():
        ours = pipe(PROMPT, **given, **asked)
        _, plan, _ = pipe.prepare(PROMPT, **given, **asked)
        found[name] = plan.buffers["tokens"].shape[1]
        theirs = reference(
            diffusers_pipeline(family), 1, prompt=PROMPT, width=64, height=64, guidance_scale=3.0, **given
        )
        assert_equal(ours, theirs)
    most = next(spec.source["length"] for spec in plan.inputs if spec.name == "tokens")
    assert found[""] < found["negative"] < most


@pytest.mark.parametrize("family", ["sdxl"])
def test_an_empty_negative_prompt_is_not_an_absent_one(
    family: str, load: Load, diffusers_pipeline: Any
) -> None:
    absent = load(family)(PROMPT, seed=1)
    empty = load(family)(PROMPT, negative_prompt="", seed=1)
    assert_equal(
        empty,
        reference(diffusers_pipeline(family), 1, prompt=PROMPT, negative_prompt="", width=64, height=64),
    )
    assert not np.array_equal(absent.pixels, empty.pixels)


@pytest.mark.parametrize("family", TEXT)
def test_a_guidance_that_changes_nothing_runs_one_row_and_equals_diffusers(
    family: str, load: Load, diffusers_pipeline: Any
) -> None:
    pipe, scale = load(family), UNGUIDED.get(family, 1.0)
    ours = pipe(PROMPT, seed=2, guidance=scale, size=(64, 64))
    _, plan, _ = pipe.prepare(PROMPT, seed=2, guidance=scale, size=(64, 64))
    assert plan.buffers["mix"].shape == (1,)
    theirs = reference(
        diffusers_pipeline(family), 2, prompt=PROMPT, guidance_scale=scale, width=64, height=64
    )
    assert_equal(ours, theirs)


@pytest.mark.parametrize("family", ["sd15", "flux", "z_image", "dreamlite"])
def test_a_prompt_that_is_too_long_is_cut_with_a_warning_and_equals_diffusers(
    family: str, load: Load, diffusers_pipeline: Any, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "abc " * 160
    ours = load(family)(prompt, seed=3, size=(64, 64))
    assert "was cut" in caplog.text
    assert_equal(ours, reference(diffusers_pipeline(family), 3, prompt=prompt, width=64, height=64))


@pytest.mark.parametrize("family", ["sd15"])
def test_several_prompts_each_with_a_seed_of_its_own_equal_diffusers(
    family: str, load: Load, diffusers_pipeline: Any
) -> None:
    prompts = ["a red cat", "two dogs"]
    ours = load(family)(prompts, seed=[7, 8])
    theirs = diffusers_pipeline(family)(
        prompts,
        num_inference_steps=STEPS,
        generator=[torch.Generator("cpu").manual_seed(s) for s in (7, 8)],
        output_type="np",
    ).images
    assert_equal(ours, theirs)


@pytest.mark.parametrize("family", ["sd15"])
def test_another_number_of_steps_in_the_same_bundle_equals_diffusers(
    family: str, load: Load, diffusers_pipeline: Any
) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    theirs = diffusers_pipeline(family)(
        PROMPT, num_inference_steps=3, generator=generator, output_type="np"
    ).images
    assert_equal(load(family)(PROMPT, seed=0, schedule=3), theirs)


def picture() -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    return Image.fromarray(pixels)


def mask() -> Image.Image:
    pixels = np.zeros((64, 64), np.uint8)
    pixels[16:48, 8:40] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("family", FROM_PICTURE)
@pytest.mark.parametrize("strength", [None, 0.55, 1.0])
def test_image_to_image_equals_diffusers(
    family: str, strength: float | None, load: Load, diffusers_pipeline: Any
) -> None:
    from diffusers import AutoPipelineForImage2Image

    pipeline = AutoPipelineForImage2Image.from_pipe(diffusers_pipeline(family))
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {} if strength is None else {"strength": strength}
    sizes = {"width": 64, "height": 64} if family in ("sd3", "flux", "z_image") else {}
    ours = load(family)(PROMPT, seed=4, image=picture(), size=(64, 64), **options)
    assert_equal(ours, reference(pipeline, 4, prompt=PROMPT, image=picture(), **options, **sizes))


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_pictures_from_one_picture_each_with_a_seed_of_its_own_equal_diffusers(
    family: str, load: Load, diffusers_pipeline: Any
) -> None:
    from diffusers import AutoPipelineForImage2Image

    pipeline = AutoPipelineForImage2Image.from_pipe(diffusers_pipeline(family))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        ["a red cat", "two dogs"],
        image=[picture()],
        num_inference_steps=STEPS,
        generator=[torch.Generator("cpu").manual_seed(s) for s in (7, 8)],
        output_type="np",
        **({"width": 64, "height": 64} if family == "flux" else {}),
    ).images
    assert_equal(load(family)(["a red cat", "two dogs"], seed=[7, 8], image=picture(), size=(64, 64)), theirs)


def mend_shift(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' inpainting pipeline of SD3 takes the shift from what it encodes, and does not put it back."""
    vae = pipeline.vae
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, **options: decode(z + vae.config.shift_factor, **options))


@pytest.mark.parametrize("family", INPAINTING)
@pytest.mark.parametrize("strength", [None, 0.55, 1.0])
def test_inpainting_equals_diffusers(
    family: str,
    strength: float | None,
    load: Load,
    diffusers_pipeline: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusers import AutoPipelineForInpainting

    pipeline = AutoPipelineForInpainting.from_pipe(diffusers_pipeline(family))
    pipeline.set_progress_bar_config(disable=True)
    if family == "sd3":
        mend_shift(pipeline, monkeypatch)
    options: dict[str, Any] = {} if strength is None else {"strength": strength}
    ours = load(family)(PROMPT, seed=4, count=2, image=picture(), mask=mask(), size=(64, 64), **options)
    theirs = reference(
        pipeline,
        4,
        prompt=PROMPT,
        image=picture(),
        mask_image=mask(),
        num_images_per_prompt=2,
        width=64,
        height=64,
        **options,
    )
    assert_equal(ours, theirs)


@pytest.mark.parametrize("family", ["controlnet", pytest.param("controlnet_xl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", ["text-to-image", "image-to-image", "inpainting"])
def test_a_picture_drawn_along_another_equals_diffusers(
    task: str, family: str, load: Load, diffusers_pipeline: Any
) -> None:
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    pipeline, control = diffusers_pipeline(family), Image.fromarray(np.asarray(picture())[::-1])
    given: dict[str, Any] = {}
    theirs: dict[str, Any] = {"image": control}
    if task != "text-to-image":
        other = AutoPipelineForImage2Image if task == "image-to-image" else AutoPipelineForInpainting
        pipeline, given = other.from_pipe(pipeline), {"image": picture()}
        pipeline.set_progress_bar_config(disable=True)
        theirs = {**given, "control_image": control}
    if task == "inpainting":
        given["mask"] = theirs["mask_image"] = mask()
    asked: dict[str, Any] = {"seed": 4, "count": 2, "size": (80, 64), "schedule": 3, **given}
    expected = pipeline(
        PROMPT,
        **theirs,
        controlnet_conditioning_scale=0.5,
        num_images_per_prompt=2,
        width=80,
        height=64,
        num_inference_steps=3,
        generator=torch.Generator("cpu").manual_seed(4),
        output_type="np",
    ).images
    ours = load(family)(PROMPT, control=control, control_scale=0.5, **asked)
    np.testing.assert_allclose(ours.pixels, expected, atol=1e-5)
    assert ours.settings["control_scale"] == 0.5
    for changed in ({"control": picture()}, {"control": control, "control_scale": 1.0}):
        assert np.abs(load(family)(PROMPT, **changed, **asked).pixels - expected).max() > 1e-4


@pytest.mark.parametrize("family", ["controlnet"])
def test_what_is_drawn_along_is_needed_where_it_counts_and_refused_elsewhere(
    family: str, load: Load, bundle_folder: Callable[[str], Path], diffusers_pipeline: Any
) -> None:
    pipe = load(family)
    with pytest.raises(
        trimtab.TrimtabError, match=r"draws along a picture .* give control= \(--control FILE\)"
    ):
        pipe(PROMPT, seed=1)
    with pytest.raises(trimtab.TrimtabError, match="the control scale inf is not a finite number"):
        pipe(PROMPT, seed=1, control=picture(), control_scale=float("inf"))
    with pytest.raises(trimtab.TrimtabError, match="diffusers runs them one after the other"):
        trimtab.Denoiser(bundle_folder(family), diffusers_pipeline(family).unet)


@pytest.mark.parametrize("family", ["dit"])
@pytest.mark.parametrize("given", [{"control": "edges.png"}, {"control_scale": 0.5}])
def test_a_picture_to_draw_along_is_refused_by_a_model_without_a_controlnet(
    family: str, given: dict[str, Any], load: Load
) -> None:
    with pytest.raises(trimtab.TrimtabError, match="this model draws along no picture"):
        load(family)(label=1, **given)


@pytest.mark.parametrize("family", ["dit"])
def test_threads_that_share_a_pipeline_draw_their_own_pictures(family: str, load: Load) -> None:
    pipe, seeds = load(family), (1, 2, 3, 4)

    def draw(seed: int) -> Any:
        return pipe(label=1, seed=seed, schedule=3).pixels

    alone = [draw(seed) for seed in seeds]
    with ThreadPoolExecutor(len(seeds)) as pool:
        for found, expected in zip(pool.map(draw, seeds), alone, strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("family", ["dit"])
def test_a_picture_within_a_picture_is_refused_and_the_next_one_is_right(family: str, load: Load) -> None:
    pipe = load(family)
    alone = pipe(label=1, seed=1, schedule=3).pixels
    with pytest.raises(trimtab.TrimtabError, match="from within on_step"):
        pipe(label=1, seed=1, schedule=3, on_step=lambda *_: pipe(label=2, seed=2, schedule=3))
    np.testing.assert_array_equal(pipe(label=1, seed=1, schedule=3).pixels, alone)


@pytest.mark.parametrize("family", ["dit"])
def test_class_to_image_equals_diffusers(family: str, load: Load, diffusers_pipeline: Any) -> None:
    assert_equal(
        load(family)(label=[3, 5], seed=1), reference(diffusers_pipeline(family), 1, class_labels=[3, 5])
    )


@pytest.mark.parametrize("family", ["ddpm", "ddim"])
def test_unconditional_pictures_equal_diffusers(family: str, load: Load, diffusers_pipeline: Any) -> None:
    assert_equal(load(family)(seed=1, count=2), reference(diffusers_pipeline(family), 1, batch_size=2))


@pytest.mark.parametrize("family", ["ddpm"])
def test_a_pixel_model_at_another_size_runs(family: str, load: Load) -> None:
    assert load(family)(seed=1, size=(24, 32)).pixels.shape == (1, 32, 24, 3)


@pytest.mark.parametrize(
    "family",
    [
        *("sd15", "sdxl", "sd3", "flux", "dit", "ddpm", "pixart_sigma", "sana"),
        pytest.param("flux2", marks=pytest.mark.slow),
    ],
)
def test_the_compiled_denoiser_takes_the_torch_one_s_place(
    family: str, bundle_folder: Callable[[str], Path], pipeline_folder: Callable[[str], Path]
) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder(family))
    pipeline.set_progress_bar_config(disable=True)
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    options: dict[str, Any] = {"prompt": PROMPT, "width": 64, "height": 64}
    if family == "dit":
        options = {"class_labels": [3]}
    elif family == "ddpm":
        options = {}
    theirs = reference(pipeline, 1, **options)
    setattr(pipeline, name, trimtab.Denoiser(bundle_folder(family), getattr(pipeline, name)))
    ours = reference(pipeline, 1, **options)
    assert np.abs(ours - theirs).max() <= TOLERANCE


@pytest.mark.parametrize("family", ["dit"])
def test_a_model_that_predicts_as_many_channels_as_it_takes_need_not_say_how_many(
    family: str, bundle_folder: Callable[[str], Path]
) -> None:
    original = torch.nn.Module()
    original.config = SimpleNamespace(out_channels=None)  # diffusers' default for DiT
    denoiser = trimtab.Denoiser(bundle_folder(family), original)
    sample = torch.zeros(2, 4, 8, 8)
    assert denoiser(sample, 5, class_labels=torch.tensor([1, 2])).sample.shape == sample.shape


@pytest.mark.parametrize("family", ["dit"])
def test_a_compiled_denoiser_takes_the_engine_that_was_built_for_the_latents_it_is_given(
    family: str, copied_bundle: Path
) -> None:
    contents = open_bundle(copied_bundle).contents
    denoiser, decoder = (contents.segments[name].engines[0] for name in ("denoiser", "vae_decoder"))
    engines = (  # of which only the second is a denoiser
        replace(decoder, shapes={"state": (contents.slots, 2, 4, 16, 16)}),
        replace(denoiser, shapes={"state": (contents.slots, 2, 4, 8, 8)}),
    )
    segment = replace(contents.segments["denoiser"], engines=engines)
    write_manifest(copied_bundle, replace(contents, segments={**contents.segments, segment.name: segment}))
    original = torch.nn.Module()
    original.config = SimpleNamespace(out_channels=4)
    ours = trimtab.Denoiser(copied_bundle, original)
    labels = {"class_labels": torch.tensor([1, 2])}
    assert ours(torch.zeros(2, 4, 8, 8), 5, **labels).sample.shape == (2, 4, 8, 8)
    with pytest.raises(trimtab.TrimtabError, match=r"take state of .* ask for a size that they were built"):
        ours(torch.zeros(1, 4, 8, 8), 5, class_labels=torch.tensor([1]))


@pytest.mark.parametrize("family", ["sd15"])
def test_what_a_compiled_denoiser_cannot_heed_is_refused(
    family: str, bundle_folder: Callable[[str], Path], diffusers_pipeline: Any
) -> None:
    denoiser = trimtab.Denoiser(bundle_folder(family), diffusers_pipeline(family).unet)
    sample, hidden = torch.zeros(2, 4, 8, 8), torch.zeros(2, 5, 16)
    assert denoiser(sample, 5, hidden, cross_attention_kwargs=None).sample.shape == sample.shape
    with pytest.raises(trimtab.TrimtabError, match="mid_block_additional_residual was given"):
        denoiser(sample, 5, hidden, mid_block_additional_residual=sample)
    with pytest.raises(trimtab.TrimtabError, match="encoder_hidden_states with 8 along axis 2, 16 needed"):
        denoiser(sample, 5, hidden[..., :8])
    with pytest.raises(trimtab.TrimtabError, match="2 different time steps were given"):
        denoiser(sample, torch.tensor([5, 6]), hidden)
    ids = torch.tensor([[64, 64, 0, 8, 64, 64]] * 2)
    with pytest.raises(trimtab.TrimtabError, match="crops_coords_top_left"):
        denoiser(sample, 5, hidden, added_cond_kwargs={"time_ids": ids})


@pytest.mark.parametrize(
    ("family", "reason"),
    [("sana_sprint", "TrigFlow"), ("z_image", "a list of them"), ("dreamlite", "hands over both halves")],
)
def test_a_denoiser_that_its_pipeline_drives_otherwise_is_no_drop_in(
    family: str, reason: str, bundle_folder: Callable[[str], Path], diffusers_pipeline: Any
) -> None:
    pipeline = diffusers_pipeline(family)
    original = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    with pytest.raises(trimtab.TrimtabError, match=reason):
        trimtab.Denoiser(bundle_folder(family), original)


@pytest.mark.parametrize("family", ["lcm"])
def test_a_denoiser_that_reads_the_guidance_scale_is_no_drop_in(
    family: str, bundle_folder: Callable[[str], Path], diffusers_pipeline: Any
) -> None:
    with pytest.raises(trimtab.TrimtabError, match="guidance scale"):
        trimtab.Denoiser(bundle_folder(family), diffusers_pipeline(family).unet)
