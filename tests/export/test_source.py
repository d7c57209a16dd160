"""What lies on disk: which weight files are loaded and what is missing from them, and tokenizers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file

import trimtab
from trimtab.errors import ExportError, InputError
from trimtab.export.families import has_guidance
from trimtab.export.pipeline import check_options, export_pipeline
from trimtab.export.source import Source, tokenizer_json
from trimtab.runtime.tokenizer import Tokenizer

NAME = "text_encoder/model{}.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline of a text encoder, without its weights, and of a tokenizer's empty folder."""
    tiny.clip_text().save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline"}
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.mark.parametrize(
    ("variants", "loaded"),
    [
        (("",), ""),
        ((".fp16",), ".fp16"),
        ((".bf16",), ".bf16"),
        ((".non_ema",), ".non_ema"),
        (("", ".fp16"), ""),
        ((".bf16", ".fp16", ".fp32"), ".fp32"),
    ],
)
def test_weights_of_any_variant_are_loaded(variants: tuple[str, ...], loaded: str, folder: Path) -> None:
    weights = load_file(folder / NAME.format(""))
    (folder / NAME.format("")).unlink()
    for number, variant in enumerate(variants):
        numbered = {key: torch.full_like(value, number) for key, value in weights.items()}
        save_file(numbered, folder / NAME.format(variant), {"format": "pt"})
    save_file({"a": torch.zeros(1)}, folder / "text_encoder" / "pytorch_lora_weights.safetensors")
    found = next(Source(folder).load("text_encoder").parameters())
    assert float(found.detach().mean()) == variants.index(loaded)


def test_a_variant_that_is_not_read_may_be_cut_short(folder: Path) -> None:
    whole = {name: value.clone() for name, value in Source(folder).load("text_encoder").state_dict().items()}
    (folder / NAME.format(".fp16")).write_bytes((folder / NAME.format("")).read_bytes()[:100])
    found = Source(folder).load("text_encoder").state_dict()
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("transformers", "AutoModel"),
        ("transformers", "AutoTokenizer"),
        ("transformers", "pipeline"),
        ("diffusers", "DiffusionPipeline"),
        ("diffusers", "AutoModel"),
        ("diffusers", "utils"),
    ],
)
def test_what_would_look_for_code_in_the_folder_is_not_loaded(
    library: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "evil.Evil")}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(code))
    (folder / "text_encoder" / "model_index.json").write_text(json.dumps({"_class_name": ["evil", "Evil"]}))
    (folder / "text_encoder" / "evil.py").write_text("raise SystemExit")
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": [library, name]}
    (folder / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with pytest.raises(InputError, match="is no model, scheduler or tokenizer"):
        Source(folder).load("text_encoder")


@pytest.mark.parametrize("name", [None, 5, ["CLIPTextModel"], "CLIPTextModels"])
def test_a_class_that_there_is_none_of_is_one_line(name: Any, folder: Path) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", name]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="transformers has no"):
        Source(folder).load("text_encoder")


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / NAME.format(""))
    lost = min(weights)
    save_file({k: v for k, v in weights.items() if k != lost}, folder / NAME.format(""), {"format": "pt"})
    with pytest.raises(InputError, match=rf"lacks 1 of CLIPTextModel's weights \({lost}\): copy it again$"):
        Source(folder).load("text_encoder")
    save_file(
        {k if k != lost else "other": v for k, v in weights.items()},
        folder / NAME.format(""),
        {"format": "pt"},
    )
    with pytest.raises(InputError, match=r"again, or upgrade transformers: it has others$"):
        Source(folder).load("text_encoder")


