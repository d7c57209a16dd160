"""The denoiser as a torch module: the same that the graph was traced from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, PixArtTransformer2DModel, UNet2DModel
from graphs import run
from tiny import ONE_LEVEL, TWO_LEVELS, clip_text, controlnet_model, unet, vae

from trimtab.errors import ExportError, InputError
from trimtab.export.denoisers import WRAPPERS, check_denoiser, denoiser_module
from trimtab.export.encoders import ControlEncoder
from trimtab.export.families import has_guidance
from trimtab.export.parts import PipelineParts
from trimtab.export.pipeline import check_options
from trimtab.export.sizes import latent_space, measure
from trimtab.export.source import Source
from trimtab.export.trace import Example, trace
from trimtab.export.transformer_denoisers import caption_width
from trimtab.export.transformer_modules import PixArtTransformer
from trimtab.export.unet_denoisers import check_conditions
from trimtab.export.unet_modules import ControlledXLUNet, GuidedUNet, PixelUNet, XLRefiningUNet

PipelineFolder = Callable[[str], Path]

TOLD: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
"""What makes a U-Net one of SDXL's: it is told numbers beside the text."""


@pytest.mark.parametrize(
    ("family", "wrapper"),
    [
        ("sd15", "ConditionalUNet"),
        ("inpaint9", "InpaintingUNet"),
        ("lcm", "GuidedUNet"),
        ("ddpm", "PixelUNet"),
    ],
)
def test_a_unet_is_wrapped_by_what_it_reads(
    pipeline_folder: PipelineFolder, family: str, wrapper: str
) -> None:
    assert type(denoiser_module(Source(pipeline_folder(family)))).__name__ == wrapper


def test_it_takes_the_graphs_inputs_by_name(pipeline_folder: PipelineFolder) -> None:
    source = Source(pipeline_folder("dit"))
    module = denoiser_module(source)
    channels, factor = latent_space(source)
    sample = torch.randn(2, channels, 8, 8)
    with torch.no_grad():
        prediction = module(sample=sample, timestep=torch.tensor(3.0), class_labels=torch.tensor([1, 2]))
    assert prediction.shape == sample.shape and factor > 1


def saved_xl(folder: Path, cls: str = "StableDiffusionXLPipeline", **config: Any) -> Source:
    """An SDXL pipeline as far as its denoiser goes, with another U-Net than that of the family."""
    made = unet(**TWO_LEVELS | TOLD | {"projection_class_embeddings_input_dim": 8 * 6 + 16} | config)
    made.save_pretrained(folder / "unet")
    vae().save_pretrained(folder / "vae")
    clip_text(projection=True).save_pretrained(folder / "text_encoder_2")
    index: dict[str, Any] = {"_class_name": cls}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return Source(folder)


def test_an_sdxl_unet_that_reads_the_guidance_scale_is_given_it(tmp_path: Path) -> None:
    source = saved_xl(tmp_path, time_cond_proj_dim=16)
    module = denoiser_module(source)
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(3.0)}
    inputs |= {"encoder_hidden_states": torch.randn(2, 5, 16), "text_embeds": torch.randn(2, 16)}
    embedding = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.full((2,), 6.0), 16)
    sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).expand(2, -1)
    with torch.no_grad():
        ours = module(**inputs, guidance=torch.tensor(7.0))
        theirs = module.model(
            inputs["sample"],
            inputs["timestep"],
            inputs["encoder_hidden_states"],
            timestep_cond=embedding,
            added_cond_kwargs={"text_embeds": inputs["text_embeds"], "time_ids": sizes},
        ).sample
    assert (ours - theirs).abs().max() <= 1e-5


