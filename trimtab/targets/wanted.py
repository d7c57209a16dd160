"""What a target needs that a bundle does not have: engines that are missing, and engines that are not right."""

from __future__ import annotations

from dataclasses import replace

from trimtab.bundle import Bundle
from trimtab.errors import BundleError
from trimtab.manifest import Contents, Engine, SegmentEntry
from trimtab.runtime.sessions.check import TITLES
from trimtab.storage import with_engines
from trimtab.targets.bindings import Shapes, segment_shapes
from trimtab.targets.device import Device


def with_target(contents: Contents, device: Device) -> Contents:
    """The contents with engines of a further target, none of them built.

    They are made from what another target of the same backend is made from. Without one, from the graphs of a target
    whose graphs are not lowered, in its precision, at the sizes that engines of the bundle have, else the native one.

    Args:
        contents: Of a bundle.
        device: Not one of its targets.

    Raises:
        TargetError: A segment that nothing calls.
    """
    kin = next((e.target for s in contents.segments.values() for e in s.engines if _kin(e, device)), None)
    other = next((e.target for s in contents.segments.values() for e in s.engines if e.shapes), None)
    native = segment_shapes(contents, contents.size) if kin is None and other is None and device.sm else {}
    engines = {}
    for name, segment in contents.segments.items():
        if device.backend == "onnxruntime":
            new = [_wanted(segment, device, {})]
        elif kin is not None:
            new = [_like(engine, segment, device) for engine in segment.engines if engine.target == kin]
        elif other is not None:
            new = [_wanted(segment, device, e.shapes) for e in segment.engines if e.target == other]
        else:
            new = [_wanted(segment, device, shapes) for shapes in native[name]]
        engines[name] = (*segment.engines, *new)
    return with_engines(contents, engines)


def _kin(engine: Engine, device: Device) -> bool:
    return engine.backend == device.backend != "onnxruntime"


def _like(engine: Engine, segment: SegmentEntry, device: Device) -> Engine:
    return replace(
        _wanted(segment, device, engine.shapes),
        graph=engine.graph,
        path=engine.graph,
        precision=engine.precision,
        plugins=engine.plugins,
    )


def _wanted(segment: SegmentEntry, device: Device, shapes: Shapes) -> Engine:
    whole = next((engine for engine in segment.engines if engine.backend != "tensorrt"), None)
    graph = segment.graph if whole is None else whole.graph
    return Engine(
        target=device.name,
        backend=device.backend,
        path=graph,
        bytes=segment.weight_bytes,
        graph=graph,
        built=False,
        sm=device.sm,
        precision="fp32" if whole is None else whole.precision,
        shapes=dict(shapes),
    )


def reason_to_build(bundle: Bundle, engine: Engine, device: Device, version: str) -> str | None:
    """Why an engine must be made; None where it is right as it is."""
    if not engine.built:
        return "it was not built yet"
    if engine.backend == "onnxruntime":
        return None  # it is the graph
    title = TITLES[engine.backend]
    if engine.version != version:
        return f"{title} {engine.version} built it and {version} is installed"
    if engine.sm != device.sm:
        return f"it was built for compute capability {engine.sm} and {device.name} has {device.sm}"
    try:
        bundle.verify([engine.path])
    except BundleError:
        return "its file was missing or damaged"
    return None
