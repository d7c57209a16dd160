"""From the graphs of a program to the engines of a bundle."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from trimtab.errors import InputError, TrimtabError
from trimtab.manifest import OPERATORS_DOMAIN, Contents, Engine
from trimtab.program import Segment
from trimtab.storage import GRAPHS, graph_path
from trimtab.targets.base import Builder, BuildOptions, EngineInfo, Progress
from trimtab.targets.bindings import Shapes, segment_shapes
from trimtab.targets.device import Device
from trimtab.targets.network import NetworkBuilder
from trimtab.targets.onnxruntime import OnnxRuntimeBuilder, check_loads
from trimtab.targets.place import Place
from trimtab.targets.plugins.aot import check_kernels
from trimtab.targets.tensorrt import TensorRTBuilder
from trimtab.targets.tensorrt_rtx import TensorRTRTXBuilder
from trimtab.weights import WeightStore, weight_bytes

if TYPE_CHECKING:
    from trimtab.targets.cache import EngineCache

logger = logging.getLogger(__name__)

ENGINES = "engines"
"""The folder of engines in a bundle, with one for each target."""


def builder_for(device: Device, cache: EngineCache | None = None) -> Builder:
    """The builder of a device's backend."""
    if device.backend == "tensorrt_rtx":
        return TensorRTRTXBuilder()
    if device.backend == "tensorrt":
        return TensorRTBuilder(None if cache is None else cache.timing_cache)
    return OnnxRuntimeBuilder()


def check_targets(devices: Iterable[Device], *, kernels: Iterable[Device] = ()) -> None:
    """Refuses, before any work, targets whose engines cannot be built here.

    Args:
        devices: All.
        kernels: Those whose engines will have packed weights in 16 bits.

    Raises:
        MissingDependency: A builder is not installed, or a compiler of the kernels.
        TargetError: It does not build for the device.
    """
    for device in kernels:
        if isinstance(builder_for(device), TensorRTBuilder) and device.sm is not None:
            check_kernels(int(device.sm.replace(".", "")))
    for device in devices:
        builder = builder_for(device)
        if isinstance(builder, TensorRTRTXBuilder):
            builder.compute_capability(device)
            builder.installed_version()


def open_cache(place: Place) -> EngineCache | None:
    """The cache of engines, or None, with a warning, where its folder cannot be used.

    Raises:
        InputError: A URL of an unknown scheme.
        MissingDependency: What the cache or its URL needs is not installed.
    """
    if place is None:
        return None
    from trimtab.targets.cache import EngineCache

    try:
        return EngineCache(place)
    except InputError as error:
        if not isinstance(error.__cause__, OSError | RuntimeError):
            raise
        logger.warning("%s; engines are built without a cache", error)
        return None


def specialized(model: ir.Model, shapes: Shapes) -> ir.Model:
    """A copy of a segment's graph with fixed sizes."""
    # It needs onnxscript, which a device that builds has no use for: its graphs are lowered, and of fixed sizes.
    from trimtab.passes.specialize import Specialize

    model = model.clone()
    Specialize(shapes)(model)
    return model


def make_engines(
    segments: Mapping[str, Segment],
    contents: Contents,
    devices: Sequence[Device],
    sizes: Sequence[tuple[int, int]],
    store: WeightStore,
    folder: Path,
    cache: EngineCache | None,
    progress: Progress,
) -> dict[str, tuple[Engine, ...]]:
    """Makes all engines of a bundle that can be made here.

    ONNX Runtime gets the graphs themselves. TensorRT for RTX gets engines. TensorRT, which builds on the device alone,
    gets lowered graphs; `trimtab.targets.finish.build` goes on from there.

    Args:
        segments: The graphs, in the precision of the engines; their weights lie in the store.
        contents: What the bundle says of them, without engines.
        devices: The targets.
        sizes: (width, height) in pixels that engines of fixed sizes are made for; the native one first. Without any,
            attention in ONNX Runtime's graphs stays as it is.
        store: Of ``folder / GRAPHS``. Gains the weights that only lowered graphs have.
        folder: The bundle's.
        cache: Where engines are looked for first.
        progress: Told what is being worked on.

    Returns:
        Segment -> its engines: target after target, the native size first.

    Raises:
        TargetError: An engine cannot be built.
    """
    maker = _Maker(store, folder, cache, progress)
    fixed = [size for size in sizes if any(device.backend != "onnxruntime" for device in devices)]
    shapes = {size: segment_shapes(contents, size) for size in fixed}
    opened = [device for device in devices if device.backend == "onnxruntime"]
    native = native_shapes(contents) if sizes and opened else {}
    engines = {}
    for name, segment in segments.items():
        made: dict[str, list[Engine]] = {device.name: [] for device in devices}
        for device in opened:
            made[device.name].append(maker.graph(segment, device, *native.get(name, ())[:1]))
        done: set[Any] = set()
        for size in fixed:
            for number, binding in enumerate(shapes[size][name]):
                if (look := tuple(sorted(binding.items()))) in done:
                    continue  # sizes of the picture are nothing to this segment
                done.add(look)
                label = ("" if size == sizes[0] else f".{size[0]}x{size[1]}") + (
                    f".{number}" if number else ""
                )
                for engine in maker.fixed(segment, devices, binding, label):
                    made[engine.target].append(engine)
        engines[name] = tuple(engine for device in devices for engine in made[device.name])
    return engines


def native_shapes(contents: Contents) -> dict[str, tuple[Shapes, ...]]:
    """`segment_shapes` of the native size; nothing for graphs of one's own that take no single picture."""
    try:
        return segment_shapes(contents, contents.size)
    except InputError:
        return {}