class Telling(torch.nn.Module):
    """Predicts what it is told of the guidance scale."""

    config = SimpleNamespace(time_cond_proj_dim=16)

    def forward(
        self, *_: torch.Tensor, timestep_cond: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        return (timestep_cond,)


@pytest.mark.parametrize("scale", [0.0, 7.5])
def test_a_graph_is_told_the_guidance_scale_as_exactly_as_torch(scale: float) -> None:
    guidance = torch.tensor(scale)
    given = {name: torch.zeros(2, 4, 4) for name in ("sample", "timestep", "encoder_hidden_states")}
    given["guidance"] = guidance
    inputs = {name: Example(tensor) for name, tensor in given.items()}
    graph = trace(GuidedUNet(Telling()), inputs, ["embedding"])
    found = run(graph, {name: tensor.numpy() for name, tensor in given.items()})["embedding"]
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, guidance[None] - 1, 16)
    assert np.abs(found - expected.numpy()).max() <= 1e-6


@pytest.mark.parametrize(("refines", "told"), [(False, 6), (True, 5)])
def test_an_sdxl_unet_is_told_what_its_pipeline_tells_it(tmp_path: Path, refines: bool, told: int) -> None:
    def source(count: int, **config: Any) -> Source:
        found = saved_xl(tmp_path, projection_class_embeddings_input_dim=8 * count + 16, **config)
        found.index["requires_aesthetics_score"] = refines
        return found

    check_conditions(source(told))
    wrapper = denoiser_module(source(told))
    assert isinstance(wrapper, XLRefiningUNet) is refines
    other = 11 - told
    with pytest.raises(
        ExportError, match=f"reads {other} conditions beside the text, and {told} are what its"
    ):
        check_conditions(source(other))
    if refines:
        with pytest.raises(ExportError, match="a refiner is supported that reads neither"):
            check_denoiser(source(told, in_channels=9))


def test_a_unet_that_reads_a_mask_and_the_guidance_scale_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"reads a mask \(9 channels\) and the guidance scale"):
        denoiser_module(saved_xl(tmp_path, in_channels=9, time_cond_proj_dim=16))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"in_channels": 9}, "takes 9 channels, and StableDiffusionXLInstructPix2PixPipeline gives it 8"),
        ({"in_channels": 8, "time_cond_proj_dim": 16}, "reads a picture and the guidance scale"),
    ],
)
def test_a_unet_that_reads_something_else_than_the_picture_it_changes_is_refused(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    source = saved_xl(tmp_path, cls="StableDiffusionXLInstructPix2PixPipeline", **config)
    with pytest.raises(ExportError, match=reason):
        check_denoiser(source)


def test_a_refiner_is_told_a_score_in_the_place_of_the_size_asked_for() -> None:
    model = unet(**ONE_LEVEL | TOLD, projection_class_embeddings_input_dim=8 * 5 + 16)
    read = (torch.randn(2, 4, 8, 6), torch.tensor(3.0), torch.randn(2, 5, 16))
    ids = torch.tensor([[64.0, 48.0, 0.0, 0.0, score] for score in (2.5, 6.0)])
    pooled = torch.randn(2, 16)
    with torch.no_grad():
        expected = model(*read, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
        found = XLRefiningUNet(model, 8)(*read, pooled, torch.tensor([[0.0], [1.0]]))
    torch.testing.assert_close(found, expected)


def test_a_controlnet_of_sdxl_is_run_as_diffusers_runs_it_with_its_picture_embedded_beforehand() -> None:
    told = TOLD | {"projection_class_embeddings_input_dim": 8 * 6 + 16, "cross_attention_dim": 16}
    levels = {name: ONE_LEVEL[name] for name in ("block_out_channels", "down_block_types")}
    model, controlnet = unet(**ONE_LEVEL | told), controlnet_model(**levels | told)
    picture = torch.rand(1, 64, 48, 3)
    read = (torch.randn(2, 4, 8, 6), torch.tensor(3.0), torch.randn(2, 5, 16))
    pooled, ids = torch.randn(2, 16), torch.tensor([[64.0, 48.0, 0.0, 0.0, 64.0, 48.0]] * 2)
    added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}, "return_dict": False}
    with torch.no_grad():
        down, middle = controlnet(*read, picture.permute(0, 3, 1, 2), 0.5, **added)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        expected = model(*read, **residuals, **added)[0]
        control = ControlEncoder(controlnet)(picture)
        found = ControlledXLUNet(model, controlnet, 8)(*read, pooled, control, torch.tensor(0.5))
    torch.testing.assert_close(found, expected)
    assert (found - model(*read, **added)[0]).abs().max() > 1e-2


