"""A builder that needs no backend, a graph for it, and bundles with other engines. Spawned processes find them too."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from trimtab.bundle import Bundle, open_bundle, write_manifest
from trimtab.manifest import Engine
from trimtab.storage import GRAPHS, read_program, with_engines
from trimtab.targets.base import BuildOptions, EngineInfo, Progress
from trimtab.targets.cache import EngineCache
from trimtab.targets.device import Device, find_device
from trimtab.targets.engines import make_engines
from trimtab.targets.preflight import Machine
from trimtab.weights import WeightStore

DEVICE = find_device("cpu")
OPTIONS = BuildOptions(shapes={"x": (1, 4)}, precision="fp16")

Fake = Callable[..., Callable[[], list[Any]]]
"""Of the fixture `fake`: how a TensorRT that is not there is to behave -> what was asked of it."""

NANO = "orin-nano-8gb"
ORIN = Machine("Orin", "8.7", "36.4.3", "6.2", "10.3.0.30", 6 << 30)
"""What a board of it says of itself."""


def graph(weights: np.ndarray | None = None, *, names: str = "", order: int = 1) -> ir.Model:
    """``relu(x @ w + b)``, with a second output from inside an If."""
    if weights is None:
        weights = np.arange(16, dtype=np.float32).reshape(4, 4)
    x = ir.val("x", ir.DataType.FLOAT, ["n", 4])
    initializers = [
        ir.val(name, const_value=ir.tensor(array, name=name))
        for name, array in (("w", weights), ("b", np.ones(4, np.float32)), ("yes", np.array(True)))
    ]
    w, b, yes = initializers
    product = ir.node("MatMul", [x, w], name=f"{names}product")
    total = ir.node("Add", [product.outputs[0], b])
    branches = []
    for scale in (0.1, 0.2):
        inner = ir.node("Elu", [total.outputs[0]], {"alpha": scale})
        inner.outputs[0].name = f"{names}inner"
        branches.append(ir.Graph([], inner.outputs, nodes=[inner], name="branch"))
    branch = ir.node("If", [yes], {"then_branch": branches[0], "else_branch": branches[1]})
    relu = ir.node("Relu", [total.outputs[0]])
    for node, name in ((product, "p"), (total, "t")):
        node.outputs[0].name = names + name
    for value, name in ((relu.outputs[0], "y"), (branch.outputs[0], "z")):
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", 4])
    inside = ir.Graph(
        [x],
        [relu.outputs[0], branch.outputs[0]],
        nodes=[product, total, branch, relu],
        initializers=initializers[::order],
        opset_imports={"": 23},
        name="graph",
    )
    return ir.Model(inside, ir_version=10)


@dataclass
class FakeBuilder:
    """Writes ``payload`` as the engine, and a line to ``counter`` at every build."""

    counter: Path
    payload: bytes = b"engine" * 100
    seconds: float = 0.0
    version: str = "1.2.3"
    backend: str = "fake"
    fails: str = ""
    device_fields: tuple[str, ...] = tuple(f.name for f in fields(Device) if f.name != "title")

    def lower(self, model: ir.Model, device: Device) -> ir.Model:
        return model

    def build(
        self, model: ir.Model, device: Device, options: BuildOptions, out: Path, progress: Progress
    ) -> EngineInfo:
        with self.counter.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        out.write_bytes(self.payload[:10])
        if self.fails == "error":
            raise ValueError("no kernel")
        if self.fails == "interrupt":
            raise KeyboardInterrupt
        if self.fails == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fails == "nothing":
            out.unlink()
        else:
            time.sleep(self.seconds)
            out.write_bytes(self.payload)
        return EngineInfo(len(self.payload), 240.0, None, self.backend, self.version)

    def builds(self) -> int:
        return len(self.counter.read_text().splitlines()) if self.counter.exists() else 0


def want(folder: Path, builder: FakeBuilder) -> None:
    """What a process does that wants an engine."""
    with EngineCache(folder).get_or_build(graph(), DEVICE, OPTIONS, builder) as entry:
        assert entry.path.read_bytes() == builder.payload


def churn(folder: Path, counter: Path, limit: int, turns: int) -> None:
    """A process that keeps a cache over its limit, so that every build evicts."""
    cache = EngineCache(folder, limit_bytes=limit)
    for turn in range(turns):
        with cache.get_or_build(
            graph(), DEVICE, OPTIONS, FakeBuilder(counter, version=f"{turn % 5}")
        ) as entry:
            assert entry.path.read_bytes() == b"engine" * 100


def rebuilt(folder: Path, *targets: str, cache: EngineCache | None = None) -> Bundle:
    """The bundle with engines for other targets."""
    bundle = open_bundle(folder)
    segments = read_program(bundle).segments
    sizes, store = [bundle.contents.size], WeightStore(folder / GRAPHS)
    devices = [find_device(name) for name in targets]
    made = make_engines(segments, bundle.contents, devices, sizes, store, folder, cache, lambda text: None)
    write_manifest(folder, with_engines(bundle.contents, made))
    return open_bundle(folder)


def whole(folder: Path) -> Bundle:
    """A bundle of which every file is as it was written."""
    bundle = open_bundle(folder)
    bundle.verify()
    return bundle


def engines_for(folder: Path, target: str = NANO) -> dict[str, Engine]:
    """Segment -> the engine for a target that a whole bundle has one of each for."""
    contents = whole(folder).contents
    return {n: e for n, s in contents.segments.items() for e in s.engines if e.target == target}