class _Maker:
    """Makes engines into one bundle; what several targets share is made once."""

    def __init__(
        self, store: WeightStore, folder: Path, cache: EngineCache | None, progress: Progress
    ) -> None:
        self._store = store
        self._folder = folder
        self._cache = cache
        self._progress = progress

    def graph(self, segment: Segment, device: Device, native: Shapes | None = None) -> Engine:
        """ONNX Runtime's engine: the segment's own graph, or beside it what that was lowered to."""
        builder, graph = OnnxRuntimeBuilder(native), graph_path(segment)
        model = builder.lower(segment.model, device)
        path = graph if model is segment.model else lowered_path(graph, builder.backend)
        info = builder.build(model, device, BuildOptions(), self._folder / path, self._progress)
        check_loads(segment.name, self._folder / path)
        packed = OPERATORS_DOMAIN in segment.model.opset_imports
        return Engine(
            device.name,
            info.backend,
            path,
            info.bytes,
            graph=graph,
            precision=segment.precision,
            packed=packed,
        )

    def fixed(
        self, segment: Segment, devices: Sequence[Device], shapes: Shapes, label: str
    ) -> Iterable[Engine]:
        """The engines of all other devices for one set of sizes."""
        made: dict[Any, Engine] = {}
        model: ir.Model | None = None
        precision, packed = segment.precision, OPERATORS_DOMAIN in segment.model.opset_imports
        for device in devices:
            builder = builder_for(device, self._cache)
            if not isinstance(builder, NetworkBuilder):
                continue
            parser = builder.parser(device)
            if builder.on_device:  # kernels of packed weights are for one chip
                same: tuple[Any, ...] = (builder.backend, precision, parser, device.sm if packed else None)
            else:
                same = (
                    builder.backend,
                    precision,
                    *(getattr(device, name) for name in builder.device_fields),
                )
            if same not in made:
                model = model or specialized(segment.model, shapes)
                common = {"shapes": dict(shapes), "precision": precision, "sm": device.sm}
                self._progress(
                    f"{'lowering' if builder.on_device else 'building'} {segment.name} for {device.name}"
                )
                if builder.on_device:
                    version = ".".join(map(str, parser.version))
                    chip = f"-sm{device.sm.replace('.', '')}" if packed and device.sm else ""
                    stem = f"{segment.name}{label}.{builder.backend}-{version}{chip}.{precision}"
                    made[same] = self._lowered(stem, builder.lower(model, device), device, common)
                else:
                    path = f"{ENGINES}/{device.name}/{segment.name}{label}.engine"
                    info = obtain(
                        self._cache,
                        model,
                        device,
                        build_options(device, shapes, precision, packed=packed),
                        builder,
                        self._folder / path,
                        lambda text: self._progress(f"{segment.name} for {text}"),
                    )
                    made[same] = engine_entry(device, path, info, graph_path(segment), shapes, precision)
            yield replace(made[same], target=device.name, sm=device.sm)

    def _lowered(self, stem: str, model: ir.Model, device: Device, common: Mapping[str, Any]) -> Engine:
        """A graph that the device builds its engine from."""
        path = f"{GRAPHS}/{stem}.onnx"
        self._store.keep(stem, model)
        ir.save(model, self._folder / path)
        size = (self._folder / path).stat().st_size + weight_bytes(model)
        return Engine(device.name, device.backend, path, size, graph=path, built=False, **common)


def lowered_path(graph: str, backend: str) -> str:
    """Where a backend's form of an open graph lies: beside it, where its weights are."""
    return f"{graph.removesuffix('.onnx')}.{backend}.onnx"


def build_options(
    device: Device, shapes: Shapes, precision: str, *, packed: bool = False, plugins: tuple[Path, ...] = ()
) -> BuildOptions:
    """The options of an engine of fixed sizes.

    Where the CPU lives in the GPU's memory, a kernel's scratch is held to a quarter of it: the rest is the system's,
    the weights' and the activations', and a build that asks for more is the one that is killed.

    Packed weights are decoded on one stream: what can run beside each other is given memory beside each other, and
    decoding waits for nothing. (TensorRT for RTX 1.7, 32 weights of 4 MB in FP32: 158 MB of activations on the 8
    streams of its choice, 12.5 MB on one.)
    """
    memory = device.memory_bytes
    workspace = memory // 4 if memory is not None and device.shared_memory else None
    extra = {"max_aux_streams": 0} if packed else {}
    return BuildOptions(shapes, precision, workspace_bytes=workspace, extra=extra, plugins=plugins)


def obtain(
    cache: EngineCache | None,
    model: ir.Model,
    device: Device,
    options: BuildOptions,
    builder: Builder,
    out: Path,
    progress: Progress,
) -> EngineInfo:
    """Writes an engine to a file: from the cache, or built.

    A cache whose disk is full or cannot be written does not end the build: a warning says so, and it goes on without.

    Raises:
        UnsupportedOp, BuildFailed: The builder's.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if cache is not None:
        try:
            with cache.get_or_build(model, device, options, builder, progress=progress) as entry:
                shutil.copyfile(entry.path, out)
                return entry.info
        except TrimtabError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            logger.warning("%s; the engine is built without the cache", error)
    return builder.build(builder.lower(model, device), device, options, out, progress)


def engine_entry(
    device: Device, path: str, info: EngineInfo, graph: str, shapes: Shapes, precision: str
) -> Engine:
    """What the bundle says of an engine that was built."""
    return Engine(
        target=device.name,
        backend=info.backend,
        path=path,
        bytes=info.bytes,
        graph=graph,
        version=info.backend_version,
        sm=device.sm,
        precision=precision,
        shapes=dict(shapes),
        activation_bytes=info.activation_bytes,
    )
