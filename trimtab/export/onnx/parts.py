"""What each foreign graph becomes: a call of the prologue, the denoiser or the decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

from trimtab.errors import ExportError, InputError
from trimtab.export.onnx.adapt import Adapter, adapt_decoder, adapt_denoiser, pixel_graph
from trimtab.export.onnx.description import (
    DECODER,
    GraphTable,
    Numbers,
    OnnxFiles,
    Tokens,
)
from trimtab.export.onnx.graphs import (
    ROWS,
    Foreign,
    check_outputs,
    drop_unused,
    infer,
    keep_outputs,
    name_sizes,
    settle_outputs,
)
from trimtab.export.onnx.sizes import settle_inside
from trimtab.export.onnx.wires import Wires
from trimtab.export.parts import Parts
from trimtab.program import DENOISER

LATENT = ("latent_height", "latent_width")


def add_prologue(files: OnnxFiles, foreign: Foreign, table: GraphTable, wires: Wires) -> None:
    """Adds a graph that runs once before the steps."""
    wires.check(foreign, table)
    graph = foreign.model.graph
    read = {output for other in files.tables for name, output in other.references() if name == table.name}
    made = {name: foreign.output(name) for name in sorted(read)}
    keep_outputs(graph, made.values())
    in_rows = [name for name, wire in table.inputs.items() if not isinstance(wire, Numbers)]
    name_sizes(graph, {name: (ROWS,) for name in in_rows if not table.takes_scale(name)})
    tokens = [name for name, wire in table.inputs.items() if isinstance(wire, Tokens)]
    first = next((name for name in (*tokens, *in_rows) if not table.takes_scale(name)), None)
    like = foreign.input(first) if first else None
    _check_rows(files, wires.parts, foreign, like)
    settle_outputs(foreign, like, bool(tokens))
    adapter = Adapter(foreign)
    inputs = wires.connect(adapter, table, None)
    for name, value in made.items():
        if value.dtype == ir.DataType.BFLOAT16:  # which numpy has not
            cast = adapter.cast(value, ir.DataType.FLOAT, behind=True)
            cast.shape = value.shape
            graph.outputs[[*graph.outputs].index(value)] = cast
            made[name] = value = cast
        wires.made[table.name, name] = value
    drop_unused(foreign)
    wires.parts.segments[table.name] = wires.parts.keep(table.name, foreign.model)
    check_outputs(foreign, {}, "export it with the shapes of its outputs")
    wires.parts.call(table.name, inputs, {str(v.name): f"{table.name}.{name}" for name, v in made.items()})


def _check_rows(files: OnnxFiles, parts: Parts, foreign: Foreign, value: ir.Value | None) -> int | None:
    """The fixed number of rows, if any; refused where guidance could never work with it."""
    rows = value.shape[0] if value is not None and value.shape is not None and value.shape.rank() else None
    if not isinstance(rows, int):
        return None
    if parts.classifier_free and rows % 2:
        raise InputError(
            f"{foreign.file} takes a fixed batch of {rows}, and guidance needs two rows a picture: export it "
            f"with an open batch or one of {2 * rows}, or leave guidance out of {files.path.name}"
        )
    return rows


def _guess(
    foreign: Foreign,
    key: str,
    asked: str | None,
    common: Iterable[str],
    fits: Callable[[ir.Value], bool],
    *,
    output: bool = False,
    taken: Iterable[str] = (),
) -> ir.Value:
    """The input or output that was asked for, or the only one that can be meant."""
    if asked is not None:
        return foreign.output(asked) if output else foreign.input(asked)
    graph = foreign.model.graph
    values = {
        str(v.name): v for v in (graph.outputs if output else graph.inputs) if str(v.name) not in set(taken)
    }
    fitting = {name: value for name, value in values.items() if fits(value)}
    known = [name for name in common if name in fitting]
    if known:
        return fitting[known[0]]
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    raise InputError(
        f'{foreign.file}: which {"output" if output else "input"} is the {key}? Say {key} = "..." under '
        f"[{foreign.name}]: there are {', '.join(values) or 'none'}"
    )


def _is_latent(value: ir.Value) -> bool:
    floats = value.dtype is not None and value.dtype.is_floating_point()
    return floats and (value.shape is None or value.shape.rank() == 4)


def _is_single(value: ir.Value) -> bool:
    return value.shape is not None and value.shape.rank() <= 1


def add_denoiser(files: OnnxFiles, foreign: Foreign, wires: Wires) -> tuple[bool, int | None]:
    """Adds the denoiser.

    Returns:
        Whether its time step is an integer, and its rows where they are fixed.
    """
    table, parts, graph = files.denoiser, wires.parts, foreign.model.graph
    common: tuple[str, ...] = ("sample", "x", "latents", "latent", "noisy_latents", "x_t")
    sample = _guess(foreign, "sample", table.sample, common, _is_latent, taken=table.inputs)
    common = ("timestep", "timesteps", "t", "time", "time_step")
    timestep = _guess(foreign, "timestep", table.timestep, common, _is_single, taken=table.inputs)
    common = ("prediction", "out_sample", "noise_pred", "model_output", "output", "sample")
    prediction = _guess(foreign, "prediction", table.prediction, common, _is_latent, output=True)
    own = frozenset((str(sample.name), str(timestep.name)))
    wires.check(foreign, table, own)
    if timestep.dtype is None or timestep.shape is None or timestep.dtype == ir.DataType.BOOL:
        raise ExportError(
            f"{foreign.file}: the time step {timestep.name} has no known shape: export it with shapes"
        )
    for value in (sample, prediction):
        if not _is_latent(value) or (value is sample and value.shape is None):
            found = f"{value.dtype.name if value.dtype else 'of no type'} {value.shape}"
            raise ExportError(
                f"{foreign.file}: {value.name} is {found}, and float (rows, channels, h, w) is needed"
            )
    assert sample.shape is not None
    rows = _check_rows(files, parts, foreign, sample)
    channels = _channels(foreign, sample, table.channels)
    chosen: dict[str, tuple[str | None, ...]] = {str(sample.name): (ROWS, None, *LATENT)}
    chosen |= {
        n: (ROWS,) for n, w in table.inputs.items() if not isinstance(w, Numbers) and not table.takes_scale(n)
    }
    keep_outputs(graph, [prediction])
    name_sizes(graph, chosen)
    if prediction.shape is None or not isinstance(prediction.shape[1], int):
        infer(foreign)
    _check_prediction(foreign, sample, prediction, channels)
    sample.shape = ir.Shape([ROWS, channels, *sample.shape[2:]])
    whole = timestep.dtype.is_integer()
    parts.channels = channels
    parts.factor = files.decoder.factor if files.decoder else 1
    parts.multiple = files.multiple or parts.factor
    if parts.multiple % parts.factor:
        raise InputError(
            f"{files.path}: multiple = {parts.multiple} is no multiple of {parts.factor}, a latent's side"
        )
    _choose_size(files, parts, foreign, [*sample.shape[2:]])

    adapter = Adapter(foreign)
    parts.conditioning = wires.connect(adapter, table, sample)
    adapt_denoiser(adapter, sample, timestep, prediction)
    drop_unused(foreign)
    settle_inside(foreign.model, _trial(parts))
    parts.segments[DENOISER] = parts.keep(DENOISER, foreign.model)
    check_outputs(foreign, _trial(parts), f"name another prediction under [{DENOISER}]")
    return whole, rows


def _channels(foreign: Foreign, sample: ir.Value, said: int | None) -> int:
    assert sample.shape is not None
    found = sample.shape[1]
    if isinstance(found, int):
        if said not in (None, found):
            raise InputError(
                f"{foreign.file}: {sample.name} has {found} channels and channels = {said}: leave it out"
            )
        return found
    if said is None:
        raise InputError(
            f"{foreign.file} leaves the channels of {sample.name} open: say channels = 4 under [{DENOISER}]"
        )
    return said


def _check_prediction(foreign: Foreign, sample: ir.Value, prediction: ir.Value, channels: int) -> None:
    if prediction.shape is None or sample.shape is None:
        return  # a denoiser's prediction has the sample's shape: the adapter's nodes rely on it
    found = prediction.shape[1]
    if isinstance(found, int) and found not in (channels, 2 * channels):
        raise ExportError(
            f"{foreign.file}: the output {prediction.name} has {found} channels, and {channels} or, with a "
            f"learned variance, {2 * channels} are needed: name another under [{DENOISER}]"
        )
    for axis in (2, 3):
        ours, theirs = sample.shape[axis], prediction.shape[axis]
        if isinstance(ours, int) and isinstance(theirs, int) and ours != theirs:
            raise ExportError(
                f"{foreign.file}: the output {prediction.name} has {theirs} along axis {axis} and the sample "
                f"{ours}: name another under [{DENOISER}]"
            )


def _choose_size(files: OnnxFiles, parts: Parts, foreign: Foreign, dims: list[int | ir.SymbolicDim]) -> None:
    """The native size, from the file or from the graph where that fixes it."""
    fixed = [dim * parts.factor if isinstance(dim, int) else None for dim in dims]
    height, width = fixed
    if files.size is None and (height is None or width is None):
        raise InputError(
            f"{files.path}: size = [width, height] is missing, and {foreign.file.name} takes any: add it"
        )
    said = files.size or (0, 0)
    parts.size = (width or said[0], height or said[1])
    if files.size is not None and files.size != parts.size:
        raise InputError(
            f"{files.path}: size = {list(said)}, and {foreign.file.name} was exported for "
            f"{list(parts.size)}: leave size out, or export it with open sizes"
        )
    if any(side % parts.multiple for side in parts.size):
        raise InputError(
            f"{files.path}: size = {list(parts.size)}, and both must be multiples of {parts.multiple}"
        )
    if any(fixed):
        parts.fixed_size = f"{files.denoiser.title} was exported for this size"


def add_decoder(files: OnnxFiles, foreign: Foreign | None, parts: Parts) -> None:
    """Adds what makes pictures from latents."""
    table = files.decoder
    if table is None or foreign is None:
        if parts.channels not in (1, 3):
            raise InputError(
                f"{files.path}: {files.denoiser.file.name} has {parts.channels} channels, which are no picture: "
                f'add [{DECODER}] with file = "vae_decoder.onnx"'
            )
        parts.colors = parts.channels
        parts.segments["pixels"] = parts.keep("pixels", pixel_graph(parts.channels))
        return
    graph = foreign.model.graph
    latents = _guess(
        foreign, "latents", table.latents, ("latents", "latent_sample", "sample", "z"), _is_latent
    )
    picture = _guess(
        foreign, "picture", table.picture, ("picture", "image", "sample"), _is_latent, output=True
    )
    if len(graph.inputs) > 1:
        other = next(str(value.name) for value in graph.inputs if value is not latents)
        raise InputError(
            f"{foreign.file} reads {other!r} beside {latents.name}, and a decoder reads latents only"
        )
    if latents.shape is None or not _is_latent(latents) or not _is_latent(picture):
        raise ExportError(f"{foreign.file}: float latents and a float picture of 4 axes each are needed")
    found = latents.shape[1]
    if isinstance(found, int) and found != parts.channels:
        raise InputError(
            f"{foreign.file} takes {found} channels and the denoiser gives {parts.channels}: name another"
        )
    keep_outputs(graph, [picture])
    name_sizes(graph, {str(latents.name): ("batch", "channels", *LATENT)})
    latents.shape = ir.Shape([latents.shape[0], parts.channels, *latents.shape[2:]])
    sides = [side // parts.factor for side in reversed(parts.size)]
    for axis, side in enumerate(sides, 2):
        dim = latents.shape[axis]
        if isinstance(dim, int):
            parts.fixed_size = parts.fixed_size or f"{table.title} was exported for this size"
            if dim != side:
                raise InputError(
                    f"{foreign.file} takes latents of {[*latents.shape[2:]]} and {sides} are decoded"
                )
    _picture_shape(foreign, table.layout, parts, latents, picture)
    adapter = Adapter(foreign)
    adapt_decoder(adapter, table, latents, picture)
    drop_unused(foreign)
    parts.segments["vae_decoder"] = parts.keep("vae_decoder", foreign.model)
    check_outputs(foreign, _trial(parts), f"say factor = N, pixels to a latent, under [{DECODER}]")


def _trial(parts: Parts) -> dict[str, int]:
    """Sizes that the graphs can take: the native ones, twice as wide so that both sides differ."""
    width, height = parts.size
    return {LATENT[0]: height // parts.factor, LATENT[1]: 2 * width // parts.factor}


def _picture_shape(foreign: Foreign, layout: str, parts: Parts, latents: ir.Value, picture: ir.Value) -> None:
    """Gives the picture the shape that follows from the latents'; `check_outputs` holds it against the graph."""
    color = layout.index("C")
    if picture.shape is None or not isinstance(picture.shape[color], int):
        infer(foreign)
    if picture.shape is None or picture.shape[color] not in (1, 3):
        channels = None if picture.shape is None else picture.shape[color]
        found = channels if isinstance(channels, int) else "an unknown number of"
        other = "NHWC" if layout == "NCHW" else "NCHW"
        raise ExportError(
            f"{foreign.file}: the output {picture.name} has {found} channels in the layout {layout}, and 1 or 3 "
            f'are needed: name another picture, or layout = "{other}", under [{DECODER}]'
        )
    assert latents.shape is not None
    parts.colors = int(str(picture.shape[color]))

    def scaled(dim: int | ir.SymbolicDim) -> int | str:
        return dim * parts.factor if isinstance(dim, int) else f"{dim.value}*{parts.factor}"

    by_letter: dict[str, int | str | ir.SymbolicDim] = {"N": latents.shape[0], "C": parts.colors}
    by_letter |= {"H": scaled(latents.shape[2]), "W": scaled(latents.shape[3])}
    picture.shape = ir.Shape([by_letter[letter] for letter in layout])
