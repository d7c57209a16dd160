"""What engines for fixed sizes are given, and what is refused with the way out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trimtab.errors import BundleError, InputError
from trimtab.manifest import Contents
from trimtab.program import Task, TensorSpec
from trimtab.runtime.fixed import Fixed, fit
from trimtab.runtime.inputs import Noise, NoiseTape, Request, make_input
from trimtab.runtime.load import load


@pytest.fixture
def contents() -> Contents:
    """A model that draws any size; 64x64 pixels are 8x8 latents."""
    start = TensorSpec("state[0]", "float32", ("batch", 4, "height//8", "width//8"), {"kind": "noise"})
    task = Task((start,), (), {})
    return Contents({"text-to-image": task}, (), (), {}, (64, 64), 8, None, 2, {}, {})


def request(
    contents: Contents, batch: int = 1, rows: int = 2, size: tuple[int, int] | None = None
) -> Request:
    names = tuple("abcdefg"[:batch])
    return Request(
        batch, rows, size or contents.size, Noise((3,)), names, tuple(n.upper() for n in names), guidance=7.5
    )


def latent(contents: Contents) -> tuple[int, int]:
    return contents.size[1] // 8, contents.size[0] // 8


def test_open_sizes_take_any_request_as_it_is(contents: Contents) -> None:
    asked = request(contents, batch=3)
    assert fit(asked, (), contents) == [asked]


def test_a_size_that_nothing_was_built_for_names_those_that_are(contents: Contents) -> None:
    height, width = latent(contents)
    built = (Fixed(1, 2, (height, width)), Fixed(1, 2, (height, 2 * width)))
    w, h = contents.size
    with pytest.raises(
        InputError, match=f"{3 * w}x{h} was asked for and .* {w}x{h}, {2 * w}x{h}: .*--size {3 * w}x{h}"
    ):
        fit(request(contents, size=(3 * w, h)), built, contents)
    assert fit(request(contents, size=(2 * w, h)), built, contents)


@pytest.mark.parametrize(("native", "state"), [((64, 64), (9,)), ((64, 64), ()), ((4, 4), (8, 8))])
def test_what_is_no_size_is_one_line(
    contents: Contents, native: tuple[int, int], state: tuple[int, ...]
) -> None:
    odd = dataclasses.replace(contents, size=native)
    with pytest.raises(BundleError, match=r"fits no size, and \(\d, \d\) is the native one"):
        fit(request(odd), (Fixed(1, 2, state),), odd)


def test_without_guidance_an_engine_for_one_row_is_the_first_choice(contents: Contents) -> None:
    one, two = Fixed(1, 1, latent(contents)), Fixed(1, 2, latent(contents))
    assert fit(request(contents, rows=1), (two, one), contents)[0].rows == 1
    alone = fit(request(contents, rows=1), (two,), contents)[0]
    assert (alone.rows, alone.guidance) == (2, 1.0)  # mix becomes [0, 1]


@pytest.mark.parametrize("scale", [0, 1])
def test_without_guidance_an_engine_for_two_rows_gives_the_negative_one_no_weight(
    contents: Contents, scale: int
) -> None:
    asked = dataclasses.replace(request(contents, rows=1), guidance=-3.0, unguided=scale)
    alone = fit(asked, (Fixed(1, 2, latent(contents)),), contents)[0]
    assert make_input(TensorSpec("mix", "float32", ("rows",), {"kind": "mix"}), alone).tolist() == [0, 1]


@pytest.mark.parametrize("family", ["pixart_sigma"])
def test_engines_of_fixed_sizes_take_the_longest_text(
    family: str, bundle_folder: Callable[[str], Path]
) -> None:
    with load(bundle_folder(family)) as pipe:
        lengths = []
        for sizes in ((), (Fixed(1, 2, (8, 8)),)):
            pipe._sizes = sizes
            _, plan, _ = pipe.prepare("a red circle", size=(64, 64))
            lengths.append(plan.buffers["tokens"].shape[1])
    assert lengths == [32, 300]


def test_guidance_needs_an_engine_for_it(contents: Contents) -> None:
    with pytest.raises(InputError, match="built without: set it to 1"):
        fit(request(contents), (Fixed(1, 1, latent(contents)),), contents)


def test_pictures_are_cut_into_batches_and_the_last_one_is_filled_up(contents: Contents) -> None:
    parts = fit(request(contents, batch=5), (Fixed(2, 2, latent(contents)),), contents)
    assert [part.prompts for part in parts] == [("a", "b"), ("c", "d"), ("e", "e")]
    assert [part.negatives for part in parts] == [("A", "B"), ("C", "D"), ("E", "E")]
    assert all(part.batch == 2 for part in parts)


def test_the_largest_batch_that_is_not_too_large_is_taken(contents: Contents) -> None:
    built = tuple(Fixed(batch, 2, latent(contents)) for batch in (1, 4, 2))
    assert [part.batch for part in fit(request(contents, batch=3), built, contents)] == [2, 2]
    assert [part.batch for part in fit(request(contents, batch=4), built, contents)] == [4]
    assert [part.batch for part in fit(request(contents), built[1:], contents)] == [2]


@pytest.mark.parametrize(
    ("seeds", "own", "distinct"), [((3,), True, 1), ((3, 4, 5), True, 3), ((3, 4, 5), False, 1)]
)
def test_pictures_share_a_draw_from_the_posterior_unless_each_has_a_seed_and_the_model_wants_it(
    contents: Contents, seeds: tuple[int, ...], own: bool, distinct: int
) -> None:
    source = {"kind": "posterior_noise", "own": own}
    spec = TensorSpec("noise", "float32", ("batch", 4, "height//8", "width//8"), source)
    asked = dataclasses.replace(request(contents, batch=3), noise=Noise(seeds))
    whole = make_input(spec, asked)
    assert len(np.unique(whole, axis=0)) == distinct
    parts = fit(dataclasses.replace(asked, noise=Noise(seeds)), (Fixed(1, 2, latent(contents)),), contents)
    assert np.array_equal(np.concatenate([make_input(spec, part) for part in parts]), whole)


def test_parts_move_attention_windows_as_the_whole_does(contents: Contents) -> None:
    spec = TensorSpec("shifts", "int64", (50,), {"kind": "window_shifts", "shifts": 4})
    asked = request(contents, batch=3)
    parts = fit(asked, (Fixed(1, 2, latent(contents)),), contents)
    assert len(parts) == 3
    for part in parts:
        assert np.array_equal(make_input(spec, part), make_input(spec, asked))


@pytest.mark.parametrize("seeds", [(3,), (3, 4, 5)])
def test_parts_see_the_noise_of_the_whole_number_for_number(seeds: tuple[int, ...]) -> None:
    whole = Noise(seeds)
    expected = [whole.normal((3, 2, 4)), whole.normal((1, 5), shared=True), whole.normal((3, 2, 4))]
    tape = NoiseTape(Noise(seeds), 3)
    for pictures in ([0, 1], [2, 2]):
        part = tape.part(pictures)
        for noise in (part, part.again()):
            drawn = [noise.normal((2, 2, 4)), noise.normal((1, 5), shared=True), noise.normal((2, 2, 4))]
            assert np.array_equal(drawn[0], expected[0][pictures])
            assert np.array_equal(drawn[1], expected[1])
            assert np.array_equal(drawn[2], expected[2][pictures])
