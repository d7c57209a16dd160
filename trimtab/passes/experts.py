"""Convolutions whose kernel is a mixture of experts by time step: more capacity for a step that costs the same.

In the manner of A-SDM's multi-expert conditional convolution (https://arxiv.org/abs/2406.00210, of which only the
abstract could be read), after CondConv (https://arxiv.org/abs/1904.04971, eq. 1) with a routing that reads nothing but
the time step:

    W(t) = common + sum over k of routing[range of t, k] * experts[k]

The common kernel is one more expert, which every step has whole: so it learns from every time step, and the others
what is special to theirs. Training time is cut into equal ranges, and a kernel is constant within one: so
`trimtab.passes.mix_kernels` can mix while compiling, and what is trained is what runs.
"""

from __future__ import annotations

import fnmatch
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimtab.errors import InputError, PassError, did_you_mean
from trimtab.passes.base import Pass, PassResult, Refusal
from trimtab.passes.constants import add_constant
from trimtab.passes.scopes import SCOPES
from trimtab.staging import write_file

FILE = "experts.json"
"""The file beside a plan in a student's folder."""

TIMESTEP = "timestep"
"""The denoiser's input that says the time step, from 0 (a picture) to `SPAN` (noise)."""

SPAN = 1000.0
"""Time steps of training in every family that is exported; flow matching's are 1000 sigma."""

EXPERTS, ROUTING = ".experts", ".routing"
"""How the names of their initializers end."""

_SCHEMA = 1


@dataclass(frozen=True)
class Experts:
    """Which convolutions become mixtures, and of what.

    Attributes:
        count: Experts a kernel, beside the common one; no more than ranges, as more could say nothing more.
        ranges: Equal parts of the time steps, each with a mixture of its own: as many kernels come to a device.
        modules: Convolutions by module path, ``*`` allowed; none for `convolutions`.
    """

    count: int = 4
    ranges: int = 4
    modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 2 <= self.count <= self.ranges:
            raise InputError(
                f"{self.count} experts in {self.ranges} ranges of time steps were asked for: give two experts or more, "
                "and at least as many ranges"
            )

    def save(self, folder: Path) -> None:
        """Writes them beside a plan."""
        entry = {
            "schema": _SCHEMA,
            "count": self.count,
            "ranges": self.ranges,
            "modules": list(self.modules),
        }
        write_file(folder / FILE, json.dumps(entry, indent=1).encode())


