"""A picture with numbers that are not finite: who made them, and at which step."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import trimtab
from trimtab.bundle import open_bundle, write_manifest
from trimtab.errors import TargetError
from trimtab.runtime.load import Pipeline

REQUEST = {"label": 1, "seed": 3, "schedule": 3}


def poison(pipe: Pipeline, segment: str, output: str, when: Callable[[int], bool]) -> None:
    """Makes an engine write one NaN in some of its runs, counted from 0."""
    session = pipe.engines.session(segment)
    bind = session.bind
    runs = 0

    def bound(inputs, outputs):  # type: ignore[no-untyped-def]
        run = bind(inputs, outputs)

        def poisoned() -> None:
            nonlocal runs
            run()
            runs += 1
            if when(runs - 1):
                outputs[output].reshape((-1,))[7:8][...] = np.nan

        return poisoned

    session.bind = bound  # type: ignore[method-assign]


def test_what_one_picture_left_behind_does_not_spoil_the_next(bundle_folder: Callable[[str], Path]) -> None:
    with trimtab.load(bundle_folder("dit")) as pipe:
        expected = pipe(**REQUEST).pixels  # type: ignore[arg-type]
    with trimtab.load(bundle_folder("dit")) as pipe:
        poison(pipe, "denoiser", "next_sample", lambda run: run in (0, 3))
        with pytest.raises(TargetError, match="at step 1 of 3, in next_sample"):
            pipe(**REQUEST)  # type: ignore[arg-type]
        assert np.array_equal(pipe(**REQUEST).pixels, expected)  # type: ignore[arg-type]


def test_what_an_interrupted_picture_left_behind_does_not_spoil_the_next(
    bundle_folder: Callable[[str], Path],
) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with trimtab.load(bundle_folder("dit")) as pipe:
        expected = pipe(**REQUEST).pixels  # type: ignore[arg-type]
    with trimtab.load(bundle_folder("dit")) as pipe:
        poison(pipe, "denoiser", "next_sample", lambda run: run == 0)
        with pytest.raises(KeyboardInterrupt):
            pipe(**REQUEST, on_step=interrupt)  # type: ignore[arg-type]
        assert np.array_equal(pipe(**REQUEST).pixels, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_segment_and_the_step_are_named(bundle_folder: Callable[[str], Path], step: int) -> None:
    with trimtab.load(bundle_folder("dit")) as pipe:
        poison(pipe, "denoiser", "model_output", lambda run: run % 3 + 1 >= step)
        poison(pipe, "denoiser", "next_sample", lambda run: run % 3 + 1 >= step)
        with pytest.raises(
            TargetError, match=rf"not finite: denoiser gives them first at step {step} of 3, in "
        ) as info:
            pipe(**REQUEST)  # type: ignore[arg-type]
    assert "\n" not in str(info.value) and "mend the model's weights" in str(info.value)


def test_the_decoder_is_named_and_its_precision_is_the_advice(
    bundle_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundle_folder("dit"), tmp_path / "half.bundle"))
    contents = open_bundle(folder).contents
    segments = {
        name: dataclasses.replace(
            s, engines=tuple(dataclasses.replace(e, precision="fp16") for e in s.engines)
        )
        for name, s in contents.segments.items()
    }
    write_manifest(folder, dataclasses.replace(contents, segments=segments))
    with trimtab.load(folder) as pipe:
        output = contents.segments["vae_decoder"].outputs[0].name
        poison(pipe, "vae_decoder", output, lambda run: True)
        with pytest.raises(
            TargetError, match=r"vae_decoder gives them first, in .*--precision fp32 .* of fp16"
        ):
            pipe(**REQUEST)  # type: ignore[arg-type]


def test_what_does_not_come_back_is_not_blamed_on_the_model(bundle_folder: Callable[[str], Path]) -> None:
    with trimtab.load(bundle_folder("dit")) as pipe:
        output = pipe.bundle.contents.segments["vae_decoder"].outputs[0].name
        poison(pipe, "vae_decoder", output, lambda run: run == 0)
        with pytest.raises(TargetError, match="a second run gave none"):
            pipe(**REQUEST)  # type: ignore[arg-type]
