"""Autoencoders: pictures to latents and back as the pipelines scale them."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from tiny import SD_BETAS, TWO_LEVELS, clip_text, clip_tokenizer, spread, unet, vae

from trimtab.errors import ExportError
from trimtab.export.encoders import ChatText, ClipText, InstructedText, VaeDecoder, VaeEncoder, latent_scale
from trimtab.export.parts import PipelineParts
from trimtab.export.source import Source
from trimtab.export.texts import _around, chat, clip, templated
from trimtab.export.transformer_pipelines import QWEN_LAYERS_FLUX2, QWEN_LENGTH_FLUX2
from trimtab.export.unet_pipelines import _dreamlite_text

STATISTICS: dict[str, Any] = {
    "latents_mean": [-1.6, 1.1, 0.4, -0.2],
    "latents_std": [8.0, 5.0, 7.0, 6.0],
    "shift_factor": 0.3,
    "scaling_factor": 0.5,
}
"""All that a configuration can say; a pipeline reads a part of it."""


def pipeline(name: str, folder: Path) -> Any:
    """A pipeline whose autoencoder says all of `STATISTICS`."""
    torch.manual_seed(0)
    parts = {
        "vae": vae(**STATISTICS),
        "text_encoder": clip_text(),
        "tokenizer": clip_tokenizer(folder),
        "scheduler": DDIMScheduler(**SD_BETAS),
    }
    if name == "sd":
        made = StableDiffusionPipeline(
            **parts,
            unet=unet(**TWO_LEVELS),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    else:
        made = StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=clip_text(projection=True),
            tokenizer_2=clip_tokenizer(folder),
            unet=unet(
                **TWO_LEVELS,
                cross_attention_dim=32,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=8 * 6 + 16,
            ),
            add_watermarker=False,
        )
    spread(made.vae, torch.Generator().manual_seed(0))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("name", ["sd", "xl"])
def test_latents_are_scaled_by_what_the_pipeline_reads_and_by_nothing_else(name: str, tmp_path: Path) -> None:
    pipe = pipeline(name, tmp_path)

    def drawn(kind: str) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", num_inference_steps=2, generator=generator, output_type=kind).images

    decode = VaeDecoder(pipe.vae, *latent_scale(type(pipe).__name__, pipe.vae))
    with torch.no_grad():
        ours = decode(drawn("latent")).numpy()
    assert np.abs(ours - drawn("np")).max() <= 1e-5


@pytest.mark.parametrize("name", ["sd", "xl"])
def test_a_picture_s_latents_are_scaled_as_the_pipeline_scales_them(name: str, tmp_path: Path) -> None:
    pipe = AutoPipelineForImage2Image.from_pipe(pipeline(name, tmp_path))
    picture = torch.rand(1, 16, 24, 3)
    noise = torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    encode = VaeEncoder(pipe.vae, *latent_scale(type(pipe).__name__, pipe.vae))
    pipe.scheduler.alphas_cumprod[0] = 1.0  # so that no noise is added to them
    with torch.no_grad():
        theirs = pipe.prepare_latents(
            (picture * 2 - 1).permute(0, 3, 1, 2),
            torch.tensor([0]),
            1,
            1,
            torch.float32,
            torch.device("cpu"),
            torch.Generator().manual_seed(0),
        )
        ours = encode(picture, noise)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_text_encoder_is_told_of_padding_where_its_configuration_says_so(tmp_path: Path) -> None:
    pipe = pipeline("sd", tmp_path)
    pipe.text_encoder.config.use_attention_mask = True
    found = pipe.tokenizer(["a cat"], padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        theirs, _ = pipe.encode_prompt("a cat", torch.device("cpu"), 1, False)
        encode = ClipText(pipe.text_encoder, "last", None)
        (ours,) = encode(found.input_ids, found.attention_mask)
        (unmasked,) = encode(found.input_ids)
    assert torch.equal(ours, theirs) and not torch.allclose(unmasked, theirs, atol=1e-3)


def test_prompts_are_as_long_as_the_tokenizer_says_and_masked_as_the_encoder_says(tmp_path: Path) -> None:
    model = clip_text()
    model.config.use_attention_mask = True
    model.save_pretrained(tmp_path / "text_encoder")
    clip_tokenizer(tmp_path / "scratch", length=12).save_pretrained(tmp_path / "tokenizer")
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline"}
    index |= {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    parts = PipelineParts(Source(tmp_path), lambda _, graph: graph)
    clip(parts, "", "last", None, masks=True)
    assert {spec.name: spec.shape for spec in parts.inputs} == {
        "tokens": ("rows*batch", 12),
        "tokens_mask": ("rows*batch", 12),
    }
    assert parts.prologue[0].inputs == {"tokens": "tokens", "attention_mask": "tokens_mask"}


def test_an_instruction_is_left_out_of_what_is_encoded_behind_it() -> None:
    class Telling(torch.nn.Module):
        """Hidden states that say where they are."""

        def forward(self, tokens: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            return (tokens[..., None].float(),)

    tokens = torch.arange(10).expand(2, -1)
    words = (tokens < 8).to(torch.int64)
    hidden, mask = InstructedText(Telling(), left_out=6)(tokens, words, torch.tensor([[0.0], [1.0]]))
    assert hidden[..., 0].tolist() == [[0, 1, 2, 3], [0, 7, 8, 9]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


class Template:
    """A tokenizer with a chat template."""

    def __init__(self, template: str | None) -> None:
        self.template = template

    def apply_chat_template(self, messages: list[dict[str, str]], *, enable_thinking: bool, **_: Any) -> str:
        if self.template is None:
            raise ValueError("there is no template\nand nothing to do")
        thought = "" if enable_thinking else "<think>"
        return self.template.format(messages[0]["content"], messages[0]["content"].strip()) + thought


@pytest.mark.parametrize(("thinking", "after"), [(True, ">"), (False, "><think>")])
def test_a_chat_template_is_what_it_writes_around_a_prompt(thinking: bool, after: str) -> None:
    assert _around(Template("<user {0}>"), thinking) == ("<user ", after)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "cannot be used (there is no template): copy the tokenizer again"),
        ("<user {1}>", "changes the prompt"),
        ("<user>", "changes the prompt"),
        ("{0}{0}", "changes the prompt"),
    ],
)
def test_a_chat_template_that_cannot_be_written_around_prompts_is_refused(
    template: str | None, reason: str
) -> None:
    with pytest.raises(ExportError, match=re.escape(reason)):
        _around(Template(template), True)


def test_a_language_model_with_fewer_layers_than_are_read_is_refused(
    pipeline_folder: Callable[[str], Path],
) -> None:
    parts = PipelineParts(Source(pipeline_folder("z_image")), lambda _, graph: graph)
    with pytest.raises(ExportError, match="has 3 layers, and the pipeline reads behind the 9th"):
        chat(parts, 512, (4, 9), thinking=False, masks=False)


def test_flux_2_s_text_is_that_of_its_pipeline(diffusers_pipeline: Callable[[str], Any]) -> None:
    pipe = diffusers_pipeline("flux2")
    signature = inspect.signature(type(pipe).__call__)
    assert signature.parameters["text_encoder_out_layers"].default == QWEN_LAYERS_FLUX2
    assert signature.parameters["max_sequence_length"].default == QWEN_LENGTH_FLUX2
    prompts = ["a cat", " two\ndogs"]
    before, after = _around(pipe.tokenizer, thinking=False)
    given = pipe.tokenizer(
        [before + prompt + after for prompt in prompts],
        padding="max_length",
        max_length=QWEN_LENGTH_FLUX2,
        return_tensors="pt",
    )
    with torch.no_grad():
        (found,) = ChatText(pipe.text_encoder, QWEN_LAYERS_FLUX2, False)(
            given.input_ids, given.attention_mask
        )
        assert torch.equal(found, pipe.encode_prompt(prompts)[0])


@pytest.mark.xdist_group("dreamlite")
def test_what_sees_is_left_out_of_a_language_model_that_is_asked_in_a_template(
    pipeline_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = PipelineParts(Source(pipeline_folder("dreamlite")), lambda _, graph: graph)
    added: dict[str, torch.nn.Module] = {}
    monkeypatch.setattr(parts, "add", lambda name, module, *_: added.update({name: module}))
    templated(parts, 200, ("a b ", " c"), 3, instruction="Say: ")
    names = [name for name, _ in added["text_encoder"].named_parameters()]
    assert names and not any("visual" in name for name in names)
    (tokens, mask) = parts.inputs
    assert tokens.source["length"] == mask.source["length"] == 203
    with pytest.raises(ExportError, match="makes 7 tokens of the pipeline's template, of which the first 7 "):
        templated(parts, 200, ("xqjkwz", "v"), 7, instruction="")


@pytest.mark.xdist_group("dreamlite")
def test_the_text_of_dreamlite_is_that_of_its_pipelines(diffusers_pipeline: Callable[[str], Any]) -> None:
    for family in ("dreamlite", "dreamlite_mobile"):
        pipe = diffusers_pipeline(family)
        kept = inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default
        template = pipe.prompt_template_encode_generate
        assert _dreamlite_text() == (template, pipe.prompt_template_encode_generate_start_idx, kept)


def test_flux_2_s_latents_are_decoded_by_what_its_batch_norm_has_seen(
    diffusers_pipeline: Callable[[str], Any],
) -> None:
    pipe = diffusers_pipeline("flux2")
    latents, norm = torch.randn(2, 16, 4, 6), pipe.vae.bn
    with torch.no_grad():
        found = VaeDecoder(pipe.vae, *latent_scale(type(pipe).__name__, pipe.vae))(latents)
        deviation = torch.sqrt(norm.running_var + pipe.vae.config.batch_norm_eps)
        stretched = latents * deviation.view(1, -1, 1, 1) + norm.running_mean.view(1, -1, 1, 1)
        pictures = pipe.vae.decode(pipe._unpatchify_latents(stretched), return_dict=False)[0]
    np.testing.assert_allclose(found.numpy(), pipe.image_processor.postprocess(pictures, "np"), atol=1e-5)
