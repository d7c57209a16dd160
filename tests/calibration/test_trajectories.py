"""Running a Program before it is a bundle, and recording what its denoiser reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trimtab
from trimtab.bundle import open_bundle
from trimtab.calibration.draft import draft, with_whole_texts
from trimtab.calibration.packing import _together
from trimtab.calibration.trajectories import PROMPTS, own_requests, record
from trimtab.comparison import compare
from trimtab.errors import InputError
from trimtab.program import STATE
from trimtab.storage import read_program

BundleFolder = Callable[[str], Path]


def test_a_draft_of_a_bundles_program_draws_the_bundles_picture(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    folder = bundle_folder("dit")
    program = read_program(open_bundle(folder))
    with trimtab.load(folder) as whole, draft(program, tmp_path) as pipe:
        ours, theirs = (p(label=1, seed=3, schedule=3).pixels for p in (pipe, whole))
    np.testing.assert_array_equal(ours, theirs)


def test_a_recorded_sample_run_again_gives_the_recorded_output(bundle_folder: BundleFolder) -> None:
    with trimtab.load(bundle_folder("dit")) as pipe:
        samples = record(pipe, own_requests(pipe, 1, schedule=3), steps=[0, 2])
        assert [sample.step for sample in samples] == [0, 2]
        import onnxruntime

        graph = pipe.bundle.path(pipe.bundle.contents.segments["denoiser"].graph)
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        for sample in samples:
            (output,) = session.run(["model_output"], sample.inputs)
            np.testing.assert_allclose(output, sample.output, rtol=0, atol=1e-5)


def test_what_no_step_changes_is_kept_once_for_all_of_a_trajectory(bundle_folder: BundleFolder) -> None:
    with trimtab.load(bundle_folder("dit")) as pipe:
        first, second, third, other, *_ = record(pipe, own_requests(pipe, 2, schedule=3))
    assert first.inputs["class_labels"] is second.inputs["class_labels"] is third.inputs["class_labels"]
    assert not np.array_equal(first.inputs["class_labels"], other.inputs["class_labels"])
    assert not np.array_equal(first.inputs[STATE], second.inputs[STATE])


def test_a_samples_first_step_is_the_seeds_noise_in_every_row(bundle_folder: BundleFolder) -> None:
    from trimtab.runtime.noise import NoiseGenerator

    with trimtab.load(bundle_folder("dit")) as pipe:
        (sample,) = record(pipe, own_requests(pipe, 1, seed=5, schedule=3), steps=[0])
    inputs = sample.unguided
    given = np.tensordot(inputs["sample_weights"], inputs[STATE], 1)
    noise = NoiseGenerator(5).normal((1, *given.shape[1:]))
    np.testing.assert_allclose(given, np.concatenate([noise, noise]), rtol=1e-6)


def test_unguided_rows_mix_to_the_guided_prediction(bundle_folder: BundleFolder) -> None:
    import onnxruntime

    with trimtab.load(bundle_folder("dit")) as pipe:
        (sample,) = record(pipe, own_requests(pipe, 1, seed=5, schedule=3), steps=[1])
        graph = pipe.bundle.path(pipe.bundle.contents.segments["denoiser"].graph)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (rows,) = session.run(["model_output"], sample.unguided)
    assert len(rows) == len(sample.inputs["mix"]) == 2
    mixed = np.tensordot(sample.inputs["mix"], rows[:, None], 1)
    np.testing.assert_allclose(mixed, sample.output, rtol=0, atol=1e-5)


@pytest.mark.xdist_group("sd15")
def test_requests_ask_for_prompts_or_named_classes(bundle_folder: BundleFolder) -> None:
    with trimtab.load(bundle_folder("dit")) as pipe:
        requests = own_requests(pipe, 20)
        assert [r["seed"] for r in requests] == list(range(20))
        assert all(0 <= r["label"] < 1000 for r in requests) and "prompt" not in requests[0]
        with pytest.raises(InputError, match="prompts were given, and the model reads none"):
            own_requests(pipe, 1, prompts=("a cat",))
    with trimtab.load(bundle_folder("sd15")) as pipe:
        assert [r["prompt"] for r in own_requests(pipe, 2)] == list(PROMPTS[:2])
        with pytest.raises(InputError, match="no prompts"):
            own_requests(pipe, 1, prompts=())


@pytest.mark.xdist_group("inpaint9")
def test_a_model_that_only_inpaints_is_recorded_and_compared_on_a_picture_of_noise(
    bundle_folder: BundleFolder,
) -> None:
    folder = bundle_folder("inpaint9")
    with trimtab.load(folder) as pipe:
        together = _together(own_requests(pipe, 2, schedule=3))
        for requests, rows in ((own_requests(pipe, 1, schedule=3), 1), (together, 2)):
            (sample,) = record(pipe, requests, steps=[1])
            assert (sample.inputs["mask"] == 1).all() and len(sample.output) == rows
    assert compare(folder, folder, schedule=3)["picture"] == 0


def test_a_step_that_the_schedule_lacks_is_refused(bundle_folder: BundleFolder) -> None:
    with (
        trimtab.load(bundle_folder("dit")) as pipe,
        pytest.raises(InputError, match="step 3 was asked for, and the schedule has 3"),
    ):
        record(pipe, own_requests(pipe, 1, schedule=3), steps=[3])


def test_a_class_goes_by_its_name(bundle_folder: BundleFolder) -> None:
    with trimtab.load(bundle_folder("dit")) as pipe:
        by_number = pipe(label=3, seed=0, schedule=3).pixels
        np.testing.assert_array_equal(pipe(label="thing 3", seed=0, schedule=3).pixels, by_number)
        np.testing.assert_array_equal(pipe(label="3", seed=0, schedule=3).pixels, by_number)
        with pytest.raises(InputError, match=r"no class 'think 3' in this model: did you mean thing 3"):
            pipe(label="think 3", seed=0)


@pytest.mark.parametrize("family", ["pixart_sigma"])
def test_texts_that_are_filled_up_can_be_stacked_and_draw_the_same(
    family: str, bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    program = read_program(open_bundle(bundle_folder(family)))
    long = "a circle that is so red that it takes more letters than any other"
    with (
        draft(program, tmp_path / "open") as short,
        draft(with_whole_texts(program), tmp_path / "whole") as filled,
    ):
        for prompt in ("a red circle", long):
            given: dict[str, Any] = {"prompt": prompt, "seed": 1, "schedule": 3, "size": (64, 64)}
            np.testing.assert_allclose(filled(**given).pixels, short(**given).pixels, atol=1e-5)
            assert filled.prepare(**given)[1].buffers["tokens"].shape == (2, 300)
        samples = [
            record(pipe, [{**given, "prompt": p} for p in ("a red circle", long)], steps=[0])
            for pipe in (short, filled)
        ]
    lengths = [[s.inputs["encoder_hidden_states"].shape[1] for s in some] for some in samples]
    assert lengths == [[32, 96], [300, 300]]


@pytest.mark.parametrize("family", ["dit"])
def test_a_program_without_texts_of_open_length_is_left_as_it_is(
    family: str, bundle_folder: BundleFolder
) -> None:
    program = read_program(open_bundle(bundle_folder(family)))
    assert with_whole_texts(program).tasks == program.tasks
