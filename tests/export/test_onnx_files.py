"""Foreign .onnx files against diffusers: the picture is the same."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from foreign import LINEAR, PIXELS, compiled, linear, noise, picture, sampled, write
from transformers import CLIPTextConfig, CLIPTextModel

import trimtab
from trimtab.cli import main
from trimtab.errors import InputError

DOCS = Path(__file__).parents[2] / "docs" / "onnx.md"
SMALL = (64, 96)


def blocks(kind: str) -> list[str]:
    """The code blocks of the docs page."""
    return re.findall(rf"```{kind}\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)


class _First(torch.nn.Module):
    """A diffusers or transformers model that returns its first result alone, as exporters want it."""

    def __init__(self, model: torch.nn.Module, method: str = "__call__") -> None:
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        method = self.model if self.method == "__call__" else getattr(self.model, self.method)
        return method(*inputs, return_dict=False)[0]


def _torchscript(module: torch.nn.Module, inputs: dict[str, Any], axes: Any, output: str, file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            str(file),
            dynamo=False,
            opset_version=14,  # optimum's for Stable Diffusion
            input_names=list(inputs),
            output_names=[output],
            dynamic_axes=axes,
        )


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StableDiffusionPipeline]:
    """A folder with exported graphs and the docs' TOML file, and the pipeline they came from."""
    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=80,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=74,
            eos_token_id=75,
            pad_token_id=75,
        )
    )
    tokenizer = tiny.clip_tokenizer(folder / "scratch", length=77)
    tokenizer.save_pretrained(folder / "tokenizer")
    pipeline = StableDiffusionPipeline(
        vae=tiny.vae(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=tiny.unet(),
        scheduler=DDIMScheduler(**tiny.SD_BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    sizes = {0: "batch", 2: "height", 3: "width"}
    _torchscript(
        _First(text),
        {"input_ids": torch.randint(0, 70, (2, 77))},
        {"input_ids": {0: "batch"}},
        "last_hidden_state",
        folder / "text_encoder.onnx",
    )
    inputs = {"sample": torch.randn(2, 4, 16, 8), "timestep": torch.tensor([5.0])}
    inputs["encoder_hidden_states"] = torch.randn(2, 77, 16)
    axes = {"sample": sizes, "timestep": {0: "steps"}, "encoder_hidden_states": {0: "batch", 1: "sequence"}}
    _torchscript(_First(pipeline.unet), inputs, axes, "out_sample", folder / "unet.onnx")
    _torchscript(
        _First(pipeline.vae, "decode"),
        {"latent_sample": torch.randn(2, 4, 16, 8)},
        {"latent_sample": sizes},
        "sample",
        folder / "vae_decoder.onnx",
    )
    (folder / "model.toml").write_text(blocks("toml")[0])
    return folder, pipeline


def test_docs_example_equals_diffusers(
    stable_diffusion: tuple[Path, StableDiffusionPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, pipeline = stable_diffusion
    monkeypatch.chdir(folder)
    for line in blocks("sh")[0].splitlines():
        words = re.findall(r'"[^"]*"|\S+', line)
        assert main([word.strip('"') for word in words[1:]]) == 0, line
    assert (folder / "circle.png").is_file()
    with trimtab.load("model.bundle", threads=1) as ours:
        assert ours.bundle.contents.size == (512, 512)
        for prompts, negatives, scale in (["a cat", "two dogs"], ["", "blue"], 7.5), (["a cat"], None, 1.0):
            expected = pipeline(
                prompts,
                negative_prompt=negatives,
                guidance_scale=scale,
                num_inference_steps=20,
                width=SMALL[0],
                height=SMALL[1],
                generator=torch.Generator().manual_seed(7),
                output_type="np",
            ).images
            found = ours(prompts, negative_prompt=negatives, guidance=scale, seed=7, size=SMALL).pixels
            assert np.abs(found - expected).max() < 1e-3


@pytest.mark.parametrize(
    "timestep",
    ["float t", "float[1] t", "float[B] t", "int64 t", "int64[N] t", "float16[B] t", "double t"],
)
def test_time_steps_of_every_type_and_shape(tmp_path: Path, timestep: str) -> None:
    body = (
        "<float scale = {0.25}, float rate = {0.001}, int64[4] column = {-1, 1, 1, 1}> "
        "{ f = Cast<to = 1>(t) m = Mul(f, rate) c = Reshape(m, column) s = Mul(x, scale) y = Add(s, c) }"
    )
    write(tmp_path / "denoiser.onnx", f"float[N,3,H,W] x, {timestep}", "float[N,3,H,W] y", body)
    with compiled(tmp_path, PIXELS) as ours:
        found = ours(seed=1, count=2).pixels
    assert found.shape == (2, 4, 8, 3)
    assert np.abs(found - picture(sampled(linear, noise((2, 3, 4, 8), 1)))).max() < 1e-5


def test_half_precision_graph(tmp_path: Path) -> None:
    write(
        tmp_path / "denoiser.onnx",
        "float16[N,3,H,W] sample, int64[N] timestep",
        "float16[N,3,H,W] out_sample",
        "<float quarter = {0.25}, float rate = {0.001}, int64[4] column = {-1, 1, 1, 1}> "
        "{ f = Cast<to = 1>(timestep) m = Mul(f, rate) h = Cast<to = 10>(m) c = Reshape(h, column) "
        "scale = Cast<to = 10>(quarter) s = Mul(sample, scale) out_sample = Add(s, c) }",
    )
    with compiled(tmp_path, PIXELS) as ours:
        found = ours(seed=1).pixels
    expected = picture(sampled(linear, noise((1, 3, 4, 8), 1)))
    assert 0 < np.abs(found - expected).max() < 1e-3  # half a unit in the last of 11 bits, of values up to 4


def test_class_labels_with_guidance(tmp_path: Path) -> None:
    write(
        tmp_path / "denoiser.onnx",
        "float[N,3,H,W] sample, float timestep, int64[M] labels",
        "float[N,3,H,W] out_sample",
        "<float scale = {0.25}, float rate = {0.001}, float[4,1,1,1] table = {0.1, -0.2, 0.3, 0}> "
        "{ t = Mul(timestep, rate) s = Mul(sample, scale) e = Gather<axis = 0>(table, labels) "
        "a = Add(s, t) out_sample = Add(a, e) }",
    )
    labels = "inputs = { labels = { classes = 3, null = 3 } }"
    with compiled(tmp_path, f"guidance = 3.0\n{PIXELS}{labels}") as ours:
        assert ours.tasks == ("class-to-image",)
        found = ours(label=[2, 0], seed=1).pixels
        plain = ours(label=[2, 0], seed=1, guidance=1).pixels
        with pytest.raises(InputError, match="no class 3"):
            ours(label=3)
    shift = torch.tensor([0.3, 0.1]).reshape(2, 1, 1, 1)
    for pixels, scale in (found, 3.0), (plain, 1.0):
        expected = sampled(lambda x, t, scale=scale: linear(x, t) + scale * shift, noise((2, 3, 4, 8), 1))
        assert np.abs(pixels - picture(expected)).max() < 1e-5


def test_docs_denoisers_compile(tmp_path: Path) -> None:
    inputs, outputs, body = LINEAR
    write(tmp_path / "denoiser.onnx", inputs, outputs, body)
    with compiled(tmp_path, blocks("toml")[1]) as ours:
        assert ours(seed=0).pixels.shape == (1, 32, 32, 3)
    write(
        tmp_path / "denoiser.onnx",
        f"{inputs}, int64[N] class_labels",
        outputs,
        body.replace(
            "out_sample = Add(s, t)",
            "c = Cast<to = 1>(class_labels) u = ReduceMax(c) "
            "v = Mul(u, rate) w = Add(s, t) out_sample = Add(w, v)",
        ),
    )
    with compiled(tmp_path, blocks("toml")[2]) as ours:
        assert ours(label=1, seed=0).pixels.shape == (1, 32, 32, 3)


def test_learned_variance_is_cut_off(tmp_path: Path) -> None:
    body = LINEAR[2].replace("out_sample = Add(s, t)", "a = Add(s, t) out_sample = Concat<axis = 1>(a, s)")
    for shape in ("float[N,6,H,W]", "float[N,C,H,W]"):
        write(tmp_path / "denoiser.onnx", LINEAR[0], f"{shape} out_sample", body)
        with compiled(tmp_path, PIXELS) as ours:
            found = ours(seed=1).pixels
        assert np.abs(found - picture(sampled(linear, noise((1, 3, 4, 8), 1)))).max() < 1e-5


def test_scheduler_from_a_file_and_gray_pixels(tmp_path: Path) -> None:
    write(tmp_path / "denoiser.onnx", *(text.replace("N,3", "N,1") for text in LINEAR))
    DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(tmp_path / "scheduler")
    toml = PIXELS.replace('class = "DDIMScheduler"', 'config = "scheduler/scheduler_config.json"')
    with compiled(tmp_path, toml) as ours:
        found = ours(seed=1).pixels
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    assert np.abs(found - picture(sampled(linear, noise((1, 1, 4, 8), 1), scheduler))).max() < 1e-5


def test_names_that_trimtab_uses_itself_are_free(tmp_path: Path) -> None:
    write(
        tmp_path / "denoiser.onnx",
        "float[batch,3,rows,batch2] state, float mix",
        "float[batch,3,rows,batch2] next_sample",
        "<float noise = {0.25}, float sample = {0.001}> "
        "{ timestep = Mul(mix, sample) prediction = Mul(state, noise) next_sample = Add(prediction, timestep) }",
    )
    with compiled(tmp_path, PIXELS + 'sample = "state"\ntimestep = "mix"', scheduler="ddpm") as ours:
        assert ours(seed=1).pixels.shape == (1, 4, 8, 3)
    with compiled(tmp_path, PIXELS) as ours:
        found = ours(seed=1, count=2).pixels
    assert np.abs(found - picture(sampled(linear, noise((2, 3, 4, 8), 1)))).max() < 1e-5


@pytest.mark.parametrize("opset", [11, 14, 15, 21])
def test_opsets(tmp_path: Path, opset: int) -> None:
    write(tmp_path / "denoiser.onnx", *LINEAR, opset=opset)
    with compiled(tmp_path, PIXELS) as ours:
        found = ours(seed=1).pixels
    assert np.abs(found - picture(sampled(linear, noise((1, 3, 4, 8), 1)))).max() < 1e-5


def test_nodes_may_come_in_any_order(tmp_path: Path) -> None:
    inputs, outputs, body = LINEAR
    write(
        tmp_path / "denoiser.onnx",
        inputs,
        outputs,
        body.split("{ t =")[0] + "{ out_sample = Add(s, t) s = Mul(sample, scale) t = Mul(timestep, rate) }",
    )
    with compiled(tmp_path, PIXELS) as ours:
        found = ours(seed=1).pixels
    assert np.abs(found - picture(sampled(linear, noise((1, 3, 4, 8), 1)))).max() < 1e-5


def test_weights_among_the_inputs(tmp_path: Path) -> None:
    """As ONNX had it up to IR version 3, and exporters with ``keep_initializers_as_inputs``."""
    model = onnx.load(write(tmp_path / "denoiser.onnx", *LINEAR, opset=11))
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    onnx.save(model, tmp_path / "denoiser.onnx")
    with compiled(tmp_path, PIXELS) as ours:
        found = ours(seed=1).pixels
    assert np.abs(found - picture(sampled(linear, noise((1, 3, 4, 8), 1)))).max() < 1e-5


def with_weights_outside(folder: Path) -> Path:
    """A denoiser of one's own whose weights lie in ``denoiser.data``; gives its TOML file."""
    body = (
        "<float rate = {0.001}> { t = Mul(timestep, rate) s = Conv(sample, kernel) "
        "u = Conv(s, wide) v = Conv(u, narrow) out_sample = Add(v, t) }"
    )
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({LINEAR[0]}) => ({LINEAR[1]}) {body}'
    model = onnx.parser.parse_model(text)
    small = 0.25 * np.eye(3, dtype=np.float32)[..., None, None]
    wide = np.zeros((600, 3, 1, 1), np.float32)
    wide[:3] = np.eye(3)[..., None, None]
    for name, array in (
        ("kernel", small),
        ("wide", wide),
        ("narrow", np.ascontiguousarray(wide.transpose(1, 0, 2, 3))),
    ):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(
        model,
        folder / "denoiser.onnx",
        save_as_external_data=True,
        location="denoiser.data",
        size_threshold=8,
    )
    (folder / "model.toml").write_text(PIXELS)
    return folder / "model.toml"


@pytest.mark.parametrize("linked", [False, True])
def test_weights_outside_of_the_file(linked: bool, tmp_path: Path) -> None:
    toml, data = with_weights_outside(tmp_path), tmp_path / "denoiser.data"
    blob = tmp_path / "blobs" / "of-the-hub"
    if linked:  # as files lie in the hub's cache, and in one that was backed up
        blob.parent.mkdir()
        (blob.parent / "again").hardlink_to(data.rename(blob))
        data.symlink_to(blob)
    trimtab.compile(toml, tmp_path / "bundle", steps=3)
    data.unlink()  # the bundle is whole without it
    with trimtab.load(tmp_path / "bundle") as ours:
        found = ours(seed=1).pixels
    assert np.abs(found - picture(sampled(linear, noise((1, 3, 4, 8), 1)))).max() < 1e-5


@pytest.mark.parametrize("place", ["constant", "function", "branch"])
def test_constants_outside_of_the_file_are_weights_too(place: str, tmp_path: Path) -> None:
    rates = np.full((600, 1, 1), 0.001, np.float32)  # of which each picture reads three
    rates.tofile(tmp_path / "rates.data")
    tensor = onnx.TensorProto(name="t", data_type=onnx.TensorProto.FLOAT, dims=rates.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="rates.data")
    node = onnx.helper.make_node("Constant", [], ["rates"], value=tensor)
    body = (
        "<float scale = {0.25}, int64[1] zero = {0}, int64[1] three = {3}, bool yes = {1}> "
        "{ rate = Slice(rates, zero, three, zero) t = Mul(timestep, rate) s = Mul(sample, scale) "
        "out_sample = Add(s, t) }"
    )
    model = onnx.load(write(tmp_path / "denoiser.onnx", *LINEAR[:2], body))
    if place == "function":
        function = model.functions.add(name="Rates", domain="own", output=["rates"])
        function.opset_import.add(domain="", version=17)
        function.node.append(node)
        model.opset_import.add(domain="own", version=1)
        node = onnx.helper.make_node("Rates", [], ["rates"], domain="own")
    elif place == "branch":
        made = onnx.helper.make_tensor_value_info("rates", onnx.TensorProto.FLOAT, rates.shape)
        branch = onnx.helper.make_graph([node], "branch", [], [made])
        node = onnx.helper.make_node("If", ["yes"], ["rates"], then_branch=branch, else_branch=branch)
    model.graph.node.insert(0, node)
    onnx.save(model, tmp_path / "denoiser.onnx")
    with compiled(tmp_path, PIXELS) as ours:
        found = ours(seed=1).pixels
    assert np.abs(found - picture(sampled(linear, noise((1, 3, 4, 8), 1)))).max() < 1e-5
    (tmp_path / "rates.data").unlink()
    with pytest.raises(InputError, match=r"rates\.data, which holds weights of denoiser\.onnx, is missing"):
        trimtab.compile(tmp_path / "model.toml", tmp_path / "again", steps=3)
    away = model.SerializeToString().replace(b"rates.data", b"../rates.x")
    (tmp_path / "denoiser.onnx").write_bytes(away)
    with pytest.raises(InputError, match="out of its folder"):
        trimtab.compile(tmp_path / "model.toml", tmp_path / "again", steps=3)


def test_weights_outside_of_the_file_that_cannot_be_read(tmp_path: Path) -> None:
    toml, data = with_weights_outside(tmp_path), tmp_path / "denoiser.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    with pytest.raises(InputError, match="is cut short"):
        trimtab.compile(toml, tmp_path / "bundle", steps=3)
    data.unlink()
    with pytest.raises(
        InputError, match=r"denoiser\.data, which holds weights of denoiser\.onnx, is missing"
    ):
        trimtab.compile(toml, tmp_path / "bundle", steps=3)
    (tmp_path / "model").mkdir()
    toml.rename(tmp_path / "model" / toml.name)
    model = onnx.load(tmp_path / "denoiser.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../denoiser.data" if entry.key == "location" else entry.value
    onnx.save(model, tmp_path / "model" / "denoiser.onnx")
    data.write_bytes(whole)
    with pytest.raises(InputError, match="out of its folder"):
        trimtab.compile(tmp_path / "model" / toml.name, tmp_path / "bundle", steps=3)