def test_a_learned_time_embedding_is_looked_up(tmp_path: Path) -> None:
    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
        time_embedding_type="learned",
        num_train_timesteps=20,
    ).eval()
    sample = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(PixelUNet(model)(sample, torch.tensor(7.0)), model(sample, 7).sample)


@pytest.mark.parametrize(
    "config", [{"num_class_embeds": 10}, {"class_embed_type": "timestep"}, {"class_embed_type": "identity"}]
)
@pytest.mark.parametrize("pipeline", ["DDPMPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_a_unet_that_reads_classes_is_refused_by_name(pipeline: str, config: dict[str, Any]) -> None:
    levels = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    if pipeline == "DDPMPipeline":
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        model: Any = UNet2DModel(sample_size=8, **levels, **blocks, **config)
    else:
        model = unet(**TWO_LEVELS, **config)
    ((name, value),) = config.items()
    with pytest.raises(ExportError, match=f"the U-Net reads a class .{name} {value!r}.*: give another"):
        WRAPPERS[pipeline](None, model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pipeline", "config"),
    [
        ("StableDiffusionPipeline", {"addition_embed_type": "image", "encoder_hid_dim": 16}),
        ("StableDiffusionPipeline", {"addition_embed_type": "text_image"}),
        ("StableDiffusionXLPipeline", {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 16}),
    ],
)
def test_a_unet_that_reads_what_its_pipeline_does_not_give_is_refused_by_name(
    pipeline: str, config: dict[str, Any]
) -> None:
    name, value = next(iter(config.items()))
    with pytest.raises(
        ExportError, match=f"the U-Net has {name} '{value}', and its pipeline .*: give another"
    ):
        WRAPPERS[pipeline](None, unet(**TWO_LEVELS, **config))  # type: ignore[arg-type]


@pytest.mark.parametrize(("caption_channels", "width"), [(32, 32), (None, 24)])
def test_the_text_of_a_pixart_is_as_wide_as_its_transformer_reads_it(
    caption_channels: int | None, width: int
) -> None:
    model = pixart_transformer(caption_channels=caption_channels)
    assert caption_width(model) == width
    sample, text, mask = torch.randn(2, 4, 8, 8), torch.randn(2, 5, width), torch.ones(2, 5)
    module = PixArtTransformer(model, 8)
    with torch.no_grad():
        assert module(sample, torch.tensor(7.0), text, mask).shape == sample.shape


def test_a_pixart_that_reads_no_text_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match="no cross_attention_dim, so that it reads no text"):
        caption_width(pixart_transformer(cross_attention_dim=None))


@pytest.mark.parametrize("pipeline", ["PixArtAlphaPipeline", "PixArtSigmaPipeline"])
def test_a_pixart_that_no_pipeline_tells_the_size_it_reads_is_refused(pipeline: str) -> None:
    model = pixart_transformer(use_additional_conditions=True)
    with pytest.raises(
        ExportError, match="and has sample_size 8, and PixArt's pipeline tells it to models of 128"
    ):
        WRAPPERS[pipeline](None, model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pipeline", "config", "told"),
    [
        (
            "FluxPipeline",
            {"in_channels": 32, "out_channels": 16},
            "takes 32 channels and predicts 16, and 16",
        ),
        (
            "FluxControlPipeline",
            {"in_channels": 16, "out_channels": 16},
            "takes 16 .* predicts 16, and 32 and 16",
        ),
        (
            "FluxFillPipeline",
            {"in_channels": 32, "out_channels": 16},
            "takes 32 .* predicts 16, and 288 and 16",  # 4 latents, 4 of a picture, 64 pixels of a mask
        ),
        ("StableDiffusion3Pipeline", {"in_channels": 9, "out_channels": 4}, "takes 9 .* predicts 4, and 4"),
        ("StableDiffusion3Pipeline", {"in_channels": 4, "out_channels": 8}, "takes 4 .* predicts 8, and 4"),
        ("PixArtSigmaPipeline", {"in_channels": 8, "out_channels": 8}, "takes 8 .* predicts 8, and 4"),
        ("DiTPipeline", {"in_channels": 4, "out_channels": 12}, "takes 4 .* predicts 12, and 4"),
    ],
)
def test_a_transformer_for_other_channels_than_its_latents_have_is_refused(
    pipeline: str, config: dict[str, int], told: str, tmp_path: Path
) -> None:
    vae().save_config(tmp_path / "vae")
    index = {"_class_name": pipeline, "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    model = SimpleNamespace(config=SimpleNamespace(**config, sample_size=8), use_additional_conditions=False)
    with pytest.raises(ExportError, match=f"the transformer {told} are needed for {pipeline}"):
        WRAPPERS[pipeline](Source(tmp_path), model)


def pixart_transformer(**config: Any) -> PixArtTransformer2DModel:
    """The smallest, over latents of 8x8."""
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "sample_size": 8}
    sizes = {"in_channels": 4, "out_channels": 8, "patch_size": 2, "use_additional_conditions": False}
    return PixArtTransformer2DModel(**small | sizes | {"cross_attention_dim": 24} | config).eval()


def changed(folder: Path, part: str, change: dict[str, Any], work: Path) -> Source:
    """A copy of a pipeline, whose index or a model's configuration is another."""
    copy = Path(shutil.copytree(folder, work / "changed"))
    file = copy / "model_index.json" if part == "index" else copy / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return Source(copy)


@pytest.mark.xdist_group("sana")
@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        (
            "index",
            {"_class_name": "SanaSprintPipeline"},
            "guidance_embeds False, and SanaSprintPipeline runs one with",
        ),
        (
            "index",
            {"vae": ["diffusers", "AutoencoderKL"]},
            "AutoencoderKL, and AutoencoderDC is needed",
        ),
        ("transformer", {"guidance_embeds": True}, "guidance_embeds True, and SanaPipeline runs one without"),
        ("transformer", {"cross_attention_dim": None}, "reads no text, and Sana's pipeline draws from one"),
        ("transformer", {"in_channels": 12}, "takes 12 channels and predicts 8, and 8 are needed"),
        (
            "vae",
            {"encoder_block_out_channels": None, "decoder_block_out_channels": None},
            "lacks 'block_out_channels'",
        ),
    ],
)
def test_a_sana_that_its_pipeline_does_not_run_is_refused_by_name(
    part: str, change: dict[str, Any], reason: str, pipeline_folder: PipelineFolder, tmp_path: Path
) -> None:
    source = changed(pipeline_folder("sana"), part, change, tmp_path)
    with pytest.raises((ExportError, InputError), match=re.escape(reason)):
        check_denoiser(source)