@pytest.mark.parametrize("index", ["index.json", "index.fp16.json", "fp16.index.json"])
def test_a_shard_that_is_missing_is_found_before_anything_is_exported(index: str, folder: Path) -> None:
    weights = load_file(folder / NAME.format(""))
    (folder / NAME.format("")).unlink()
    variant = ".fp16" if "fp16" in index else ""
    first, second = (NAME.format(f"{variant}-0000{number}-of-00002") for number in (1, 2))
    save_file(weights, folder / first)
    named = {"weight_map": {"a": Path(first).name, "b": Path(second).name}}
    (folder / "text_encoder" / f"model.safetensors.{index}").write_text(json.dumps(named))
    with pytest.raises(InputError, match=f"text_encoder lacks {Path(second).name}, a shard"):
        Source(folder).check_weights()
    save_file(weights, folder / second)
    Source(folder).check_weights()


def test_weights_in_a_form_that_is_not_read_are_found_before_anything_is_exported(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pipeline_folder("dit"), tmp_path / "dit"))
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert_refused_before_an_export(folder, InputError, "vae holds only diffusion_pytorch_model")


def test_a_text_encoder_without_its_tokenizer_is_found_before_anything_is_exported(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pipeline_folder("sd3"), tmp_path / "sd3"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"tokenizer_3": [None, None]}))
    assert_refused_before_an_export(folder, InputError, "has no tokenizer_3: StableDiffusion3Pipeline needs")


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("flux", {"hidiffusion": True}, "this pipeline's denoiser is FluxTransformer2DMo"),
        (
            "ddpm",
            {"hidiffusion": True},
            "rewrites a UNet2DConditionModel, and .* is UNet2DModel: leave it out",
        ),
        ("dit", {"hidiffusion": True}, r"denoiser is (DiT)?Transformer2DModel: leave it out"),
        ("ddpm", {"guidance": 2.0}, "a guidance scale of 2 was given and this model has no guidance"),
    ],
)
def test_an_option_that_the_configurations_refuse_is_refused_before_anything_is_exported(
    family: str, options: dict[str, Any], reason: str, pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    told: list[str] = []
    with pytest.raises(InputError, match=reason):
        trimtab.compile(pipeline_folder(family), tmp_path / "x", progress=told.append, **options)
    assert told == [] and not (tmp_path / "x").exists()


@pytest.mark.parametrize("embedded", [True, False])
def test_a_flux_has_guidance_where_its_transformer_reads_it(embedded: bool, tmp_path: Path) -> None:
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text(json.dumps({"guidance_embeds": embedded}))
    source = Source(tmp_path)
    assert has_guidance(source) == embedded
    check_options(source, guidance=0.0)  # as a schnell's card has it


def test_a_scheduler_without_a_table_is_found_before_anything_is_exported(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pipeline_folder("pixart_sigma"), tmp_path / "pixart"))
    DPMSolverMultistepScheduler(thresholding=True).save_pretrained(folder / "scheduler")
    assert_refused_before_an_export(folder, ExportError, "thresholding=True")


def assert_refused_before_an_export(folder: Path, error: type[Exception], reason: str) -> None:
    exported: list[str] = []

    def keep(name: str, graph: ir.Model) -> ir.Model:
        exported.append(name)
        return graph

    with pytest.raises(error, match=reason):
        export_pipeline(Source(folder), keep, steps=(2,))
    assert exported == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_cuts_and_pads_on_its_own_sides(side: str, tmp_path: Path) -> None:
    tokenizer = tiny.t5_tokenizer()
    tokenizer.padding_side = tokenizer.truncation_side = side
    texts = ["", "a red cat", "cat and dog"]
    expected = tokenizer(texts, padding="max_length", max_length=10, truncation=True, return_tensors="np")
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(tokenizer, 10), encoding="utf-8")
    ids, mask = Tokenizer(tmp_path / "tokenizer.json").encode(texts)
    assert ids.tolist() == expected["input_ids"].tolist()
    assert mask.tolist() == expected["attention_mask"].tolist()


def test_a_tokenizer_without_a_fast_form_is_refused_in_one_line() -> None:
    with pytest.raises(
        ExportError, match=r"^object has no fast form \(.+\): save the tokenizer's tokenizer\.json"
    ):
        tokenizer_json(object(), 8)
