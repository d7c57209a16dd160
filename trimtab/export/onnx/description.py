"""The TOML file that says how .onnx files make pictures: read and checked before any graph is opened.

Docs: docs/onnx.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import InputError, nearest
from trimtab.export.onnx.toml_table import Table, is_number
from trimtab.program import DENOISER, SHIFT
from trimtab.toml_file import read_toml

DECODER = "decoder"
FACTOR = 8
"""Pixels to a latent along a side, where the file does not say: so in every Stable Diffusion and in Flux."""

RESERVED = ("vae_decoder", "pixels", SHIFT)
"""Segments that are made beside the graphs, and whose names no table can have."""

HOST = ("guidance", "given")
"""Inputs without options: the guidance scale, and 0 in the rows of a negative prompt that was not given."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_KINDS = (
    '"table.output", ["table.output", ...] to join, { tokens = "tokenizer.json", length = 77 }, '
    '{ token_mask = "tokenizer.json" }, { classes = 1000, null = 1000 }, "guidance", "given" or [numbers]'
)


@dataclass(frozen=True)
class Outputs:
    """Outputs of other graphs, as (table, output); more than one are joined along their last axis."""

    of: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Numbers:
    """The same numbers for every row."""

    values: tuple[float, ...]


@dataclass(frozen=True)
class Tokens:
    """A prompt's token ids, or their attention mask.

    Attributes:
        tokenizer: A tokenizer.json, or a tokenizer's folder.
        length: Tokens; None for the graph's own length.
        pad: The padding token; None for the tokenizer's own.
        mask: The mask is wanted and not the ids.
    """

    tokenizer: Path
    length: int | None
    pad: str | None
    mask: bool


@dataclass(frozen=True)
class Label:
    """A class number.

    Attributes:
        classes: How many there are.
        null: The class that stands for none, in guidance's negative rows; None without one.
    """

    classes: int
    null: int | None


@dataclass(frozen=True)
class Host:
    """A key of `HOST`."""

    kind: str


Wire = Outputs | Numbers | Tokens | Label | Host


@dataclass(frozen=True)
class GraphTable:
    """One graph.

    Attributes:
        name: Of its table.
        file: The .onnx file.
        inputs: Graph input -> where its values come from.
    """

    name: str
    file: Path
    inputs: Mapping[str, Wire]

    @property
    def title(self) -> str:
        """The file's name as a bundle can hold it."""
        return _title(self.file)

    def references(self) -> list[tuple[str, str]]:
        """The outputs of other graphs that it reads, as (table, output)."""
        wires = [wire for wire in self.inputs.values() if isinstance(wire, Outputs)]
        return [pair for wire in wires for pair in wire.of]

    def takes_scale(self, name: str) -> bool:
        """Whether an input is given the guidance scale."""
        wire = self.inputs[name]
        return isinstance(wire, Host) and wire.kind == "guidance"


@dataclass(frozen=True)
class DenoiserTable(GraphTable):
    """The graph that runs in every step.

    Attributes:
        sample: Its input for the noisy latents; None to look for it.
        timestep: Its input for the time step; None to look for it.
        prediction: Its output; None to look for it.
        channels: Channels of a latent, where the graph leaves them open.
    """

    sample: str | None = None
    timestep: str | None = None
    prediction: str | None = None
    channels: int | None = None


@dataclass(frozen=True)
class DecoderTable(GraphTable):
    """The graph that makes a picture from latents.

    Attributes:
        latents: Its input; None to look for it.
        picture: Its output; None to look for it.
        scale: What latents are divided by first.
        shift: What is added to them then.
        factor: Pixels to a latent along a side.
        layout: "NCHW" or "NHWC", of the picture.
        range: What is black and what is white.
    """

    latents: str | None = None
    picture: str | None = None
    scale: float = 1.0
    shift: float = 0.0
    factor: int = FACTOR
    layout: str = "NCHW"
    range: tuple[float, float] = (-1.0, 1.0)


@dataclass(frozen=True)
class OnnxFiles:
    """The whole file.

    Attributes:
        path: The file.
        scheduler_class: A diffusers class or a short name.
        scheduler: A configuration that a pipeline was saved with; empty without one.
        scheduler_options: What goes before it.
        denoiser: What runs in every step.
        decoder: What makes the picture; None in pixel space.
        graphs: What runs once before the steps, by name.
        size: Native (width, height) in pixels; None for what the graphs fix.
        multiple: What a picture's sides must be multiples of; None for the decoder's factor.
        guidance: Default guidance scale; None without guidance.
    """

    path: Path
    scheduler_class: str
    scheduler: Mapping[str, Any]
    scheduler_options: Mapping[str, Any]
    denoiser: DenoiserTable
    decoder: DecoderTable | None
    graphs: Mapping[str, GraphTable]
    size: tuple[int, int] | None
    multiple: int | None
    guidance: float | None

    @property
    def title(self) -> str:
        """The file's name as a bundle can hold it."""
        return _title(self.path)

    @property
    def tables(self) -> list[GraphTable]:
        """All graphs, in the order in which they run."""
        last = [self.decoder] if self.decoder else []
        return [*self.graphs.values(), self.denoiser, *last]


def _title(file: Path) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in file.name)


