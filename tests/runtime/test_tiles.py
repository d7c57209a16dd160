"""A decoder on tiles: where they lie, what they give against the whole, and against diffusers' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import trimtab
from trimtab.errors import InputError, TargetError
from trimtab.export.encoders import VaeDecoder, to_picture
from trimtab.manifest import SegmentEntry
from trimtab.program import TensorSpec
from trimtab.runtime.sessions.onnxruntime import OnnxRuntimeCpu
from trimtab.runtime.tiles import OVERLAP, bind_tiled, windows

FACTOR = 2
TILE = 16
SEGMENT = SegmentEntry(
    "vae_decoder",
    "graph.onnx",
    0,
    0,
    (TensorSpec("latents", "float32", ("batch", 4, "h", "w")),),
    (TensorSpec("image", "float32", ("batch", "2*h", "2*w", 3)),),
    (),
)


class Pointwise(nn.Module):
    """A decoder that knows of no neighbours: tiles of it are exact."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        wide = latents[:, :3].repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)
        return to_picture(torch.tanh(wide))


Decode = Callable[..., np.ndarray]


def decoder(module: nn.Module) -> Decode:
    """A decoder, as ``decode(latents, side=None)``; torch runs it, as no engine matters here."""
    shapes: list[tuple[int, ...]] = []

    class Session:
        def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Callable[[], None]:
            @torch.no_grad()
            def run() -> None:
                shapes.append(inputs["latents"].shape)
                outputs["image"][...] = module(torch.from_numpy(inputs["latents"])).numpy()

            return run

        def close(self) -> None: ...

    def decode(latents: np.ndarray, side: int | None = None) -> np.ndarray:
        batch, _, height, width = latents.shape
        image = np.full((batch, height * FACTOR, width * FACTOR, 3), -1, np.float32)
        inputs, outputs = {"latents": latents}, {"image": image}
        shapes.clear()
        if side is None:
            Session().bind(inputs, outputs)()
        else:
            run = bind_tiled(SEGMENT, inputs, outputs, side, lambda name, given: Session(), OnnxRuntimeCpu())
            run()
            assert set(shapes) == {(batch, 4, *(min(side // FACTOR, n) for n in (height, width)))}
        return image

    return decode


@pytest.fixture
def pointwise() -> Decode:
    return decoder(Pointwise())


@pytest.fixture(scope="module")
def vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=TILE * FACTOR,
        scaling_factor=1.0,
    ).eval()
    with torch.no_grad():
        # Nothing is to be clipped: diffusers clips the blended picture, and here every tile is.
        vae.decoder.conv_out.weight *= 0.2
    return vae


def latents(height: int, width: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 4, height, width)).astype(np.float32)


@pytest.mark.parametrize("tile", [4, 5, 8, 16])
def test_weights_add_up_to_one_and_neighbours_share_a_quarter(tile: int) -> None:
    for whole in range(tile, 5 * tile):
        placed = windows(whole, tile, FACTOR)
        total = np.zeros(whole * FACTOR)
        for start, weights in placed:
            assert len(weights) == tile * FACTOR and (weights >= 0).all()
            total[start * FACTOR :][: len(weights)] += weights
        assert np.allclose(total, 1, atol=1e-6)
        first = [start for start, _ in placed]
        assert first[0] == 0 and first[-1] + tile == whole
        assert all(a + tile - b >= tile // OVERLAP for a, b in pairwise(first))


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (40, 40), (10, 33)])
def test_a_decoder_without_neighbours_is_exact(size: tuple[int, int], pointwise: Decode) -> None:
    given = latents(*size, batch=2)
    assert np.abs(pointwise(given, TILE * FACTOR) - pointwise(given)).max() <= 1e-6


def diffusers_tiled(vae: Any, given: np.ndarray) -> np.ndarray:
    """The picture that diffusers decodes on tiles."""
    with torch.no_grad():
        return to_picture(vae.tiled_decode(torch.from_numpy(given), return_dict=False)[0]).numpy()


def test_a_strip_of_tiles_is_what_diffusers_draws(vae: Any) -> None:
    """Up to the place where diffusers begins another tile on either axis, which is cut off at the edge."""
    decode, stride = decoder(VaeDecoder(vae)), TILE - TILE // OVERLAP
    given, end = latents(TILE, TILE + 2 * stride), 3 * stride * FACTOR
    for flip in (False, True):
        given = given.swapaxes(2, 3) if flip else given
        both = [decode(given, TILE * FACTOR), diffusers_tiled(vae, given), decode(given)]
        ours, theirs, whole = (image.swapaxes(1, 2) if flip else image for image in both)
        common = np.s_[:, : stride * FACTOR, :end]
        assert np.abs(ours - theirs)[common].max() <= 1e-5
        assert np.abs(whole - theirs)[common].max() > 1e-3, "tiles make no difference: this shows nothing"


def test_it_is_no_further_from_the_whole_than_diffusers(vae: Any) -> None:
    decode, given = decoder(VaeDecoder(vae)), latents(TILE + 20, TILE + 30)
    ours, theirs, whole = decode(given, TILE * FACTOR), diffusers_tiled(vae, given), decode(given)
    assert np.abs(ours - whole).mean() <= np.abs(theirs - whole).mean()


def test_a_number_that_is_not_finite_is_in_the_picture(pointwise: Decode) -> None:
    given = latents(40, 40)
    given[0, 0, 39, 0] = np.nan
    assert np.isnan(pointwise(given, TILE * FACTOR)).any()


@pytest.mark.parametrize("side", [0, 6, 17, -32])
def test_a_side_that_cannot_be_is_refused(side: int, pointwise: Decode) -> None:
    with pytest.raises(InputError, match="a multiple of 2, 8 or more"):
        pointwise(latents(40, 40), side)


def test_what_takes_more_than_latents_is_refused() -> None:
    given = latents(40, 40)
    inputs = {"latents": given, "more": given}
    outputs = {"image": np.zeros((1, 80, 80, 3), np.float32)}
    with pytest.raises(InputError, match="vae_decoder cannot be run on tiles"):
        bind_tiled(SEGMENT, inputs, outputs, 32, lambda name, given: pytest.fail("loaded"), OnnxRuntimeCpu())


@pytest.mark.parametrize(("latent", "pixel"), [(0, 0), (0, 8), (40, 20)])
def test_what_makes_no_picture_of_latents_is_refused(latent: int, pixel: int) -> None:
    inputs = {"latents": np.zeros((1, 4, latent, latent), np.float32)}
    outputs = {"image": np.zeros((1, pixel, pixel, 3), np.float32)}
    with pytest.raises(InputError, match="vae_decoder cannot be run on tiles"):
        bind_tiled(SEGMENT, inputs, outputs, 32, lambda name, given: pytest.fail("loaded"), OnnxRuntimeCpu())


@pytest.mark.xdist_group("dit")
def test_a_pipeline_decodes_on_tiles(bundle_folder: Callable[[str], Path]) -> None:
    folder = bundle_folder("dit")
    with trimtab.load(folder) as pipe:
        whole = pipe(label=1, seed=0, schedule=3)
    side = whole.pixels.shape[1]
    with trimtab.load(folder, tile=side) as pipe:
        same = pipe(label=1, seed=0, schedule=3)
    assert np.array_equal(same.pixels, whole.pixels)
    assert same.settings == whole.settings | {"tile": side}
    with trimtab.load(folder, tile=side // 2, low_memory=True) as pipe:
        tiled = pipe(label=1, seed=0, schedule=3).pixels
        request, plan, _ = pipe.prepare(label=1, seed=0, schedule=3)
        plan.run(request)
        assert np.array_equal(np.asarray(plan.buffers["picture"]), tiled)
    assert tiled.shape == whole.pixels.shape
    assert np.abs(tiled - whole.pixels).max() > 0


@pytest.mark.xdist_group("dit")
def test_the_guard_looks_through_tiles(bundle_folder: Callable[[str], Path]) -> None:
    with trimtab.load(bundle_folder("dit"), tile=32) as pipe:
        _, plan, _ = pipe.prepare(label=1, seed=0, schedule=3)
        constants = plan.steps[-1].constants
        constants[...] = np.full(constants.shape, 0xFF, constants.dtype)  # every number of this step is NaN
        with pytest.raises(TargetError, match="step 3 of 3"):
            pipe(label=1, seed=0, schedule=3)