@pytest.mark.parametrize(
    ("family", "part", "change", "reason"),
    [
        ("z_image", "transformer", {"siglip_feat_dim": 16}, "reads pictures (siglip_feat_dim)"),
        (
            "z_image",
            "transformer",
            {"all_patch_size": [4], "all_f_patch_size": [1]},
            "has patches of [4], and Z-Image's pipeline draws with 2",
        ),
        ("z_image", "transformer", {"axes_lens": [500, 64, 64]}, "knows 500 positions of text"),
        ("z_image", "transformer", {"in_channels": 4}, "takes 4 channels and predicts 4, and 16 are needed"),
        (
            "chroma",
            "transformer",
            {"patch_size": 2},
            "has patch_size 2, and Chroma's pipeline",
        ),
        ("chroma", "transformer", {"axes_dims_rope": [4, 4, 4]}, "heads are 16 wide, and its axes_dims_rope"),
        ("chroma", "transformer", {"in_channels": 4}, "takes 4 channels and predicts 4, and 64 are needed"),
        (
            "flux2",
            "transformer",
            {"guidance_embeds": True},
            "has guidance_embeds, and Flux.2 klein's pipeline",
        ),
        ("flux2", "transformer", {"in_channels": 4}, "takes 4 channels and predicts 4, and 16 are needed"),
        ("flux2", "index", {"vae": ["diffusers", "AutoencoderKL"]}, "and AutoencoderKLFlux2 is needed"),
    ],
)
def test_a_transformer_of_one_stream_that_its_pipeline_does_not_run_is_refused_by_name(
    family: str,
    part: str,
    change: dict[str, Any],
    reason: str,
    pipeline_folder: PipelineFolder,
    tmp_path: Path,
) -> None:
    source = changed(pipeline_folder(family), part, change, tmp_path)
    with pytest.raises(ExportError, match=re.escape(reason)):
        check_denoiser(source)


