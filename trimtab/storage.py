"""A Program on disk, there and back: graphs beside their weights, tokenizers, and what bundle.json says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

import onnx_ir as ir

from trimtab import __version__
from trimtab.bundle import Bundle
from trimtab.errors import BundleError, first_line
from trimtab.manifest import Contents, Engine, SegmentEntry
from trimtab.program import Program, Segment, TensorSpec
from trimtab.weights import WeightStore, external_tensors, load_model, parameter_count, weight_bytes

GRAPHS = "graphs"
"""The folder of graphs and weights in a bundle."""


def graph_path(segment: Segment) -> str:
    """Where a segment's graph lies in a bundle. A graph of another precision lies beside the one it was made from."""
    suffix = "" if segment.precision == "fp32" else f".{segment.precision}"
    return f"{GRAPHS}/{segment.name}{suffix}.onnx"


def write_graphs(program: Program, folder: Path, store: WeightStore) -> None:
    """Writes every segment's graph into the store's folder, with the weights that it does not hold yet.

    Args:
        program: Its graphs are edited in place: large weights become references to files.
        folder: The bundle's.
        store: Of ``folder / GRAPHS``.
    """
    for segment in program.segments.values():
        path = graph_path(segment)
        store.keep(PurePosixPath(path).stem, segment.model)
        ir.save(segment.model, folder / path)


def write_contents(program: Program, folder: Path) -> Contents:
    """Writes the tokenizers, and gives what bundle.json will say of a program, without engines.

    Args:
        program: Its graphs lie in ``folder / GRAPHS``.
        folder: The bundle's.
    """
    entries = {
        name: SegmentEntry(
            name=name,
            graph=f"{GRAPHS}/{name}.onnx",
            parameters=parameter_count(segment.model),
            weight_bytes=weight_bytes(segment.model),
            inputs=_specs(segment.model.graph.inputs),
            outputs=_specs(segment.model.graph.outputs),
            engines=(),
            domains={domain: version for domain, version in segment.model.opset_imports.items() if domain},
        )
        for name, segment in program.segments.items()
    }
    return Contents(
        tasks=program.tasks,
        epilogue=program.epilogue,
        outputs=program.outputs,
        segments=entries,
        size=program.size,
        size_multiple=program.size_multiple,
        fixed_size=program.fixed_size,
        slots=program.slots,
        tokenizers=_write_tokenizers(program, folder),
        metadata=program.metadata,
        passes=program.passes,
        version=__version__,
        trained_size=program.trained_size,
        largest_side=program.largest_side,
    )


def with_engines(contents: Contents, engines: Mapping[str, Iterable[Engine]]) -> Contents:
    """The contents with these engines for each segment."""
    segments = {
        name: replace(entry, engines=tuple(engines[name])) for name, entry in contents.segments.items()
    }
    return replace(contents, segments=segments)


def read_program(bundle: Bundle) -> Program:
    """The Program that a bundle was written from. Weights are mapped, not read.

    Raises:
        BundleError: A file is missing or was changed, or a graph is not what bundle.json says.
    """
    contents = bundle.contents
    bundle.verify()
    return Program(
        segments={name: _segment(bundle, entry) for name, entry in contents.segments.items()},
        tasks=contents.tasks,
        epilogue=contents.epilogue,
        outputs=contents.outputs,
        size=contents.size,
        size_multiple=contents.size_multiple,
        fixed_size=contents.fixed_size,
        slots=contents.slots,
        tokenizers={
            name: bundle.path(path).read_text(encoding="utf-8") for name, path in contents.tokenizers.items()
        },
        metadata=contents.metadata,
        passes=contents.passes,
        trained_size=contents.trained_size,
        largest_side=contents.largest_side,
    )


def read_graph(bundle: Bundle, path: str) -> ir.Model:
    """A graph of a bundle; it and the weights that it reads are verified. Weights are mapped, not read.

    Args:
        bundle: Opened.
        path: Relative to it.

    Raises:
        BundleError: A file is missing or was changed, is no graph, or reads what is not in the bundle.
    """
    file = bundle.path(path)
    sizes = {entry.path: entry.bytes for entry in bundle.contents.files}
    try:
        model = load_model(file)
        needed: dict[str, int] = {}
        for tensor in external_tensors(model):
            place = (PurePosixPath(path).parent / tensor.location).as_posix()
            if (tensor.offset or 0) < 0 or min(tensor.shape.numpy(), default=0) < 0:
                raise ValueError(f"{tensor.name} has a place or a size below 0")
            needed[place] = max(needed.get(place, 0), (tensor.offset or 0) + tensor.nbytes)
    except Exception as error:  # protobuf and onnx_ir raise what they like
        raise BundleError(
            f"{file} cannot be read as a graph ({first_line(error)}): compile the bundle again"
        ) from None
    bundle.verify(sorted(needed))  # and none that is not a file of the bundle
    for place, end in needed.items():
        if end > sizes[place]:
            raise BundleError(f"{file} reads beyond the end of {place}: compile the bundle again")
        if (bundle.folder / place).stat().st_nlink > 1:
            raise BundleError(
                f"{bundle.folder}: {place} has another name elsewhere (a hard link), and onnx_ir reads no such "
                "weights: copy the bundle"
            )
    return model


def _segment(bundle: Bundle, entry: SegmentEntry) -> Segment:
    model = read_graph(bundle, entry.graph)
    for values, specs in ((model.graph.inputs, entry.inputs), (model.graph.outputs, entry.outputs)):
        if {value.name for value in values} != {spec.name for spec in specs}:
            raise BundleError(
                f"{bundle.folder}: {entry.graph} is not the graph that was written: compile again"
            )
    return Segment(entry.name, model)


def _specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """A graph's interface; open sizes as expressions over its own symbols."""
    specs = []
    for value in values:
        assert value.name and value.shape is not None and value.dtype is not None
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
        specs.append(TensorSpec(value.name, value.dtype.numpy().name, shape))
    return tuple(specs)


def _write_tokenizers(program: Program, folder: Path) -> Mapping[str, str]:
    paths = {}
    for name, text in program.tokenizers.items():
        paths[name] = f"tokenizers/{name}.json"
        path = folder / paths[name]
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return paths
