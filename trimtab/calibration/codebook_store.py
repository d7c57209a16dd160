"""A folder of packed weights on disk, which a calibration that was cut off goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt

from trimtab.errors import CalibrationError
from trimtab.passes import vq_op
from trimtab.passes.codebooks import FORMATS, PackedWeight
from trimtab.staging import write_file

SCHEMA = 1
INDEX = "codebooks.json"
PARAMETERS = "parameters"
"""Its file in a store; those of weights end in .safetensors."""


class CodebookStore:
    """A folder of packed weights, one file each: what was done stays done when the work is cut off.

    Args:
        folder: Made where it is missing.
        fingerprint: Of the model's weights.
        settings: Plain data that decide the result; a store of other settings is refused.

    Raises:
        CalibrationError: The folder holds codebooks of another model or other settings, or of a newer trimtab.
    """

    def __init__(self, folder: Path, fingerprint: str, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        # As JSON gives them back, so that the two compare.
        settings = json.loads(json.dumps(dict(settings)))
        wanted = {"schema": SCHEMA, "fingerprint": fingerprint, "settings": settings}
        index = folder / INDEX
        if not index.exists():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise CalibrationError(f"{folder} is there and holds no {INDEX}: name an empty folder")
            write_file(index, json.dumps(wanted, indent=1, sort_keys=True).encode())
            return
        found = read_index(folder)
        if found["fingerprint"] != fingerprint:
            raise CalibrationError(
                f"{folder} holds the codebooks of another model: name another folder, or delete this one"
            )
        if found["settings"] != settings:
            raise CalibrationError(
                f"{folder} holds codebooks made with other settings ({_difference(found['settings'], settings)}): "
                "name another folder, or delete this one"
            )

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def names(self) -> list[str]:
        """The weights that are done."""
        return sorted(unquote(path.stem) for path in self.folder.glob("*.safetensors"))

    def put(self, name: str, weight: PackedWeight) -> None:
        """Writes one weight; the file is whole or not there."""
        from safetensors.numpy import save

        tensors = {"codes": weight.codes, "codebook": weight.codebook}
        if weight.scale is not None:
            tensors["scale"] = weight.scale
        notes = {
            "bits": weight.bits,
            "columns": weight.columns,
            "error": weight.error,
            "method": weight.method,
        }
        data = save(
            {key: np.ascontiguousarray(array) for key, array in tensors.items()},
            metadata={"name": name, "trimtab": json.dumps(notes)},
        )
        write_file(self._path(name), data)

    def get(self, name: str) -> PackedWeight:
        """Reads one weight.

        Raises:
            CalibrationError: The file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(name)
        try:
            with safe_open(path, "numpy") as file:
                notes = json.loads(file.metadata()["trimtab"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            packed = PackedWeight(
                bits=int(notes["bits"]),
                codes=tensors["codes"],
                codebook=tensors["codebook"],
                scale=tensors.get("scale"),
                columns=int(notes["columns"]),
                error=float(notes["error"]),
                method=str(notes["method"]),
            )
            whole = _fits(packed)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            whole = False
        if not whole:
            raise CalibrationError(f"{path} is damaged: delete it, and run this again")
        return packed

    def has_parameters(self) -> bool:
        """Whether what was trained beside the codes is there: it is written last."""
        return (self.folder / PARAMETERS).is_file()

    def put_parameters(self, parameters: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Writes what was trained beside the codes; the file is whole or not there."""
        from safetensors.numpy import save

        write_file(
            self.folder / PARAMETERS, save({k: np.ascontiguousarray(v) for k, v in parameters.items()})
        )

    def get_parameters(self) -> dict[str, npt.NDArray[np.float32]]:
        """Reads what was trained beside the codes.

        Raises:
            CalibrationError: The file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = self.folder / PARAMETERS
        try:
            return dict(load(path.read_bytes()))
        except (OSError, ValueError, SafetensorError):
            raise CalibrationError(f"{path} is damaged: delete it, and run this again") from None

    def _path(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.safetensors"


def read_index(folder: Path) -> dict[str, Any]:
    """What a store says of itself: ``fingerprint`` and ``settings``.

    Raises:
        CalibrationError: There is none, or it cannot be read.
    """
    path = folder / INDEX
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        schema, _, _ = found["schema"], found["fingerprint"], found["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CalibrationError(f"{path} cannot be read: delete {folder}, and run this again") from None
    if schema != SCHEMA:
        raise CalibrationError(f"{path} has schema {schema}, and {SCHEMA} is read: upgrade trimtab")
    return found


def _fits(packed: PackedWeight) -> bool:
    """Whether every code has a codeword, and the parts have the sizes that they need."""
    if packed.bits not in FORMATS or packed.codes.dtype != np.uint8 or packed.codebook.dtype != np.float32:
        return False
    if packed.codes.ndim != 2 or packed.codebook.shape[1:] != (FORMATS[packed.bits].length,):
        return False
    codes = vq_op.unpack_indices(packed.codes, packed.index_bits)
    count = -(-packed.columns // packed.codebook.shape[1])
    return bool(
        count <= codes.shape[1] < count + 4
        and int(codes.max(initial=0)) < len(packed.codebook)
        and (packed.scale is None or packed.scale.shape == (len(codes),))
    )


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    return ", ".join(f"{name} {found.get(name)!r} and not {wanted.get(name)!r}" for name in names)
