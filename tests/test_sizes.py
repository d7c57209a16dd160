"""A model whose table of positions ends somewhere draws up to there, and says so of what is larger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trimtab
from trimtab.bundle import open_bundle
from trimtab.cli import main
from trimtab.errors import InputError
from trimtab.program import check_size
from trimtab.storage import read_program

pytestmark = pytest.mark.xdist_group("sd3")

LARGEST = 32 * 2 * 8
"""Of the tiny SD3 in pixels: positions, latents to a patch, pixels to a latent."""


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1552, 1024), "ends at 1536 pixels a side: use 1536x1024 or smaller"),
        ((16, 1552), "use 16x1536"),
        ((4000, 4001), "multiples of 16: use 1536x1536"),
    ],
)
def test_a_size_beyond_the_largest_is_refused_with_the_largest(size: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_size(size, (1024, 1024), 16, None, 1536)


def test_the_largest_size_itself_can_be_asked_for_and_without_a_largest_any() -> None:
    check_size((1536, 1536), (1024, 1024), 16, None, 1536)
    check_size((16000, 1600), (1024, 1024), 16, None)


def test_the_largest_picture_of_a_cropped_table_equals_diffusers(
    bundle_folder: Callable[[str], Path], diffusers_pipeline: Callable[[str], Any]
) -> None:
    with trimtab.load(bundle_folder("sd3")) as pipe:
        ours = pipe("a red cat", seed=0, size=(LARGEST, 32), schedule=3)
    theirs = diffusers_pipeline("sd3")(
        "a red cat",
        width=LARGEST,
        height=32,
        num_inference_steps=3,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="np",
    ).images
    assert theirs.std() > 0.05
    assert np.abs(ours.pixels - theirs).max() <= 1e-3


def test_one_patch_more_than_the_table_has_is_refused_before_anything_runs(
    bundle_folder: Callable[[str], Path],
    pipeline_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle, size = str(bundle_folder("sd3")), f"64x{LARGEST + 16}"
    out = ["-o", str(tmp_path / "x.png")]
    for arguments in (
        ["run", bundle, "--prompt", "x", "--size", size, *out],
        ["plan", bundle, "--target", "cpu", "--size", size],
        ["compile", str(pipeline_folder("sd3")), "--size", size, *out],
    ):
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert f"ends at {LARGEST} pixels a side: use 64x{LARGEST}" in captured.err
        assert "exported" not in captured.err
    assert not list(tmp_path.iterdir())


def test_a_compiled_denoiser_in_diffusers_hands_refuses_it_too(
    bundle_folder: Callable[[str], Path], diffusers_pipeline: Callable[[str], Any]
) -> None:
    denoiser = trimtab.Denoiser(bundle_folder("sd3"), diffusers_pipeline("sd3").transformer)
    given = {"encoder_hidden_states": torch.zeros(1, 5, 32), "pooled_projections": torch.zeros(1, 32)}
    assert denoiser(torch.zeros(1, 16, 4, 64), timestep=5, **given).sample.shape == (1, 16, 4, 64)
    with pytest.raises(InputError, match=r"latents of 66x4 were given .* ends at 64 a side"):
        denoiser(torch.zeros(1, 16, 4, 66), timestep=5, **given)


def test_the_largest_side_is_in_the_bundle_and_older_bundles_have_none(
    bundle_folder: Callable[[str], Path],
) -> None:
    assert read_program(open_bundle(bundle_folder("sd3"))).largest_side == LARGEST
