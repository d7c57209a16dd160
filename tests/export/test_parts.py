"""What a pipeline can be asked for: tasks that start from pictures, autoencoders, channels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    SD3Transformer2DModel,
    TCDScheduler,
)
from diffusers.models.embeddings import LabelEmbedding
from graphs import run
from tiny import clip_text, clip_tokenizer, unet

from trimtab.errors import ExportError, InputError
from trimtab.export.examples import (
    halving_example,
    odd_latent,
    patched_example,
    sample_example,
    timestep_example,
)
from trimtab.export.parts import Parts, PipelineParts
from trimtab.export.pipeline import _no_pictures, _own_scheduler, _warn_of_scaling
from trimtab.export.sampler import make_scheduler, probe
from trimtab.export.sampler.schedules import Sampling, probe_tasks
from trimtab.export.sizes import latent_space, measure
from trimtab.export.source import Source
from trimtab.export.trace import Example, trace
from trimtab.export.transformer_pipelines import class_labels, stable_diffusion_3
from trimtab.export.unet_modules import ConditionalUNet
from trimtab.export.unet_pipelines import stable_diffusion, stable_diffusion_xl, unconditional
from trimtab.program import TensorSpec
from trimtab.runtime.inputs import Noise, Request, make_input

SCALING = {"lms", "euler", "euler-ancestral", "heun", "kdpm2", "kdpm2-ancestral"}

PROJECTING = "CLIPTextModelWithProjection"
SD3_TRANSFORMER: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 32,
}
STRENGTH = {"image-to-image": 0.8, "inpainting": 1.0}


def with_vae(folder: Path, name: str, **config: Any) -> Source:
    """A pipeline with an autoencoder of a class."""
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", name]}
    (folder / "vae").mkdir(exist_ok=True)
    (folder / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [8, 8]} | config))
    (folder / "model_index.json").write_text(json.dumps(index))
    return Source(folder)


def parts(no_pictures: str | None, inpainting: bool = False) -> Parts:
    return Parts("x", lambda _, graph: graph, no_pictures=no_pictures, inpainting_channels=inpainting)


def test_a_scheduler_that_adds_no_noise_only_leaves_out_the_tasks_that_start_from_pictures(
    tmp_path: Path,
) -> None:
    source = with_vae(tmp_path, "AutoencoderKL")
    for scheduler in (DDIMScheduler(), EulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler()):
        assert _no_pictures(source, scheduler) is None
    reason = _no_pictures(source, IPNDMScheduler())
    assert reason == "IPNDMScheduler adds no noise to a picture"
    made, whole = parts(reason), parts(None)
    made.start_from_pictures(STRENGTH)
    whole.start_from_pictures(STRENGTH)
    assert made.strength == {} and whole.strength == STRENGTH
    with pytest.raises(ExportError, match="for inpainting, and IPNDMScheduler adds no noise"):
        parts(reason, inpainting=True).start_from_pictures(STRENGTH)


def test_a_denoiser_that_reads_a_picture_needs_an_autoencoder_for_such(tmp_path: Path) -> None:
    made = PipelineParts(with_vae(tmp_path, "AutoencoderKL", in_channels=4), lambda _, graph: graph)
    with pytest.raises(
        ExportError, match=r"the denoiser reads a picture, and the autoencoder reads .* of 4 channels"
    ):
        made.look_at_picture()


@pytest.mark.parametrize(
    ("pipeline", "found", "clips"),
    [
        ("DDIMPipeline", "DDIMScheduler", True),
        ("DDPMPipeline", "DDPMScheduler", True),
        ("LatentConsistencyModelPipeline", "DDPMScheduler", True),
        ("StableDiffusionControlNetPipeline", "DDPMScheduler", True),
        ("StableDiffusionInstructPix2PixPipeline", "DDPMScheduler", True),
        ("StableDiffusionPipeline", "DDPMScheduler", False),
    ],
)
def test_a_scheduler_is_changed_as_its_pipeline_changes_it(
    pipeline: str, found: str, clips: bool, tmp_path: Path
) -> None:
    DDPMScheduler(clip_sample=True).save_pretrained(tmp_path / "scheduler")
    index: dict[str, Any] = {"_class_name": pipeline, "scheduler": ["diffusers", "DDPMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    scheduler = _own_scheduler(Source(tmp_path))
    assert type(scheduler).__name__ == found and scheduler.config.clip_sample is clips


@pytest.mark.parametrize("classes", [10, 1000])
def test_the_null_class_is_the_one_that_the_model_was_trained_with(classes: int) -> None:
    table = LabelEmbedding(classes, 1, dropout_prob=0.1)
    dropped = table.token_drop(torch.tensor([3]), force_drop_ids=np.ones(1))
    spec = class_labels(classes, {})
    assert spec.source["null"] == int(dropped) == len(table.embedding_table.weight) - 1
    request = Request(batch=1, rows=2, size=(8, 8), noise=Noise((0,)), labels=(classes - 1,))
    assert make_input(spec, request).tolist() == [classes, classes - 1]


def test_the_null_class_of_a_larger_table_is_the_one_that_diffusers_pipeline_writes() -> None:
    assert class_labels(2000, {}).source["null"] == 1000


@pytest.mark.parametrize(
    "name", [*sorted(SCALING), "ddim", "ddpm", "dpm++", "unipc", "pndm", "deis", "sasolver"]
)
def test_where_a_pipeline_leaves_a_scheduler_s_scaling_out_a_warning_says_so(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = make_scheduler(name, {**DDIMScheduler().config, "_class_name": "DDIMScheduler"})
    scheduler.set_timesteps(4)
    sample = torch.ones(1, 1, 1, 1)
    scaled = scheduler.init_noise_sigma * scheduler.scale_model_input(sample, scheduler.timesteps[0])
    assert (float(scaled) == 1) is (name not in SCALING)
    _warn_of_scaling("DDPMPipeline", scheduler, 4)
    message = f"{type(scheduler).__name__} scales noise and samples, and diffusers' DDPMPipeline"
    assert (message in caplog.text) is (name in SCALING)


def test_a_tiny_autoencoder_is_taken_and_others_are_refused(tmp_path: Path) -> None:
    source = with_vae(tmp_path, "AutoencoderTiny")
    assert latent_space(source) == (4, 2)
    assert _no_pictures(source, DDIMScheduler()) is None
    config = tmp_path / "vae" / "config.json"
    config.write_text('{"decoder_block_out_channels": [8, 8, 8]}')
    assert latent_space(source) == (4, 4)
    wide = with_vae(tmp_path, "AutoencoderKL")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 4}))
    assert "pictures of 4 channels" in str(_no_pictures(wide, DDIMScheduler()))
    with pytest.raises(ExportError, match="vae is AsymmetricAutoencoderKL, and AutoencoderKL or"):
        latent_space(with_vae(tmp_path, "AsymmetricAutoencoderKL"))


class Wide(torch.nn.Module):
    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return torch.cat([sample, sample], dim=1)


def test_a_prediction_of_other_channels_is_refused(
    pipeline_folder: Callable[[str], Path],
) -> None:
    made = PipelineParts(Source(pipeline_folder("ddpm")), lambda _, graph: graph)

    with pytest.raises(ExportError, match="predicts 8 channels, and 4 are needed"):
        made.denoiser(Wide(), {"sample": sample_example(4)})


def wired(
    make: Callable[[PipelineParts], None], source: Source, monkeypatch: pytest.MonkeyPatch
) -> PipelineParts:
    """What a family makes of a pipeline, without any graph."""
    for name in ("add", "denoiser", "vae"):
        monkeypatch.setattr(PipelineParts, name, lambda *_: None)
    monkeypatch.setattr(PipelineParts, "output_width", lambda *_: 16)
    made = PipelineParts(source, lambda _, graph: graph)
    make(made)
    return made


@pytest.mark.parametrize("family", ["ddpm"])
def test_a_ddpm_pipeline_leaves_eta_to_its_scheduler(
    family: str, pipeline_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = wired(unconditional, Source(pipeline_folder(family)), monkeypatch).step_options
    table = probe(TCDScheduler(), 4, step_options=options)
    assert table == probe(TCDScheduler(), 4, step_options={"eta": 0.3})  # step's own default


@pytest.mark.parametrize(("projecting", "pooled"), [("CLIPTextModel", "pooled_2"), (PROJECTING, "pooled")])
def test_sdxl_is_told_the_pooled_text_of_the_first_encoder_that_projects_it(
    projecting: str,
    pooled: str,
    pipeline_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(pipeline_folder("sdxl"), tmp_path / "sdxl"))
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"][1] = projecting
    clip_text(projection=projecting == PROJECTING).save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text(json.dumps(index))
    calls = {call.segment: call for call in wired(stable_diffusion_xl, Source(folder), monkeypatch).prologue}
    assert calls["text_join"].inputs["pooled_2"] == pooled
    assert pooled in {name for call in calls.values() for name in call.outputs.values()}


@pytest.mark.parametrize("lengths", [(16, 12), (12, 16), (1000, 12)])
def test_both_clips_of_sd3_read_as_many_tokens_as_the_first_tokenizer_says(
    lengths: tuple[int, int],
    pipeline_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(pipeline_folder("sd3"), tmp_path / "sd3"))
    for name, length in zip(("tokenizer", "tokenizer_2"), lengths, strict=True):
        clip_tokenizer(tmp_path / name, length=length).save_pretrained(folder / name)
    made = wired(stable_diffusion_3, Source(folder), monkeypatch)
    shapes = {spec.name: spec.shape[1] for spec in made.inputs}
    assert shapes["tokens"] == shapes["tokens_2"] == min(lengths[0], 16)


@pytest.mark.parametrize(
    ("table", "patch", "latent"), [(4, 2, (8, 8)), (3, 1, (3, 3)), (5, 4, (20, 20)), (96, 2, (12, 10))]
)
def test_a_table_of_positions_is_not_read_behind_its_end_when_it_is_traced(
    table: int, patch: int, latent: tuple[int, int]
) -> None:
    multiple = 8 * patch
    made = Parts("x", lambda _, graph: graph, multiple=multiple, largest_side=table * multiple)
    sample = patched_example(made).tensor
    assert sample.shape[2:] == latent
    model = SD3Transformer2DModel(**SD3_TRANSFORMER, patch_size=patch, pos_embed_max_size=table)
    with torch.no_grad():
        assert model.pos_embed(sample).shape[1] == latent[0] * latent[1] // patch**2


@pytest.mark.parametrize(
    "config", [{"cross_attention_dim": [16, 16, 16]}, {"encoder_hid_dim": 16, "cross_attention_dim": 24}]
)
def test_a_unet_reads_text_as_wide_as_its_encoder_writes_it(
    config: dict[str, Any],
    pipeline_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(pipeline_folder("sd15"), tmp_path / "sd"))
    unet(**config).save_pretrained(folder / "unet")
    read: dict[str, Any] = {}

    def wire(parts: PipelineParts) -> None:
        monkeypatch.setattr(PipelineParts, "denoiser", lambda _, module, inputs: read.update(inputs))
        stable_diffusion(parts)

    wired(wire, Source(folder), monkeypatch)
    assert read["encoder_hidden_states"].tensor.shape[-1] == 16


@pytest.mark.parametrize(
    ("version", "sample_size", "size"),
    [
        ("0.2.4", 32, (128, 128)),
        ("0.9.0", 32, (64, 64)),
        ("0.8.0.dev0", 96, (192, 192)),
        ("0.2.4", [32, 48], (96, 64)),
    ],
)
def test_the_size_of_an_old_stable_diffusion_is_mended_as_its_pipeline_does(
    version: str, sample_size: Any, size: tuple[int, int], tmp_path: Path
) -> None:
    assert measured(tmp_path, {"_diffusers_version": version, "sample_size": sample_size}).size == size


@pytest.mark.parametrize(
    ("denoiser", "config", "sizes"),
    [
        ("SD3Transformer2DModel", {}, (256, 4, 384)),
        ("PixArtTransformer2DModel", {"patch_size": 4}, (256, 8, None)),
        ("DiTTransformer2DModel", {"sample_size": 16}, (32, 4, None)),
        ("Transformer2DModel", {"norm_type": "ada_norm_zero"}, (64, 4, None)),
        ("Transformer2DModel", {"norm_type": "ada_norm_single"}, (256, 4, None)),
    ],
)
def test_what_a_configuration_leaves_out_is_its_class_s_default(
    denoiser: str, config: dict[str, Any], sizes: tuple[int, int, int | None], tmp_path: Path
) -> None:
    made = measured(tmp_path, config, denoiser)
    assert ((made.size[0], made.multiple, made.largest_side), made.channels) == (sizes, 4)


def test_a_picture_has_the_channels_that_its_decoder_or_pixel_model_writes(tmp_path: Path) -> None:
    assert measured(tmp_path, {"sample_size": 8}).colors == 3
    vae = tmp_path / "vae" / "config.json"
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"out_channels": 1}))
    made = PipelineParts(Source(tmp_path), lambda _, graph: graph)
    made.source.index["unet"] = ["diffusers", "UNet2DConditionModel"]
    measure(made)
    assert made.colors == 1
    (tmp_path / "unet" / "config.json").write_text('{"sample_size": 8, "in_channels": 1}')
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    made = PipelineParts(Source(tmp_path), lambda _, graph: graph)
    measure(made)
    assert (made.channels, made.colors) == (1, 1)


def measured(folder: Path, config: dict[str, Any], denoiser: str = "UNet2DConditionModel") -> PipelineParts:
    """The sizes of a pipeline with a denoiser of a configuration, two pixels to a latent."""
    source = with_vae(folder, "AutoencoderKL")
    name = "unet" if "UNet" in denoiser else "transformer"
    source.index[name] = ["diffusers", denoiser]
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps(config))
    made = PipelineParts(source, lambda _, graph: graph)
    measure(made)
    return made


@pytest.mark.parametrize(
    ("up_blocks", "multiple"),
    [
        (["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"], 2),
        (["UpBlock2D", "ResnetUpsampleBlock2D", "CrossAttnUpBlock2D"], 8),
        (["CrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D"], 2),
    ],
)
def test_sides_halve_at_every_level_where_an_upsampler_only_doubles(
    up_blocks: list[str], multiple: int, tmp_path: Path
) -> None:
    assert measured(tmp_path, {"sample_size": 8, "up_block_types": up_blocks}).multiple == multiple


@pytest.mark.parametrize(
    "first", [pytest.param("ResnetDownsampleBlock2D", marks=pytest.mark.slow), "DownBlock2D"]
)
def test_a_unet_whose_upsamplers_only_double_is_traced_with_open_sizes(first: str) -> None:
    torch.manual_seed(0)
    model = unet(
        block_out_channels=(8, 8, 8),
        down_block_types=(first, "ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
    )
    made = Parts("x", lambda _, graph: graph, factor=8, multiple=32)
    assert_open_sizes(model, halving_example(made), (8, 20))


def test_a_unet_of_many_levels_is_traced_with_open_sizes_at_its_bottom() -> None:
    torch.manual_seed(0)
    levels = 5
    model = unet(
        block_out_channels=(4,) * levels,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
    )
    assert_open_sizes(model, sample_example(4, odd_latent(levels - 1)), (32, 50))


def assert_open_sizes(model: Any, sample: Example, size: tuple[int, int]) -> None:
    """The graph that is traced with a sample makes of one of another size what torch makes of it.

    Other sizes than the sample's sides are fixed, which is traced in less time.
    """
    sample = Example(sample.tensor[:1], (None, None, *sample.dims[2:]), sample.multiples)
    inputs = {"timestep": timestep_example(), "encoder_hidden_states": Example(torch.randn(1, 5, 16))}
    graph = trace(ConditionalUNet(model), {"sample": sample, **inputs}, ["prediction"])
    given = [torch.randn(1, 4, *size), torch.tensor(7.0), torch.randn(1, 5, 16)]
    feeds = dict(zip((str(value.name) for value in graph.graph.inputs), map(np.asarray, given), strict=True))
    with torch.no_grad():
        theirs = model(*given).sample.numpy()
    assert np.abs(run(graph, feeds)["prediction"] - theirs).max() <= 1e-5


def parts_that_start_from_pictures(tasks: tuple[str, ...]) -> Parts:
    parts = Parts("SomePipeline", lambda _, graph: graph, tasks=tasks)
    parts.inputs.append(TensorSpec("tokens", "int64", ("rows*batch", 16), {"kind": "tokens"}))
    parts.start_from_pictures({"image-to-image": 0.6, "inpainting": 1.0})
    return parts


@pytest.mark.parametrize(
    ("tasks", "left"),
    [
        ((), ("image-to-image", "inpainting")),
        (("text-to-image",), ()),
        (("inpainting", "text-to-image"), ("inpainting",)),
    ],
)
def test_a_program_does_what_is_asked_for_alone(tasks: tuple[str, ...], left: tuple[str, ...]) -> None:
    parts = parts_that_start_from_pictures(tasks)
    parts.choose_tasks()
    assert tuple(parts.strength) == left


def test_a_task_that_a_pipeline_has_not_is_refused_with_those_that_it_has() -> None:
    with pytest.raises(
        InputError, match="cannot do editing: it does text-to-image, image-to-image, inpainting"
    ):
        parts_that_start_from_pictures(("editing",)).choose_tasks()
    parts = parts_that_start_from_pictures(("text-to-image",))
    parts.inpainting_channels = True
    parts.start_from_pictures({"image-to-image": 0.6, "inpainting": 1.0})
    with pytest.raises(InputError, match="cannot do text-to-image: it does inpainting"):
        parts.choose_tasks()


def test_an_lcm_starts_from_pictures_where_its_scheduler_is_told_the_strength(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "LatentConsistencyModelPipeline"}))
    source = Source(tmp_path)
    assert _no_pictures(source, make_scheduler("lcm", {})) is None
    assert "DDIMScheduler takes none" in str(_no_pictures(source, DDIMScheduler()))


def test_few_of_an_lcm_s_steps_are_left_by_no_less_strength_than_they_are() -> None:
    parts = parts_that_start_from_pictures(())
    parts.strength, parts.strength_steps, parts.pipeline = (
        {"image-to-image": 0.8},
        50,
        "LatentConsistencyModel",
    )
    tables = probe_tasks(parts, Sampling(make_scheduler("lcm", {}), (4,), {}))["image-to-image"]
    assert list(tables) == [f"lcm-4/from-{k}" for k in range(47)]
    assert [step.timestep for step in tables["lcm-4/from-46"].evaluations] == [79, 59, 39, 19]