def load_experts(folder: Path) -> Experts | None:
    """Those of a student's folder, or None where it has none.

    Raises:
        InputError: The file cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != _SCHEMA:
            raise ValueError("another schema")
        modules = data["modules"]
        if not isinstance(modules, list) or any(not isinstance(name, str) for name in modules):
            raise TypeError("module paths are needed")
        return Experts(int(data["count"]), int(data["ranges"]), tuple(modules))
    except (OSError, ValueError, TypeError, KeyError, InputError) as error:
        raise InputError(f"{path} says no experts of this version ({error}): distill again") from error


def convolutions(model: ir.Model) -> dict[str, ir.Node]:
    """Module path -> convolution, for those in repeated blocks (a number in the path) that see their neighbours.

    The first and the last convolution and the 1x1 ones, which mix channels alone, are not among them.
    """
    return {
        path: node
        for path, node in _all(model).items()
        if any(part.isdigit() for part in path.split(".")) and math.prod(_kernel(node)[2:]) > 1
    }


class AddExperts(Pass):
    """Make mixtures of convolutions, each of which computes at first what it did.

    The common kernel starts as the kernel itself, and the experts as zeros. Each has the whole weight at its own
    place in time, less towards its neighbours': so they learn different things. Initializers in the place of
    ``NAME``, float32: ``NAME.common`` (as it was), ``NAME.experts`` (count, O * I * kernel) and ``NAME.routing``
    (ranges, count).

    Exact: bit for bit, until the experts are trained.

    Args:
        experts: How many, and where.
    """

    def __init__(self, experts: Experts) -> None:
        self.experts = experts

    def call(self, model: ir.Model) -> PassResult:
        """Edits the graph.

        Raises:
            PassError: A module path that fits no convolution, or a graph without time steps.
        """
        timestep = next((value for value in model.graph.inputs if value.name == TIMESTEP), None)
        if timestep is None or timestep.shape is None or timestep.shape.rank() != 0:
            raise PassError(f"experts are chosen by the graph's scalar input {TIMESTEP}, and it has none")
        applied, refused = [], []
        index: ir.Value | None = None
        for path, node in self._chosen(model).items():
            weight = node.inputs[1]
            assert weight is not None
            if weight.const_value is None:
                refused.append(Refusal(path, "its kernel is computed, as that of a mixture is"))
            elif len(weight.uses()) > 1:
                refused.append(Refusal(path, "others read its kernel too"))
            else:
                index = _range(model.graph, timestep, self.experts.ranges) if index is None else index
                _mix(model.graph, node, weight, index, self.experts)
                applied.append(path)
        return PassResult(model, bool(applied), applied=tuple(applied), refused=tuple(refused))

    def _chosen(self, model: ir.Model) -> dict[str, ir.Node]:
        if not self.experts.modules:
            return convolutions(model)
        every = _all(model)
        chosen: dict[str, ir.Node] = {}
        for glob in self.experts.modules:
            found = {path: node for path, node in every.items() if fnmatch.fnmatchcase(path, glob)}
            if not found:
                hint = did_you_mean(glob, every, "give the path of one")
                raise PassError(f"no convolution is called {glob}: {hint}")
            chosen |= found
        return chosen


def hats(ranges: int, count: int) -> npt.NDArray[np.float32]:
    """Which expert a range starts with: (ranges, count) float32, rows that add up to 1, linear between places."""
    places = np.linspace(0, count - 1, ranges)
    distance = np.abs(places[:, None] - np.arange(count))
    weights: npt.NDArray[np.float32] = np.maximum(0, 1 - distance).astype(np.float32)
    return weights


def _all(model: ir.Model) -> dict[str, ir.Node]:
    """Module path -> convolution, by the name of its kernel."""
    found = {}
    for node in model.graph:
        if node.op_type == "Conv" and (weight := node.inputs[1]) is not None and weight.name:
            found[weight.name.removesuffix(".weight")] = node
    return found


def _kernel(node: ir.Node) -> tuple[int, ...]:
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    return tuple(weight.shape.numpy())


def _range(graph: ir.Graph, timestep: ir.Value, ranges: int) -> ir.Value:
    """Where a time step lies: a scalar int64 from 0 to ranges - 1. The highest, `SPAN`, belongs to the last range."""
    scale = add_constant(graph, "experts/scale", np.array(ranges / SPAN * (1 - 1e-6), np.float32))
    cast = ir.node("Cast", [timestep], {"to": int(ir.DataType.FLOAT)}, name="experts/timestep")
    place = ir.node("Mul", [cast.outputs[0], scale], name="experts/place")
    index = ir.node("Cast", [place.outputs[0]], {"to": int(ir.DataType.INT64)}, name="experts/range")
    for node, dtype in ((cast, ir.DataType.FLOAT), (place, ir.DataType.FLOAT), (index, ir.DataType.INT64)):
        _typed(node, dtype, ())
    graph.insert_before(graph[0], [cast, place, index])
    return index.outputs[0]


def _mix(graph: ir.Graph, node: ir.Node, weight: ir.Value, index: ir.Value, experts: Experts) -> None:
    tensor, name = weight.const_value, str(weight.name)
    assert tensor is not None
    kernel = tensor.numpy().astype(np.float32)
    node.replace_input_with(1, None)
    del graph.initializers[name]
    common = add_constant(graph, f"{name}.common", kernel)
    held = add_constant(graph, name + EXPERTS, np.zeros((experts.count, kernel.size), np.float32))
    table = add_constant(graph, name + ROUTING, hats(experts.ranges, experts.count))
    sizes = add_constant(graph, f"{name}.sizes", np.array(kernel.shape, np.int64))
    row = ir.node("Gather", [table, index], {"axis": 0}, name=f"{name}.row")
    mixed = ir.node("MatMul", [row.outputs[0], held], name=f"{name}.mixed")
    shaped = ir.node("Reshape", [mixed.outputs[0], sizes], name=f"{name}.special")
    whole = ir.node("Add", [common, shaped.outputs[0]], name=name)
    _typed(row, ir.DataType.FLOAT, (experts.count,))
    _typed(mixed, ir.DataType.FLOAT, (kernel.size,))
    _typed(shaped, ir.DataType.FLOAT, kernel.shape)
    _typed(whole, ir.DataType.FLOAT, kernel.shape)
    for made in (row, mixed, shaped, whole):
        if SCOPES in node.metadata_props:
            made.metadata_props[SCOPES] = node.metadata_props[SCOPES]
    graph.insert_before(node, [row, mixed, shaped, whole])
    node.replace_input_with(1, whole.outputs[0])


def _typed(node: ir.Node, dtype: ir.DataType, shape: tuple[int, ...]) -> None:
    output = node.outputs[0]
    output.name, output.type, output.shape = node.name, ir.TensorType(dtype), ir.Shape(shape)
