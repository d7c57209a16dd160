"""What becomes of a picture's file before a model sees it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trimtab.errors import InputError
from trimtab.runtime.images import read_image

ORIENTATION = 0x0112
"""Of the Exif standard: how the camera was held."""


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_read_the_way_it_is_looked_at(tmp_path: Path, orientation: int) -> None:
    from diffusers.utils import load_image

    path = tmp_path / "photo.png"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (6, 9, 3), np.uint8)).save(path, exif=exif)
    expected = load_image(str(path))
    assert expected.size == ((9, 6) if orientation < 5 else (6, 9))
    assert np.array_equal(read_image(path, expected.size)[0], np.asarray(expected, np.float32) / 255)


def test_damaged_exif_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", (9, 6), "red").save(path, exif=b"Exif\0\0no such header")
    assert read_image(path, (9, 6)).shape == (1, 6, 9, 3)


def test_an_array_of_levels_is_not_taken_for_one_of_numbers_up_to_1() -> None:
    levels = np.full((6, 9, 3), 255, np.uint8)
    with pytest.raises(InputError, match="uint8 was given and floats"):
        read_image(levels, (9, 6))
    assert np.array_equal(read_image(levels[..., :1] > 0, (9, 6), gray=True), np.ones((1, 6, 9, 1)))
