"""Nodes around foreign graphs, so that they take and give what the runtime has.

The runtime has float32 latents, a float32 scalar time step, and pictures (batch, height, width, channels) in
0..1; foreign graphs have any float type, time steps of any type and shape, and pictures as their decoder
makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimtab.errors import ExportError
from trimtab.export.onnx.description import DecoderTable
from trimtab.export.onnx.graphs import CONVERTED_OPSET, IR_VERSION, Foreign
from trimtab.passes.constants import add_constant
from trimtab.passes.scopes import SCOPES

SCOPE = "adapter"
"""The module path that the new nodes carry."""

_FUSED = ("state", "sample_weights", "mix", "next_weights", "clip_weights", "noise")
RESERVED = frozenset(
    (
        *_FUSED,
        "next_sample",
        "model_output",
        "clipped",
        "sample",
        "timestep",
        "prediction",
        "latents",
        "image",
    )
)
"""What trimtab calls values of its own; whatever a foreign graph calls so is renamed."""

Dims = Sequence[int | str]


class Adapter:
    """Puts nodes in front of one graph's inputs and behind its outputs.

    Args:
        foreign: The graph, edited in place. Whatever has a name of `RESERVED` is renamed at once.
    """

    def __init__(self, foreign: Foreign) -> None:
        self.foreign = foreign
        self.graph = foreign.model.graph
        self._first = next(iter(self.graph), None)
        self._count = 0
        self._inputs = {str(value.name): value for value in self.graph.inputs}
        values = [*self.graph.inputs, *self.graph.initializers.values()]
        values += [output for node in self.graph.all_nodes() for output in node.outputs]
        names = {str(value.name) for value in values}
        for value in values:
            if value.name in RESERVED:
                fresh = f"{value.name}.own"
                while fresh in names:
                    fresh += "_"
                names.add(fresh)
                value.name = fresh

    def input(self, name: str) -> ir.Value:
        """The input that had this name in the file."""
        return self._inputs[name]

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType,
        *,
        behind: bool = False,
        **attributes: int | list[int],
    ) -> ir.Value:
        """One operator's result, computed before the foreign nodes or ``behind`` them."""
        self._count += 1
        name = f"{op.lower()}_{self._count}"
        made = ir.node(op, list(inputs), attributes, name=f"{SCOPE}/{name}")
        made.metadata_props[SCOPES] = repr(["", SCOPE, name])
        result = made.outputs[0]
        result.name, result.type = f"{SCOPE}/{name}", ir.TensorType(dtype)
        if behind or self._first is None:
            self.graph.append(made)
        else:
            self.graph.insert_before(self._first, made)
        return result

    def ints(self, values: Sequence[int]) -> ir.Value:
        """A constant (n,) int64."""
        return self.constant(np.array(values, np.int64))

    def floats(self, values: Sequence[float] | float) -> ir.Value:
        """A constant float32, scalar for one bare number."""
        return self.constant(np.array(values, np.float32))

    def constant(self, array: npt.NDArray[Any]) -> ir.Value:
        """A constant."""
        self._count += 1
        return add_constant(self.graph, f"{SCOPE}/constant_{self._count}", array)

    def cast(self, value: ir.Value, dtype: ir.DataType, *, behind: bool = False) -> ir.Value:
        """The value in another type."""
        return (
            value if value.dtype == dtype else self.node("Cast", [value], dtype, behind=behind, to=int(dtype))
        )

    def new_input(self, name: str, dtype: ir.DataType, dims: Dims) -> ir.Value:
        """A graph input, put behind the others."""
        value = ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))
        self.graph.inputs.append(value)
        return value

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Lets everything that read the graph input ``old`` read ``new``, of any type, in its stead."""
        assert old.dtype is not None
        cast = self.cast(new, old.dtype)
        ir.convenience.replace_all_uses_with(old, cast, replace_graph_outputs=True)
        self.graph.inputs.remove(old)

    def rows(self, like: ir.Value) -> ir.Value:
        """How many rows a value has: (1,) int64."""
        return self.node("Shape", [like], ir.DataType.INT64, start=0, end=1)

    def spread(self, value: ir.Value, old: ir.Value, like: ir.Value | None) -> None:
        """Replaces the input ``old`` by a value that is the same for every row of ``like``.

        Args:
            value: Of fewer or as many axes as ``old``.
            old: Its first axis may be open, and is then filled with rows.
            like: Has the rows; None where nothing has.

        Raises:
            ExportError: Another axis is open, or the first one and nothing has rows.
        """
        assert old.shape is not None and value.dtype is not None
        dims = list(old.shape)
        if dims:
            if not all(isinstance(dim, int) for dim in dims[1:]):
                raise ExportError(
                    f"{self.foreign.file}: the input {old.name} has the shape {old.shape}, and behind the rows "
                    "its axes must be fixed to take one value for all of them: export it so"
                )
            target: ir.Value
            if isinstance(dims[0], int):
                target = self.ints([int(dim) for dim in dims if isinstance(dim, int)])
            elif like is None:
                raise ExportError(
                    f"{self.foreign.file}: the input {old.name} has one value a row, and no other input has "
                    "rows: export it with a fixed size"
                )
            else:
                rest = [int(dim) for dim in dims[1:] if isinstance(dim, int)]
                target = self.rows(like)
                if rest:
                    target = self.node("Concat", [target, self.ints(rest)], ir.DataType.INT64, axis=0)
            value = self.node("Expand", [value, target], value.dtype)
        self.replace(old, value)


def adapt_denoiser(adapter: Adapter, sample: ir.Value, timestep: ir.Value, prediction: ir.Value) -> None:
    """Gives a denoiser the inputs ``sample`` and ``timestep`` and the output ``prediction``.

    Args:
        adapter: Of the denoiser's graph.
        sample: (rows, C, h, w), any float type; keeps its own, since `FuseSampler` casts.
        timestep: A scalar, or one value a row, of any number type; becomes a float32 scalar.
        prediction: (rows, C, h, w), or with more channels, of which the first C are the prediction.
    """
    graph = adapter.graph
    assert sample.shape is not None
    channels = sample.shape[1]
    assert isinstance(channels, int)
    sample.name = "sample"
    adapter.spread(adapter.new_input("timestep", ir.DataType.FLOAT, ()), timestep, sample)
    assert prediction.dtype is not None
    result = prediction
    if prediction.shape is None or prediction.shape[1] != channels:
        # A learned variance, which no scheduler here reads, lies behind the prediction (Nichol and Dhariwal
        # 2021, sec. 3.1). Where the graph does not say how many channels there are, this keeps C of C.
        bounds = [adapter.ints([number]) for number in (0, channels, 1)]
        result = adapter.node("Slice", [prediction, *bounds], prediction.dtype, behind=True)
    result.name = "prediction"
    result.shape = sample.shape
    graph.outputs[:] = [result]


def adapt_decoder(adapter: Adapter, table: DecoderTable, latents: ir.Value, picture: ir.Value) -> None:
    """Gives a decoder the input ``latents`` (batch, C, h, w) and the output ``image`` (batch, H, W, colors).

    Args:
        adapter: Of the decoder's graph.
        table: How its latents are scaled and how its picture comes out.
        latents: Any float type.
        picture: Any float type, in ``table.layout``.
    """
    assert latents.shape is not None and picture.shape is not None
    float32 = ir.DataType.FLOAT
    value = adapter.new_input("latents", float32, [_plain(dim) for dim in latents.shape])
    if table.scale != 1:
        value = adapter.node("Div", [value, adapter.floats(table.scale)], float32)
    if table.shift != 0:
        value = adapter.node("Add", [value, adapter.floats(table.shift)], float32)
    adapter.replace(latents, value)
    picture_pixels(adapter, picture, table.layout, table.range)


def _plain(dim: int | ir.SymbolicDim) -> int | str:
    return dim if isinstance(dim, int) else str(dim.value)


def picture_pixels(adapter: Adapter, picture: ir.Value, layout: str, levels: tuple[float, float]) -> None:
    """Makes ``picture`` the output ``image``: float32 in 0..1 where it is finite, channels last."""
    assert picture.shape is not None
    float32, (black, white) = ir.DataType.FLOAT, levels
    value = adapter.cast(picture, float32, behind=True)
    dims = [_plain(dim) for dim in picture.shape]
    if (black, white) != (0, 1):
        # x / 2 + 0.5 for -1..1, in diffusers' own order.
        value = adapter.node("Div", [value, adapter.floats(white - black)], float32, behind=True)
        value = adapter.node("Add", [value, adapter.floats(-black / (white - black))], float32, behind=True)
    # What is not finite stays so, whatever a Clip makes of it: see `trimtab.export.encoders.to_picture`.
    clipped = adapter.node("Clip", [value, adapter.floats(0.0), adapter.floats(1.0)], float32, behind=True)
    size = adapter.node("Abs", [value], float32, behind=True)
    finite = adapter.node("Less", [size, adapter.floats(np.inf)], ir.DataType.BOOL, behind=True)
    value = adapter.node("Where", [finite, clipped, value], float32, behind=True)
    if layout == "NCHW":
        value = adapter.node("Transpose", [value], float32, behind=True, perm=[0, 2, 3, 1])
        dims = [dims[0], dims[2], dims[3], dims[1]]
    value.name, value.shape = "image", ir.Shape(dims)
    adapter.graph.outputs[:] = [value]


def pixel_graph(channels: int) -> ir.Model:
    """What stands in the decoder's place in pixel space: -1..1 (batch, C, H, W) -> 0..1 (batch, H, W, C)."""
    dims = ("batch", channels, "latent_height", "latent_width")
    latents = ir.Value(name="latents", shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([latents], [latents], nodes=[], opset_imports={"": CONVERTED_OPSET}, name="pixels")
    model = ir.Model(graph, ir_version=IR_VERSION)
    adapter = Adapter(Foreign("pixels", Path("pixels"), model))
    latents.name = "latents"
    picture_pixels(adapter, latents, "NCHW", (-1.0, 1.0))
    return model
