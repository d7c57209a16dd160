"""Where the inputs of foreign graphs come from: the host, constants, or the outputs of other graphs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from trimtab.errors import ExportError, InputError, TrimtabError, first_line, nearest
from trimtab.export.onnx.adapt import Adapter
from trimtab.export.onnx.description import GraphTable, Host, Label, Numbers, Outputs, Tokens, Wire
from trimtab.export.onnx.graphs import Foreign
from trimtab.export.parts import Parts
from trimtab.export.source import tokenizer_json
from trimtab.passes.sampler import ROWS_BATCH
from trimtab.program import TensorSpec


@dataclass
class Wires:
    """Connects inputs, and collects in `parts` what the host must provide.

    Attributes:
        toml: The file that says how, for errors.
        parts: Gains inputs and tokenizers.
        guided: Guidance has a default scale.
        made: (table, output) -> the value that an earlier graph gives.
    """

    toml: Path
    parts: Parts
    guided: bool
    made: dict[tuple[str, str], ir.Value] = field(default_factory=dict)

    def check(self, foreign: Foreign, table: GraphTable, own: frozenset[str] = frozenset()) -> None:
        """Every input has a wire, or is one of the graph's ``own``; every wire an input.

        Raises:
            InputError: With the names.
        """
        section = f"[{table.name}.inputs]"
        names = [str(value.name) for value in foreign.model.graph.inputs]
        for name in table.inputs:
            if name not in names or name in own:
                free = [known for known in names if known not in own]
                problem = (
                    f"{self.toml}: {section} has {name!r}, which is no input of {foreign.file.name} to fill"
                )
                raise InputError(f"{problem}: {nearest(name, free)}")
        missing = [name for name in names if name not in table.inputs and name not in own]
        if missing:
            raise InputError(
                f"{foreign.file} needs the input {missing[0]!r}, and {self.toml.name} says nothing of it: "
                f"write {missing[0]} = ... under {section}"
            )

    def connect(self, adapter: Adapter, table: GraphTable, like: ir.Value | None) -> dict[str, str]:
        """Connects all inputs of a graph.

        Args:
            adapter: Of the graph.
            table: What it is connected to.
            like: The input that has the graph's rows; None for the first that is wired to rows.

        Returns:
            Graph input -> tensor name.

        Raises:
            InputError: A wire that does not fit its input.
            ExportError: An input of a shape that nothing can fill.
        """
        inputs = {name: adapter.input(name) for name in table.inputs}
        calls: dict[str, str] = {}
        later = []
        for name, wire in table.inputs.items():
            where = f"{adapter.foreign.file}: the input {name}"
            if isinstance(wire, Numbers) or (isinstance(wire, Host) and wire.kind == "guidance"):
                later.append((name, wire, where))  # these are spread over the rows of the others
                continue
            if isinstance(wire, Outputs):
                found = self._outputs(adapter, wire, inputs[name], where)
            else:
                found = {self._host(adapter, wire, inputs[name], name, table.name): f"{table.name}.{name}"}
            like = like or next(iter(found))
            calls |= {str(value.name): tensor for value, tensor in found.items()}
        for name, wire, where in later:
            value = inputs[name]
            if isinstance(wire, Numbers):
                adapter.spread(_numbers(adapter, wire, value, where), value, like)
                continue
            tensor = f"{table.name}.{name}"
            self.parts.inputs.append(TensorSpec(tensor, "float32", (), {"kind": "guidance"}))
            public, value.name = str(value.name), f"{value.name}.own"
            adapter.spread(adapter.new_input(public, ir.DataType.FLOAT, ()), value, like)
            calls[public] = tensor
        return calls

    def _host(self, adapter: Adapter, wire: Wire, value: ir.Value, name: str, table: str) -> ir.Value:
        """Declares a program input and gives the graph input that takes it."""
        where = f"{adapter.foreign.file}: the input {name}"
        tail: tuple[int, ...]
        source: dict[str, str | int | float | bool]
        if isinstance(wire, Tokens):
            tail = (self._length(wire, value, where),)
            tokenizer = self._tokenizer(wire, tail[0], table)
            source = {"kind": "token_mask" if wire.mask else "tokens", "tokenizer": tokenizer}
        elif isinstance(wire, Label):
            if self.guided and wire.null is None:
                raise InputError(
                    f"{self.toml}: {name} has no null = N, and guidance needs the number of "
                    "the class that stands for none: add it, or leave guidance out"
                )
            tail = ()
            source = {"kind": "label", "classes": wire.classes, "null": wire.null or 0}
        else:
            tail, source = (1,), {"kind": "given", "zeros": True}
        _check_shape(value, ("rows", *tail), where, f"a {source['kind']}")
        assert value.dtype is not None
        taken = value
        if value.dtype in (ir.DataType.BFLOAT16, ir.DataType.BOOL):  # numpy has no bfloat16; masks count
            taken = _cast_input(adapter, value, ir.DataType.FLOAT)
        assert taken.dtype is not None
        self.parts.inputs.append(
            TensorSpec(f"{table}.{name}", taken.dtype.numpy().name, (ROWS_BATCH, *tail), source)
        )
        return taken

    def _length(self, wire: Tokens, value: ir.Value, where: str) -> int:
        fixed = value.shape[1] if value.shape is not None and value.shape.rank() == 2 else None
        length = wire.length
        if isinstance(fixed, int):
            if length not in (None, fixed):
                raise InputError(
                    f"{where} takes {fixed} tokens and length = {length} is asked for: leave it out"
                )
            return fixed
        if length is None:
            raise InputError(f"{where} takes any number of tokens: say how many, as in length = 77")
        return length

    def _tokenizer(self, wire: Tokens, length: int, table: str) -> str:
        """The name of the tokenizer, added to the parts unless it is there."""
        text = read_tokenizer(wire.tokenizer, length, wire.pad)
        for name, known in self.parts.tokenizers.items():
            if known == text:
                return name
        name = table if table not in self.parts.tokenizers else f"{table}_{len(self.parts.tokenizers)}"
        self.parts.tokenizers[name] = text
        return name

    def _outputs(self, adapter: Adapter, wire: Outputs, value: ir.Value, where: str) -> dict[ir.Value, str]:
        """Connects an input to one output, or to several joined along their last axis."""
        sources = [self.made[pair] for pair in wire.of]
        tensors = [f"{table}.{output}" for table, output in wire.of]
        shapes = [[*source.shape] for source in sources if source.shape is not None]
        joined = [*shapes[0]]
        for shape, tensor in zip(shapes, tensors, strict=True):
            if len(shape) != len(joined):
                raise InputError(
                    f"{where} joins {tensors[0]} and {tensor}, of {len(joined)} and {len(shape)} axes"
                )
        if len(shapes) > 1:
            lasts = [shape[-1] for shape in shapes]
            widths = [width for width in lasts if isinstance(width, int)]
            joined[-1] = sum(widths) if len(widths) == len(lasts) else ir.SymbolicDim(None)
        _check_shape(value, joined, where, " + ".join(tensors))
        types = [source.dtype for source in sources if source.dtype is not None]
        assert value.dtype is not None and value.shape is not None
        for found, tensor in zip(types, tensors, strict=True):
            if found.is_floating_point() and not value.dtype.is_floating_point():
                raise InputError(
                    f"{where} is {value.dtype.name} and {tensor} is {found.name}: wire another output"
                )
        if len(sources) == 1:
            taken = value if types[0] == value.dtype else _cast_input(adapter, value, types[0])
            return {taken: tensors[0]}
        public, value.name = str(value.name), f"{value.name}.own"
        parts = {}
        for index, (shape, found, tensor) in enumerate(zip(shapes, types, tensors, strict=True)):
            dims = [d if isinstance(d, int) else str(d.value) for d in value.shape]
            last = shape[-1]
            dims[-1] = last if isinstance(last, int) else f"{dims[-1]}_{index}"
            parts[adapter.new_input(f"{public}.{index}", found, dims)] = tensor
        cast = [adapter.cast(part, value.dtype) for part in parts]
        adapter.replace(value, adapter.node("Concat", cast, value.dtype, axis=-1))
        return parts


def _cast_input(adapter: Adapter, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """A new graph input of the same name and shape and another type."""
    assert value.shape is not None
    public, value.name = str(value.name), f"{value.name}.own"
    dims = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    taken = adapter.new_input(public, dtype, dims)
    adapter.replace(value, taken)
    return taken


def _numbers(adapter: Adapter, wire: Numbers, value: ir.Value, where: str) -> ir.Value:
    """The constant for an input (rows, ...): (1, ...) float32, or a scalar for a scalar."""
    assert value.shape is not None
    dims = [*value.shape]
    if len(dims) == 2 and not isinstance(dims[1], int):
        dims[1] = len(wire.values)
        value.shape = ir.Shape(dims)
    sizes = [dim for dim in dims[1:] if isinstance(dim, int)]
    if len(sizes) != len(dims[1:]) or math.prod(sizes) != len(wire.values):
        raise InputError(
            f"{where} has the shape {value.shape}, and {len(wire.values)} numbers a row are given"
        )
    array = np.array(wire.values, np.float32)
    return adapter.constant(array.reshape((1, *sizes)) if dims else array.reshape(()))


def _check_shape(value: ir.Value, given: Any, where: str, what: str) -> None:
    """Raises InputError where the ranks or the fixed sizes behind the rows differ."""
    if value.shape is None:
        raise ExportError(f"{where} has no known shape: export it with shapes")
    if value.shape.rank() != len(given):
        raise InputError(f"{where} has {value.shape.rank()} axes and {what} has {len(given)}: wire another")
    for axis, (ours, theirs) in enumerate(zip(value.shape, given, strict=True)):
        if axis and isinstance(ours, int) and isinstance(theirs, int) and ours != theirs:
            raise InputError(f"{where} takes {ours} along axis {axis} and {what} has {theirs}: wire another")


def read_tokenizer(path: Path, length: int, pad: str | None) -> str:
    """A tokenizer as the text of a ``tokenizer.json`` that cuts and pads to ``length`` by itself.

    Args:
        path: A tokenizer.json, or the folder of a transformers tokenizer.
        length: Tokens of every encoded prompt.
        pad: The padding token; None for the one that the file, or tokenizer_config.json beside it, names.

    Raises:
        InputError: It cannot be read, or has no padding token.
    """
    if path.is_dir():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            if pad is not None:
                tokenizer.pad_token = pad
            return tokenizer_json(tokenizer, length)
        except TrimtabError:
            raise
        except Exception as error:  # from_pretrained raises whatever the layer below did
            raise InputError(
                f"{path} cannot be loaded as a tokenizer ({first_line(error)}): copy it again"
            ) from error
    from tokenizers import Tokenizer

    try:
        fast = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare exceptions
        raise InputError(
            f"{path} cannot be read as a tokenizer.json ({first_line(error)}): copy it again"
        ) from None
    token = (
        pad or (fast.padding or {}).get("pad_token") or _configured_pad(path.parent / "tokenizer_config.json")
    )
    number = None if token is None else fast.token_to_id(token)
    if number is None:
        found = "says no padding token" if token is None else f"has no token {token!r}"
        raise InputError(f'{path} {found}: say which one pads, as in pad = "<|endoftext|>" beside tokens')
    fast.enable_truncation(length)
    fast.enable_padding(length=length, pad_id=number, pad_token=token)
    return str(fast.to_str())


def _configured_pad(config: Path) -> str | None:
    try:
        token: Any = json.loads(config.read_text(encoding="utf-8")).get("pad_token")
    except (OSError, ValueError, AttributeError):
        return None
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None
