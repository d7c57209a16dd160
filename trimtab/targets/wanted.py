"""What a target needs that a bundle does not have: engines that are missing, and engines that are not right."""

from __future__ import annotations

import contextlib
from collections.abc import Collection

from trimtab.bundle import Bundle
from trimtab.errors import BundleError
from trimtab.manifest import OPERATORS_DOMAIN, Contents, Engine, SegmentEntry
from trimtab.runtime.sessions.check import TITLES
from trimtab.storage import with_engines
from trimtab.targets.bindings import Shapes, segment_shapes
from trimtab.targets.device import Device
from trimtab.targets.plugins import qdp


def with_target(contents: Contents, device: Device) -> Contents:
    """The contents with engines of a further target, none of them built.

    They are made from what another target of the same backend is made from. Without one, from the graphs before they
    were lowered, at the sizes and in the precision that a GPU of the bundle has, else at the native size and as the
    first target has them.

    Args:
        contents: Of a bundle.
        device: Not one of its targets.

    Raises:
        TargetError: A segment that nothing calls.
        BundleError: A segment without any engine.
    """
    there = [engine for segment in contents.segments.values() for engine in segment.engines]
    gpus = sorted(
        (e for e in there if e.shapes), key=lambda e: e.backend != device.backend
    )  # its own kind first
    like = gpus[0].target if gpus and device.backend != "onnxruntime" else None
    bare = [name for name, segment in contents.segments.items() if not segment.engines]
    if bare and like is None:
        raise BundleError(f"{bare[0]} has no engine of any target: compile the bundle again")
    native = segment_shapes(contents, contents.size) if device.sm and like is None else {}
    files = {entry.path for entry in contents.files}
    engines = {}
    for name, segment in contents.segments.items():
        if like is not None:
            new = [_like(e, segment, device, files) for e in segment.engines if e.target == like]
        else:
            new = [
                _like(segment.engines[0], segment, device, files, shapes) for shapes in native.get(name, [{}])
            ]
        engines[name] = (*segment.engines, *new)
    return with_engines(contents, engines)


def _like(
    model: Engine, segment: SegmentEntry, device: Device, files: Collection[str], shapes: Shapes | None = None
) -> Engine:
    graph, precision = model.graph, model.precision
    foreign = OPERATORS_DOMAIN in segment.domains and model.sm != device.sm  # its kernels are for another GPU
    if model.backend == "tensorrt" and (device.backend != "tensorrt" or foreign):
        # That graph is lowered. In FP32 the segment's own serves; another precision's lies beside it.
        open_graph = (
            segment.graph if precision == "fp32" else segment.graph[: -len("onnx")] + f"{precision}.onnx"
        )
        graph, precision = (open_graph, precision) if open_graph in files else (segment.graph, "fp32")
    return Engine(
        target=device.name,
        backend=device.backend,
        path=graph,
        bytes=segment.weight_bytes,
        graph=graph,
        built=False,
        sm=device.sm,
        precision=precision,
        shapes=dict(model.shapes if shapes is None else shapes),
        packed=device.backend == "onnxruntime" and OPERATORS_DOMAIN in segment.domains,
    )


def needs_library(segment: SegmentEntry, engine: Engine, version: str) -> bool:
    """Whether the kernels of an engine's packed weights are launched by the C++ library.

    Args:
        segment: The engine's.
        engine: Built or not.
        version: Of the TensorRT that builds it.
    """
    packed = OPERATORS_DOMAIN in segment.domains and engine.precision != "fp32"
    return engine.backend == "tensorrt" and packed and qdp.needs_library(version)


def present_library(bundle: Bundle, device: Device, version: str) -> tuple[str, ...]:
    """The plugin library that a bundle has for a target and a version of TensorRT, whole; empty where it has none."""
    for segment in bundle.contents.segments.values():
        for engine in segment.engines:
            if engine.target == device.name and engine.version == version and engine.plugins:
                with contextlib.suppress(BundleError):
                    bundle.verify(engine.plugins)
                    return engine.plugins
    return ()


def reason_to_build(bundle: Bundle, engine: Engine, device: Device, version: str) -> str | None:
    """Why an engine must be made; None where it is right as it is."""
    if not engine.built:
        return "it was not built yet"
    if engine.path == engine.graph:
        return None  # it is the graph
    if engine.backend != "onnxruntime":
        title = TITLES[engine.backend]
        if engine.version != version:
            return f"{title} {engine.version} built it and {version} is installed"
        if engine.sm != device.sm:
            return f"it was built for compute capability {engine.sm} and {device.name} has {device.sm}"
    try:
        bundle.verify([engine.path, *engine.plugins])
    except BundleError:
        return f"its file {'or its plugin library ' if engine.plugins else ''}was missing or damaged"
    return None
