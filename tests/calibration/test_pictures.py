"""Captioned pictures to train on: read, encoded, noised as the model was trained, and refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import PIL.Image
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from trimtab.calibration.noising import noising_of
from trimtab.calibration.pictures import Pictures, captioned
from trimtab.cli import main
from trimtab.errors import InputError
from trimtab.passes.candidates import Candidates
from trimtab.passes.removal import RemovalPlan
from trimtab.runtime.load import load

CAPTIONS = {"a": "a red circle", "b": "two blue stars", "c": "a red circle"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures with captions beside them, one wider than high."""
    generator = np.random.default_rng(0)
    made = tmp_path / "pictures"
    made.mkdir()
    for name, caption in CAPTIONS.items():
        pixels = generator.integers(256, size=(64, 96 if name == "a" else 64, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(made / f"{name}.png")
        (made / f"{name}.txt").write_text(caption + "\n")
    return made


# ---- the folder ----


def test_captions_lie_beside_the_pictures_or_in_one_file(folder: Path) -> None:
    beside = captioned(folder)
    assert [(path.stem, text) for path, text in beside] == list(CAPTIONS.items())
    lines = [json.dumps({"file_name": path.name, "text": text}) for path, text in beside]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    for text in folder.glob("*.txt"):
        text.unlink()
    assert captioned(folder) == beside


def test_a_caption_may_hold_what_ends_a_line_elsewhere(folder: Path) -> None:
    line = json.dumps({"file_name": "a.png", "text": "one\u2028two\u0085three"}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
    assert [text for _, text in captioned(folder)] == ["one\u2028two\u0085three"]


def test_a_folder_that_cannot_be_used_says_why(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        captioned(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no pictures"):
        captioned(tmp_path / "empty")
    (folder / "b.txt").unlink()
    with pytest.raises(InputError, match=r"1 of 3 pictures have no caption, b\.png first: write b\.txt"):
        captioned(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png"}\n')
    with pytest.raises(InputError, match=r"metadata\.jsonl, line 2, is not .*'text'"):
        captioned(folder)


@pytest.mark.parametrize("name", ["b.txt", "metadata.jsonl"])
def test_captions_that_are_not_utf_8_are_refused_by_the_name_of_their_file(name: str, folder: Path) -> None:
    (folder / name).write_bytes("ein r\xf6ter Kreis".encode("latin-1"))
    with pytest.raises(InputError, match=f"{name} is not UTF-8 .* at byte 5.: save it as UTF-8"):
        captioned(folder)


# ---- noise ----


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_and_targets_are_those_of_diffusers(kind: str) -> None:
    scheduler = DDIMScheduler(prediction_type=kind)
    noising = noising_of(scheduler)
    latents, noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).chunk(2)
    step = torch.tensor([321])
    expected = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": scheduler.get_velocity(latents, noise, step),
    }[kind]
    assert noising.timesteps[321] == 321
    given = noising.noised(321, latents.numpy(), noise.numpy())
    np.testing.assert_allclose(given, scheduler.add_noise(latents, noise, step), atol=1e-6)
    np.testing.assert_allclose(noising.target(321, latents.numpy(), noise.numpy()), expected, atol=1e-6)


def test_a_scheduler_that_scales_its_input_noises_to_what_the_model_reads() -> None:
    scheduler = EulerDiscreteScheduler(**{k: v for k, v in tiny.SD_BETAS.items() if k.startswith("beta")})
    scheduler.set_timesteps(10)
    noising = noising_of(scheduler)
    latents, noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).chunk(2)
    time = scheduler.timesteps[3]
    read = scheduler.scale_model_input(scheduler.add_noise(latents, noise, time[None]), time)
    np.testing.assert_allclose(noising.noised(int(time), latents.numpy(), noise.numpy()), read, atol=1e-5)


def test_flow_matching_goes_straight_from_picture_to_noise() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    noising = noising_of(scheduler)
    latents, noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).chunk(2)
    expected = scheduler.scale_noise(latents, scheduler.timesteps[200:201], noise)
    np.testing.assert_allclose(noising.timesteps, scheduler.timesteps, rtol=1e-6)
    np.testing.assert_allclose(noising.noised(200, latents.numpy(), noise.numpy()), expected, atol=1e-6)
    np.testing.assert_array_equal(noising.target(200, latents.numpy(), noise.numpy()), noise - latents)
    scheduler.set_timesteps(20)  # appends a sigma of 0, at which there is nothing to predict
    assert noising_of(scheduler).noise.tolist() == scheduler.sigmas[:-1].tolist()


def test_a_scheduler_of_another_kind_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="how EDMEulerScheduler with the prediction"):
        noising_of(EDMEulerScheduler())


# ---- training ----


@pytest.fixture
def pictures(folder: Path, bundle_folder: Callable[[str], Path], diffusers_pipeline: Callable[[str], Any]):
    bundle = bundle_folder("sd15")
    with load(bundle, threads=1) as pipeline:
        model = ir.load(bundle / "graphs" / "denoiser.onnx")
        yield Pictures(pipeline, model, noising_of(diffusers_pipeline("sd15").scheduler), captioned(folder))


@pytest.mark.xdist_group("sd15")
def test_a_batch_holds_the_pictures_of_its_captions_noised_to_one_time_step(
    pictures: Pictures, folder: Path, diffusers_pipeline: Callable[[str], Any]
) -> None:
    batch = pictures.of(seed=0, step=3, size=16)
    state, time = batch.inputs["state"], int(batch.inputs["timestep"])
    assert state.shape[1:] == (16, 4, 8, 8) and batch.target is not None and not state[1:].any()
    assert batch.inputs["mix"].tolist() == [1.0] and batch.inputs["sample_weights"].tolist()[0] == 1.0
    pipe = diffusers_pipeline("sd15")
    kept = float(pipe.scheduler.alphas_cumprod[time])
    latents = (state[0] - (1 - kept) ** 0.5 * batch.target) / kept**0.5
    # The draws from the posterior are known, so that every row is exactly one of the pictures.
    generator = np.random.default_rng(0)
    drawn = {name: _latents(pipe, folder / f"{name}.png", generator) for name in CAPTIONS}
    tokens = pipe.tokenizer(
        list(CAPTIONS.values()), padding="max_length", max_length=16, return_tensors="pt"
    ).input_ids
    texts = dict(zip(CAPTIONS, pipe.text_encoder(tokens)[0].detach().numpy(), strict=True))
    assert np.abs(texts["a"] - texts["b"]).max() > 0.1
    found = set()
    for row, text in zip(latents, batch.inputs["encoder_hidden_states"], strict=True):
        (name,) = (name for name, picture in drawn.items() if np.abs(row - picture).max() < 1e-3)
        assert np.abs(text - texts[name]).max() < 1e-4
        found.add(name)
    assert found == set(CAPTIONS)
    again = pictures.of(seed=0, step=3, size=16)
    assert all(np.array_equal(again.inputs[name], array) for name, array in batch.inputs.items())
    assert not np.array_equal(pictures.of(0, 4, 16).inputs["state"], state)


def _latents(pipe: Any, path: Path, generator: np.random.Generator) -> np.ndarray:
    """What diffusers encodes the middle of a picture to, with the generator's draw from the posterior."""
    pixels = np.asarray(PIL.Image.open(path), np.float32) / 127.5 - 1
    left = (pixels.shape[1] - 64) // 2
    posterior = pipe.vae.encode(
        torch.from_numpy(pixels[None, :, left : left + 64].transpose(0, 3, 1, 2))
    ).latent_dist
    noise = torch.from_numpy(generator.standard_normal(posterior.mean.shape, np.float32))
    latents: np.ndarray = ((posterior.mean + posterior.std * noise) * 0.18215).detach().numpy()[0]
    return latents


@pytest.fixture
def distill(
    folder: Path,
    tmp_path: Path,
    bundle_folder: Callable[[str], Path],
    pipeline_folder: Callable[[str], Path],
) -> Callable[..., int]:
    """Trains a student of a small pipeline that lacks one branch on the pictures; it goes to ``tmp_path``."""

    def run(kind: str, *arguments: str) -> int:
        candidates = Candidates(ir.load(bundle_folder(kind) / "graphs" / "denoiser.onnx"))
        name = next(n for n, c in candidates.items() if c.kind == "branch")
        plan = tmp_path / "plan.json"
        RemovalPlan(candidates.fingerprint, (name,), "by hand").save(plan)
        command = ["distill", str(pipeline_folder(kind)), "--plan", str(plan), "--data", str(folder)]
        return main([*command, *arguments, "-o", str(tmp_path / "student")])

    return run


@pytest.mark.xdist_group("sd15")
def test_a_student_is_trained_on_pictures_from_the_command_line(
    distill: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("sd15", "--steps", "3", "--batch", "2", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["data"].startswith("3 pictures ") and said["steps"] == 3 and np.isfinite(said["losses"]).all()
    details = json.loads((tmp_path / "student" / "removal.json").read_text())["details"]
    assert details["distilled"]["data"] == said["data"]


@pytest.mark.xdist_group("dit")
def test_a_model_without_an_encoder_is_refused(
    distill: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("dit", "--steps", "1") == 1
    assert "this model has no encoder of pictures" in capsys.readouterr().err
    assert not (tmp_path / "student").exists()
