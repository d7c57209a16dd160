"""Trained weights of a denoiser with layers removed: into a file, and back into the graph by initializer name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimtab.errors import InputError, PassError, did_you_mean
from trimtab.staging import write_file
from trimtab.weights import fingerprint

WEIGHTS = "weights.safetensors"
"""The file beside a plan in a student's folder."""

_TEACHER = "trimtab.teacher"

Array = npt.NDArray[Any]


def save_weights(folder: Path, weights: Mapping[str, Array], teacher: str) -> None:
    """Writes a student's weights.

    Args:
        folder: Of the plan.
        weights: Initializer -> float32 array.
        teacher: `digest` of the graph that training started from.
    """
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    write_file(folder / WEIGHTS, save(arrays, metadata={_TEACHER: teacher}))


def check_weights(folder: Path) -> None:
    """Refuses weights in a student's folder whose file is damaged, by its first bytes; a folder may lack them.

    Raises:
        InputError: The file is cut short, or none of weights.
    """
    if (folder / WEIGHTS).exists():
        with _opened(folder / WEIGHTS):
            pass


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no file of weights or is cut short ({error}): copy it again") from error


def put_back(model: ir.Model, folder: Path) -> ir.Model:
    """Gives a graph the weights of a student's folder.

    Args:
        model: The teacher with the student's layers removed; edited in place.
        folder: What `save_weights` wrote to.

    Raises:
        InputError: The file is damaged, or its weights are not finite.
        PassError: It was trained from other weights, or from a graph that was exported otherwise.
    """
    path = folder / WEIGHTS
    with _opened(path) as file:
        teacher = (file.metadata() or {}).get(_TEACHER)
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    initializers = model.graph.initializers
    known = all(name in initializers and initializers[name].const_value is not None for name in weights)
    if not known or digest(model, weights) != teacher:
        raise PassError(
            f"{path} was trained from other weights than this model's, or with another version of the exporter: "
            "distill from this one"
        )
    for name, array in weights.items():
        tensor = initializers[name].const_value
        assert tensor is not None
        if array.shape != tuple(tensor.shape.numpy()) or array.dtype != tensor.dtype.numpy():
            raise PassError(f"{path}: {name} has another shape or type than the graph's: distill again")
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {name} is not finite: distill again")
    for name, array in weights.items():
        initializers[name].const_value = ir.tensor(array, name=name)
    return model


def assembled(teacher: ir.Model, names: Iterable[str], starts: Mapping[str, str]) -> dict[str, Array]:
    """What a student's modules start from where it is not their own weights: those of any other of the teacher's.

    A-SDM's model assembly (https://arxiv.org/abs/2406.00210, abstract): blocks of the teacher, put together.

    Args:
        teacher: The whole graph.
        names: The student's initializers.
        starts: Module of the student -> module of the teacher, which the student may lack, with the same weights
            inside.

    Returns:
        Initializer of the student -> array.

    Raises:
        PassError: There is no such module, or its weights have other names or shapes.
    """
    found: dict[str, Array] = {}
    for own, other in starts.items():
        inside = [name for name in names if name.startswith(f"{own}.")]
        if not inside:
            hint = did_you_mean(own, {n.rpartition(".")[0] for n in names}, "give the path of one that has")
            raise PassError(f"the student has no module {own} with weights of its own: {hint}")
        for name in inside:
            source = other + name.removeprefix(own)
            tensor = (
                teacher.graph.initializers[source].const_value
                if source in teacher.graph.initializers
                else None
            )
            value = teacher.graph.initializers[name].const_value
            assert value is not None
            if tensor is None or tuple(tensor.shape.numpy()) != tuple(value.shape.numpy()):
                has = (
                    "is none of the teacher's weights"
                    if tensor is None
                    else f"is {list(tensor.shape.numpy())}"
                )
                raise PassError(
                    f"{own} cannot start from {other}: {name} is {list(value.shape.numpy())} and {source} {has}"
                )
            found[name] = np.array(tensor.numpy())
    return found


def digest(model: ir.Model, names: Iterable[str]) -> str:
    """The `fingerprint` of some initializers as they stand in a graph."""

    def array(name: str) -> Array:
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        return tensor.numpy()

    return fingerprint((name, array(name)) for name in sorted(names))