def read_onnx_toml(path: Path) -> OnnxFiles:
    """Reads and checks a .toml file that names .onnx files; no graph is opened.

    Raises:
        InputError: Not TOML, a key that is unknown, missing or of the wrong kind, or a missing file.
    """
    table = Table(path, "", read_toml(path))
    name, config, options = _scheduler(table.table("scheduler", 'class = "DDIMScheduler" and its options'))
    denoiser = _denoiser(table.table(DENOISER, 'file = "denoiser.onnx"'))
    decoder = _decoder(table.table(DECODER)) if DECODER in table else None
    size = table.numbers("size", 2, whole=True)
    multiple = table.whole("multiple")
    guidance = table.number("guidance")
    graphs = {}
    for key in table.left():
        if not isinstance(table.data[key], dict):
            raise InputError(f"{path}: there is no key {key!r}: {nearest(key, table.asked)}")
        graphs[key] = _graph(table.table(key), key)
    return OnnxFiles(
        path=path,
        scheduler_class=name,
        scheduler=config,
        scheduler_options=options,
        denoiser=denoiser,
        decoder=decoder,
        graphs=graphs,
        size=None if size is None else (int(size[0]), int(size[1])),
        multiple=multiple,
        guidance=guidance,
    )


def _scheduler(table: Table) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The class, the configuration of a file, and the options that the table sets over it."""
    config: dict[str, Any] = {}
    file = table.file("config") if "config" in table else None
    if file is not None:
        try:
            config = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{file} cannot be read as a scheduler's configuration ({error})") from None
    name = table.text("class") or config.get("_class_name")
    if not isinstance(name, str):
        raise InputError(f'{table.path}: {table.where} needs class = "DDIMScheduler" or another scheduler\'s')
    return name, config, {key: table.data[key] for key in table.left()}


def _graph(table: Table, name: str) -> GraphTable:
    if not _NAME.fullmatch(name) or name.startswith(DENOISER) or name in RESERVED:
        raise InputError(
            f"{table.path}: [{name}] cannot be the name of a graph: what runs in the steps is [{DENOISER}], "
            f"what makes the picture [{DECODER}], and others have names of letters, digits, _ and -, but not "
            f"{', '.join(RESERVED)}"
        )
    if "file" not in table:
        raise InputError(
            f'{table.path}: [{name}] has no file = "NAME.onnx": every table but scheduler is a graph; '
            + nearest(name, ["scheduler", DENOISER, DECODER])
        )
    graph = GraphTable(name, table.file("file"), _inputs(table))
    table.done()
    return graph


def _denoiser(table: Table) -> DenoiserTable:
    found = DenoiserTable(
        name=DENOISER,
        file=table.file("file"),
        inputs=_inputs(table),
        sample=table.text("sample"),
        timestep=table.text("timestep"),
        prediction=table.text("prediction"),
        channels=table.whole("channels"),
    )
    table.done()
    return found


def _decoder(table: Table) -> DecoderTable:
    scale, shift = table.number("scale"), table.number("shift")
    factor, layout, levels = table.whole("factor"), table.text("layout"), table.numbers("range", 2)
    if scale == 0:
        raise InputError(f"{table.path}: {table.where} has scale = 0, and latents are divided by it")
    if layout not in (None, "NCHW", "NHWC"):
        raise InputError(f"{table.path}: {table.where} has layout = {layout!r}: NCHW and NHWC are known")
    if levels is not None and not levels[0] < levels[1]:
        raise InputError(f"{table.path}: {table.where} has range = {list(levels)}: black must be below white")
    found = DecoderTable(
        name=DECODER,
        file=table.file("file"),
        inputs={},
        latents=table.text("latents"),
        picture=table.text("picture"),
        scale=1.0 if scale is None else scale,
        shift=0.0 if shift is None else shift,
        factor=FACTOR if factor is None else factor,
        layout=layout or "NCHW",
        range=(-1.0, 1.0) if levels is None else (levels[0], levels[1]),
    )
    table.done()
    return found


def _inputs(table: Table) -> dict[str, Wire]:
    if "inputs" not in table:
        return {}
    inputs = table.table("inputs")
    return {name: _wire(inputs, name) for name in inputs.left()}


def _wire(table: Table, name: str) -> Wire:
    value = table.take(name)
    where = f"{table.path}: {table.where} has {name} = {value!r:.80}"
    if isinstance(value, str) and value in HOST:
        return Host(value)
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        pairs = [text.partition(".") for text in texts]
        if not all(graph and output for graph, _, output in pairs):
            raise InputError(f"{where}, and an input is one of {_KINDS}")
        return Outputs(tuple((graph, output) for graph, _, output in pairs))
    if isinstance(value, list) and value and all(is_number(number) for number in value):
        return Numbers(tuple(map(float, value)))
    if not isinstance(value, dict):
        raise InputError(f"{where}, and an input is one of {_KINDS}")
    options = Table(table.path, f"{table.where} {name}", value)
    found: Wire
    if "tokens" in options or "token_mask" in options:
        mask = "tokens" not in options
        file = options.file("token_mask" if mask else "tokens", folder=True)
        found = Tokens(file, options.whole("length"), options.text("pad"), mask)
    elif "classes" in options:
        classes = options.whole("classes")
        assert classes is not None
        found = Label(classes, options.whole("null", least=0))
    else:
        raise InputError(f"{where}, and an input is one of {_KINDS}")
    options.done()
    return found
