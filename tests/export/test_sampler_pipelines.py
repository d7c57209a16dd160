"""Sampler tables against diffusers' pipelines themselves: text-to-image, image-to-image and inpainting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from trimtab.export.parts import Parts
from trimtab.export.sampler import SamplerTable, make_scheduler, probe, replay
from trimtab.export.sampler.schedules import Sampling, plan_tasks, probe_tasks
from trimtab.runtime.arguments import choose_schedule

SIZE = 12
SHAPE = (1, 4, SIZE, SIZE)
PIXELS = 8 * SIZE
STEPS = 5
STRENGTH = 0.61  # of 5 steps: 3 are run, 2 are left out
GUIDANCE = 3.0
SD = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "clip_sample": False,  # the pipelines set it so
}
NAMES = [
    "ddim",
    "ddpm",
    "pndm",
    "lms",
    "euler",
    "euler-ancestral",
    "heun",
    "dpm++",
    "unipc",
    "lcm",
    "kdpm2",
    "sasolver",
]


@pytest.fixture(scope="module")
def components() -> dict[str, Any]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIZE,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=4,
    )
    return {"unet": unet.eval(), "vae": vae.eval()}


class Setting:
    """One request, and the same request to a table."""

    def __init__(self, components: dict[str, Any], name: str) -> None:
        self.unet, self.vae = components["unet"], components["vae"]
        self.scheduler = make_scheduler(name, SD)
        random = torch.Generator().manual_seed(1)
        self.positive, self.negative = torch.randn((2, 1, 7, 8), generator=random)
        self.image = torch.randn(SHAPE, generator=random)

    def pipeline(self, pipeline_class: type, **options: Any) -> np.ndarray:
        pipeline = pipeline_class(
            vae=self.vae,
            unet=self.unet,
            scheduler=self.scheduler,
            text_encoder=None,
            tokenizer=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        latents = pipeline(
            prompt_embeds=self.positive,
            negative_prompt_embeds=self.negative,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(2),
            output_type="latent",
            **options,
        ).images
        return np.asarray(latents)

    def model(self, sample: np.ndarray, timestep: float) -> np.ndarray:
        with torch.no_grad():
            rows = torch.from_numpy(np.concatenate([sample] * 2))
            context = torch.cat([self.negative, self.positive])
            negative, positive = self.unet(rows, timestep, context).sample.numpy()[:, None]
        return (1 - GUIDANCE) * negative + GUIDANCE * positive

    def replay(
        self, table: SamplerTable, image: np.ndarray | None, mask: np.ndarray | None = None
    ) -> np.ndarray:
        generator = torch.Generator().manual_seed(2)
        count = 1 + sum(evaluation.draws for evaluation in table.evaluations)
        noise, *draws = (torch.randn(SHAPE, generator=generator).numpy() for _ in range(count))
        return replay(table, self.model, noise, draws, image, mask)


def agree(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() < 1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_text_to_image(components: dict[str, Any], name: str) -> None:
    setting = Setting(components, name)
    table = probe(setting.scheduler, STEPS)
    expected = setting.pipeline(StableDiffusionPipeline, height=PIXELS, width=PIXELS)
    assert agree(setting.replay(table, None), expected)


@pytest.mark.parametrize("name", NAMES)
def test_image_to_image(components: dict[str, Any], name: str) -> None:
    setting = Setting(components, name)
    table = probe(setting.scheduler, STEPS, start=2, from_image=True)
    expected = setting.pipeline(StableDiffusionImg2ImgPipeline, image=setting.image, strength=STRENGTH)
    assert agree(setting.replay(table, setting.image.numpy()), expected)


@pytest.mark.parametrize("strength", [STRENGTH, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_inpainting(components: dict[str, Any], name: str, strength: float) -> None:
    setting = Setting(components, name)
    later = {} if strength == 1.0 else {"start": 2, "from_image": True}
    table = probe(setting.scheduler, STEPS, keep_start=True, **later)
    mask = np.zeros((1, 1, SIZE, SIZE), np.float32)
    mask[..., 2:8, 3:11] = 1
    expected = setting.pipeline(
        StableDiffusionInpaintPipeline,
        image=setting.image,
        masked_image_latents=setting.image,  # unused by a model of 4 channels, and spares an encoder
        mask_image=torch.from_numpy(mask.repeat(8, -1).repeat(8, -2)),
        height=PIXELS,
        width=PIXELS,
        strength=strength,
    )
    assert agree(setting.replay(table, setting.image.numpy(), mask), expected)


@pytest.mark.xdist_group("pixart_alpha")
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "heun", "lcm"])
def test_pixart_of_one_step_decodes_what_the_scheduler_foresees(
    diffusers_pipeline: Callable[[str], Any], name: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = diffusers_pipeline("pixart_alpha")
    monkeypatch.setattr(pipeline, "scheduler", make_scheduler(name, SD | {"prediction_type": "epsilon"}))
    given: dict[str, Any] = {}
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    expected = pipeline(
        "a red cat",
        num_inference_steps=steps,
        guidance_scale=1.0,
        width=PIXELS,
        height=PIXELS,
        generator=torch.Generator().manual_seed(2),
        output_type="latent",
        use_resolution_binning=False,
    ).images.numpy()
    hook.remove()

    def model(sample: np.ndarray, timestep: float) -> np.ndarray:
        with torch.no_grad():
            told = given | {"timestep": torch.tensor([timestep])}
            prediction = pipeline.transformer(torch.from_numpy(sample), **told)[0]
        return np.asarray(prediction.chunk(2, dim=1)[0])

    parts = Parts("PixArtAlphaPipeline", lambda _, graph: graph, one_step_denoised=True)
    ((table,),) = (
        schedules.values()
        for schedules in probe_tasks(parts, Sampling(pipeline.scheduler, (steps,), {"eta": 0.0})).values()
    )
    generator = torch.Generator().manual_seed(2)
    count = 1 + sum(evaluation.draws for evaluation in table.evaluations)
    noise, *draws = (torch.randn(SHAPE, generator=generator).numpy() for _ in range(count))
    assert agree(replay(table, model, noise, draws), expected)


def test_a_scheduler_that_foresees_nothing_gives_its_next_sample() -> None:
    scheduler = make_scheduler("dpm++", SD)
    assert probe(scheduler, 1, denoised=True) == probe(scheduler, 1)


@pytest.mark.parametrize("rounds_up", [True, False])
@pytest.mark.parametrize("steps", [51, 75])
def test_a_long_loop_starts_where_the_default_strength_and_every_twentieth_would(
    steps: int, rounds_up: bool
) -> None:
    # SDXL's default for inpainting is no twentieth, and SD3 rounds up.
    parts = Parts("", lambda _, graph: graph, strength={"inpainting": 0.9999}, strength_rounds_up=rounds_up)
    sampling = Sampling(make_scheduler("euler", SD), (steps,), {})
    task = plan_tasks(parts, probe_tasks(parts, sampling))[0]["inpainting"]
    for strength in (None, *(twentieth / 20 for twentieth in range(1, 21))):
        assert choose_schedule([f"euler-{steps}"], task, None, strength) in task.schedules
