"""Pictures in and out: arrays in 0..1 on one side, files on the other."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import InputError
from trimtab.staging import write_file

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.float32]

_LEAST, _MOST = -0.5, 1.5
"""What a picture that was resized may overshoot by; one in -1..1 or 0..255 is beyond."""


def to_images(pictures: Pixels) -> list[Image]:
    """Pictures (n, height, width, 3) or (n, height, width, 1) in 0..1 as 8-bit images, rounded to nearest.

    Raises:
        InputError: They have channels that no picture has.
    """
    from PIL import Image

    if pictures.ndim != 4 or pictures.shape[-1] not in (1, 2, 3, 4):
        raise InputError(
            f"what was drawn is {pictures.shape}, which no PNG can hold: give a name that ends in .npy"
        )

    levels = np.round(pictures * 255).clip(0, 255).astype(np.uint8)
    return [Image.fromarray(level[..., 0] if level.shape[-1] == 1 else level) for level in levels]


def read_image(
    image: str | Path | Image | Pixels, size: tuple[int, int], *, gray: bool = False, crop: bool = False
) -> Pixels:
    """A picture as (1, height, width, 3) float32 in 0..1, resized by Lanczos where the size differs.

    Args:
        image: A file, a PIL image, or an array (height, width, channels) in 0..1 that has the right size. A file is
            turned the way that its camera says it was held, and transparency is left out, as diffusers' ``load_image``
            does. Of 16 bits of grey the upper 8 count.
        size: (width, height).
        gray: One channel, for masks.
        crop: Cut the largest middle of the size's shape out first, in the place of stretching.

    Raises:
        InputError: The file is missing or no picture, its pixels have neither 8 nor 16 bits, or the array has another
            shape, whole numbers, or numbers far from 0..1 as levels up to 255 are, or -1..1.
    """
    import PIL.Image
    import PIL.ImageOps

    channels = 1 if gray else 3
    if isinstance(image, np.ndarray):
        wanted = (size[1], size[0], channels)
        if image.shape != wanted:
            raise InputError(f"an array of shape {image.shape} was given and {wanted} is needed: resize it")
        if image.dtype.kind not in "fb":  # levels up to 255 would be taken for numbers up to 1
            raise InputError(
                f"an array of {image.dtype} was given and floats in 0..1 are needed: divide by 255"
            )
        if image.dtype.kind == "f" and not (image.min() >= _LEAST and image.max() <= _MOST):
            raise InputError(
                f"an array from {image.min():.3g} to {image.max():.3g} was given and floats in 0..1 are needed: "
                "scale it"
            )
        return np.ascontiguousarray(image[None], np.float32)
    name = str(image) if isinstance(image, str | Path) else f"the {'mask' if gray else 'picture'}"
    if not isinstance(image, str | Path | PIL.Image.Image):
        raise InputError(
            f"{name} is of the type {type(image).__name__}: give a file, a PIL image or an array of floats"
        )
    image = _open(image) if isinstance(image, str | Path) else _eight_bits(name, image)
    if not gray:
        image = _converted(name, image, "RGB")
    if image.size != size:  # a mask as it is, and grey after that, as diffusers' mask processor does
        lanczos = PIL.Image.Resampling.LANCZOS
        image = PIL.ImageOps.fit(image, size, lanczos) if crop else image.resize(size, lanczos)
    if gray:
        image = _converted(name, image, "L")
    return (np.asarray(image, np.float32) / 255.0).reshape(1, size[1], size[0], channels)


def _open(path: str | Path) -> Image:
    """A file as diffusers' ``load_image`` gives it: upright, in RGB; of 16 bits of grey the upper 8."""
    import PIL.Image
    import PIL.ImageOps

    try:
        with PIL.Image.open(path) as file:
            upright: Image = file
            with contextlib.suppress(SyntaxError):  # of what is said to be Exif and is not
                upright = PIL.ImageOps.exif_transpose(file)
            return _converted(str(path), _eight_bits(str(path), upright), "RGB")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give a picture") from None
    except (
        OSError,
        ValueError,
        SyntaxError,  # of a PNG's chunks
        NotImplementedError,  # of a DDS's formats
        PIL.Image.DecompressionBombError,
    ) as error:
        raise InputError(f"{path} cannot be read as a picture ({error}): give a PNG or JPEG") from None


def _eight_bits(name: str, image: Image) -> Image:
    """The image with 8 bits a channel: PIL's own conversion of more cuts them off at 255, so that nearly all is white.

    Raises:
        InputError: Nothing says how bright its brightest is.
    """
    import PIL.Image

    if image.mode.startswith("I;16"):
        return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"{name} has 32 bits a pixel (mode {image.mode}): give a picture of 8 or 16")
    return image


def _converted(name: str, image: Image, mode: str) -> Image:
    try:
        return image.convert(mode)
    except ValueError as error:  # PIL has no way from LAB to grey
        raise InputError(f"{name} cannot be read as a picture ({error}): give an RGB one") from None


def save_png(image: Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Writes a PNG that carries its settings as text chunks.

    Raises:
        InputError: The place cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in settings.items():
        if value is not None:
            info.add_itxt(key, str(value))
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=info)
    write_file(path, data.getvalue())


def save_npy(pixels: Pixels, path: Path) -> None:
    """Writes pictures (n, height, width, 3) as they are, in numpy's format.

    Raises:
        InputError: The place cannot be written.
    """
    data = io.BytesIO()
    np.save(data, pixels, allow_pickle=False)
    write_file(path, data.getvalue())


def check_place(path: Path) -> None:
    """Raises InputError where a name is none for pictures, or no picture can be written there."""
    if path.suffix.lower() not in (".png", ".npy"):
        raise InputError(f"{path} does not end in .png or .npy: choose one of them")
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file")
    there = next(folder for folder in path.parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"{there} is no folder that can be written: choose another place than {path}")


def save(pixels: Pixels, settings: Mapping[str, Any], path: Path) -> list[Path]:
    """Writes pictures (n, height, width, channels): as PNGs NAME-0.png, NAME-1.png, ..., or as one .npy.

    Raises:
        InputError: The place cannot be written.
    """
    if path.suffix.lower() == ".npy":
        save_npy(pixels, path)
        return [path]
    images, paths = to_images(pixels), []
    for index, image in enumerate(images):
        several = {"index": index, "count": len(images)} if len(images) > 1 else {}
        paths.append(path.with_name(f"{path.stem}-{index}{path.suffix}") if several else path)
        save_png(image, paths[-1], {**settings, **several})
    return paths