@pytest.mark.xdist_group("dreamlite")
@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("index", {"vae": ["diffusers", "AutoencoderKL"]}, "AutoencoderKL, and AutoencoderTiny is needed"),
        ("unet", {"in_channels": 9}, "takes 9 channels and predicts 4, and 4 are needed with this vae"),
        ("unet", {"out_channels": 8}, "takes 4 channels and predicts 8, and 4 are needed with this vae"),
        ("unet", {"only_cross_attention": [True, False]}, "whose layers read a text's padding too"),
        ("unet", {"class_embed_type": "timestep"}, "the U-Net reads a class (class_embed_type 'timestep')"),
        ("unet", {"addition_embed_type": "text"}, "has addition_embed_type 'text', and its pipeline"),
        ("unet", {"encoder_hid_dim_type": "image_proj"}, "has encoder_hid_dim_type 'image_proj', and its"),
    ],
)
def test_a_dreamlite_that_its_pipeline_does_not_run_is_refused_by_name(
    part: str, change: dict[str, Any], reason: str, pipeline_folder: PipelineFolder, tmp_path: Path
) -> None:
    source = changed(pipeline_folder("dreamlite"), part, change, tmp_path)
    with pytest.raises(ExportError, match=re.escape(reason)):
        check_denoiser(source)


@pytest.mark.xdist_group("dreamlite")
def test_a_dreamlite_draws_what_its_pipeline_says_whatever_its_unet_does(
    pipeline_folder: PipelineFolder, tmp_path: Path
) -> None:
    folder = pipeline_folder("dreamlite")
    source = changed(folder, "unet", {"sample_size": 16}, tmp_path)
    parts = PipelineParts(source, lambda _, graph: graph)
    measure(parts)
    assert (parts.multiple, parts.largest_side, parts.size) == (8, None, (1024, 1024))
    assert has_guidance(source)
    assert not has_guidance(
        changed(folder, "index", {"_class_name": "DreamLiteMobilePipeline"}, tmp_path / "m")
    )


@pytest.mark.parametrize(("distilled", "guided"), [(False, True), (True, False)])
def test_a_distilled_flux_2_has_no_guidance(
    distilled: bool, guided: bool, pipeline_folder: PipelineFolder, tmp_path: Path
) -> None:
    assert (
        has_guidance(changed(pipeline_folder("flux2"), "index", {"is_distilled": distilled}, tmp_path))
        == guided
    )


def test_the_sides_of_z_image_end_with_its_table_of_positions(pipeline_folder: PipelineFolder) -> None:
    parts = PipelineParts(Source(pipeline_folder("z_image")), lambda _, graph: graph)
    measure(parts)
    assert (parts.multiple, parts.largest_side, parts.size) == (16, 64 * 16, (1024, 1024))


