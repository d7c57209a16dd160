"""What becomes of a picture's file before a model sees it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
from PIL import Image

from trimtab.errors import InputError
from trimtab.runtime.images import check_place, read_image

ORIENTATION = 0x0112
"""Of the Exif standard: how the camera was held."""


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_read_the_way_it_is_looked_at(tmp_path: Path, orientation: int) -> None:
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


@pytest.mark.parametrize(
    ("kind", "find", "broken"),
    [
        ("png", lambda data: data.rindex(b"IDAT"), b"\xff\xff\xff\xff"),
        ("dds", lambda data: 80, bytes(4)),
    ],
)
def test_a_damaged_picture_is_one_line(tmp_path: Path, kind: str, find: Any, broken: bytes) -> None:
    path = tmp_path / f"photo.{kind}"
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (200, 200, 3), np.uint8)).save(path)
    data = path.read_bytes()
    place = find(data)  # in a PNG, of the second of its pieces
    path.write_bytes(data[:place] + broken + data[place + 4 :])
    with pytest.raises(InputError, match=rf"photo\.{kind} cannot be read as a picture \(.*\): give a PNG"):
        read_image(path, (200, 200))


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-1, 1)])
def test_an_array_of_floats_far_from_0_to_1_is_refused(low: float, high: float) -> None:
    array = np.linspace(low, high, 48, dtype=np.float32).reshape(4, 4, 3)
    with pytest.raises(
        InputError, match=f"from {low} to {high} was given and floats in 0..1 are needed: scale"
    ):
        read_image(array, (4, 4))


def test_an_array_of_levels_is_not_taken_for_one_of_numbers_up_to_1() -> None:
    levels = np.full((6, 9, 3), 255, np.uint8)
    with pytest.raises(InputError, match="uint8 was given and floats"):
        read_image(levels, (9, 6))
    assert np.array_equal(read_image(levels[..., :1] > 0, (9, 6), gray=True), np.ones((1, 6, 9, 1)))


SIZE, OTHER = (56, 40), (32, 24)


def images() -> dict[str, Image.Image]:
    """One image of every mode that PIL reads of common files, with edges at which a threshold is close."""
    random = np.random.RandomState(0)
    coarse = random.randint(0, 256, (10, 14, 4), np.uint8)
    rgba = Image.fromarray(coarse, "RGBA").resize(SIZE, Image.Resampling.BICUBIC)
    rgb, gray = rgba.convert("RGB"), rgba.getchannel(0)
    palette = rgb.quantize(32)
    palette.info["transparency"] = 3
    return {
        "RGB": rgb,
        "RGBA": rgba,
        "L": gray,
        "LA": Image.merge("LA", (gray, rgba.getchannel(3))),
        "1": gray.convert("1"),
        "P": palette,
        "CMYK": rgb.convert("CMYK"),
    }


def mask_of(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """What diffusers' inpainting pipelines make of a mask."""
    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    return np.asarray(processor.preprocess(image, height=size[1], width=size[0])[0, 0])


@pytest.mark.parametrize("size", [SIZE, OTHER])
@pytest.mark.parametrize("mode", images())
def test_masks_are_what_diffusers_mask_processor_makes_of_them(
    mode: str, size: tuple[int, int], tmp_path: Path
) -> None:
    image = images()[mode]
    path = tmp_path / f"mask.{'tiff' if mode == 'CMYK' else 'png'}"
    image.save(path)
    for given, theirs in ((path, load_image(str(path))), (image, image)):
        ours = read_image(given, size, gray=True)[0, ..., 0]
        assert np.array_equal(ours >= 0.5, mask_of(theirs, size) == 1)


@pytest.mark.parametrize("size", [SIZE, OTHER])
@pytest.mark.parametrize("mode", images())
def test_pictures_are_what_diffusers_makes_of_their_files(
    mode: str, size: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / f"picture.{'tiff' if mode == 'CMYK' else 'png'}"
    images()[mode].save(path)
    theirs = VaeImageProcessor(do_normalize=False).preprocess(load_image(str(path)), *size[::-1])
    assert np.array_equal(read_image(path, size), theirs.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("gray", [True, False])
def test_of_16_bits_of_grey_the_upper_8_count(gray: bool, tmp_path: Path) -> None:
    levels = np.asarray(images()["L"])
    deep = Image.fromarray(levels.astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png")
    images()["L"].save(tmp_path / "plain.png")
    for size in (SIZE, OTHER):
        plain = read_image(tmp_path / "plain.png", size, gray=gray)
        for given in (deep, tmp_path / "deep.png"):
            assert np.array_equal(read_image(given, size, gray=gray), plain)


@pytest.mark.parametrize("mode", ["I", "F"])
@pytest.mark.parametrize("gray", [True, False])
def test_pixels_of_an_unknown_range_are_refused_in_one_line(mode: str, gray: bool, tmp_path: Path) -> None:
    image = images()["L"].convert(mode)
    image.save(tmp_path / "odd.tiff")
    for given in (image, tmp_path / "odd.tiff"):
        with pytest.raises(InputError, match="32 bits a pixel"):
            read_image(given, SIZE, gray=gray)


def test_an_image_that_pil_cannot_turn_to_grey_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="the mask cannot be read as a picture"):
        read_image(Image.new("LAB", SIZE), SIZE, gray=True)


@pytest.mark.parametrize("given", [b"\x89PNG", 5, [[[0.5] * 3]], io.BytesIO(b"\x89PNG")])
def test_what_is_no_picture_is_refused_in_one_line(given: Any) -> None:
    with pytest.raises(
        InputError, match=r"the picture is of the type .*: give a file, a PIL image or an array"
    ):
        read_image(given, SIZE)


def test_a_place_where_no_picture_can_be_written_is_refused_before_one_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_place(tmp_path / "new" / "folders" / "x.png")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is no folder that can be written: choose another place"):
        check_place(tmp_path / "file" / "x.png")
    monkeypatch.setattr("os.access", lambda *_: False)  # to root everything is writable
    with pytest.raises(InputError, match="is no folder that can be written"):
        check_place(tmp_path / "x.png")