@pytest.mark.xdist_group("controlnet")
@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("index", {"controlnet": ["diffusers", "ControlNetUnionModel"]}, "a ControlNetUnionModel, and one"),
        (
            "controlnet",
            {"global_pool_conditions": True},
            "for which diffusers runs it on the prompt's rows alone",
        ),
        (
            "controlnet",
            {"conditioning_embedding_out_channels": [4, 8]},
            "2 times smaller, and the vae of this",
        ),
        (
            "unet",
            {"in_channels": 9},
            "reads a mask or the guidance scale, and a ControlNet is supported beside a",
        ),
        (
            "unet",
            {"time_cond_proj_dim": 8},
            "reads a mask or the guidance scale, and a ControlNet is supported",
        ),
    ],
)
def test_a_controlnet_that_does_more_than_add_to_the_skips_is_refused_by_name(
    part: str, change: dict[str, Any], reason: str, pipeline_folder: PipelineFolder, tmp_path: Path
) -> None:
    source = changed(pipeline_folder("controlnet"), part, change, tmp_path)
    with pytest.raises(ExportError, match=re.escape(reason)):
        check_denoiser(source)


@pytest.mark.xdist_group("controlnet")
def test_hidiffusion_is_refused_beside_a_controlnet(pipeline_folder: PipelineFolder) -> None:
    with pytest.raises(InputError, match="to which a ControlNet adds its own"):
        check_options(Source(pipeline_folder("controlnet")), guidance=None, hidiffusion=True)


def test_a_denoiser_that_was_left_out_is_missed_by_its_name(pipeline_folder: PipelineFolder) -> None:
    for family, name in (("sdxl", "unet"), ("flux", "transformer")):
        source = Source(pipeline_folder(family))
        source.index[name] = [None, None]
        with pytest.raises(InputError, match=f"has no {name}"):
            denoiser_module(source)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "dit"])
def test_an_autoencoder_that_was_left_out_is_missed_before_anything_is_exported(
    pipeline_folder: PipelineFolder, family: str
) -> None:
    source = Source(pipeline_folder(family))
    source.index["vae"] = [None, None]
    with pytest.raises(InputError, match=f"has no vae: {source.pipeline_class} needs one"):
        check_denoiser(source)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "pixart_alpha", "dit", "ddpm"])
def test_a_denoiser_is_checked_by_its_configuration_before_any_weights_are_read(
    pipeline_folder: PipelineFolder, tmp_path: Path, family: str
) -> None:
    whole = pipeline_folder(family)
    for path in whole.rglob("*.json"):
        copy = tmp_path / path.relative_to(whole)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    source = Source(tmp_path)
    name = source.denoiser
    assert {p.device.type for p in source.hollow(name).parameters()} == {"meta"}
    check_denoiser(source)
    if family == "ddpm":  # whose sample is whatever its U-Net takes
        return
    config = json.loads((tmp_path / name / "config.json").read_text())
    (tmp_path / name / "config.json").write_text(json.dumps(config | {"in_channels": 24}))
    with pytest.raises(ExportError, match="takes 24 channels"):
        check_denoiser(source)


def test_other_pipelines_and_channels_are_refused(pipeline_folder: PipelineFolder, tmp_path: Path) -> None:
    index = {"_class_name": "StableAudioPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for load in (check_denoiser, denoiser_module):
        with pytest.raises(ExportError, match="StableAudioPipeline is not supported: give one of"):
            load(Source(tmp_path))

    class Wide(Source):
        def load(self, name: str) -> object:
            unet = super().load(name)
            unet.register_to_config(in_channels=7)
            return unet

    with pytest.raises(ExportError, match="takes 7 channels, and 4 "):
        denoiser_module(Wide(pipeline_folder("sd15")))
