"""One engine build, in a process of its own: nothing is imported here but TensorRT, and plugins where a graph has them.

A parser that aborts or a kernel's out-of-memory killer then ends this process and not the compiler, and all of the
memory goes back. Talks in lines of JSON: the job comes in as one line; out come ``{"at": phase}`` and, once,
``{"done": {...}}`` or ``{"failed": reason, "kind": "operator" | "memory" | "build"}``; of a disk that did not take the
engine, ``"kind": "disk"`` with its ``"errno"``.

Written against the API that TensorRT 10.3 to 11 and TensorRT for RTX 1.x have in common. What only one of them has is
asked for by name. Every network is strongly typed: from 11 on there is nothing else.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|insufficient memory|bad_alloc|allocation failed", re.IGNORECASE)
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
_QUIET_S = 0.2
"""Phases may change thousands of times a second; nobody reads that."""


class _Failed(Exception):
    """Args: the kind and the reason."""


def main() -> None:
    """Reads a job, builds, and ends."""
    # The library writes to stdout as it likes: the lines go elsewhere.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer: dict[str, Any] = {"done": _build(job, lines)}
    except _Failed as error:
        answer = {"kind": error.args[0], "failed": error.args[1]}
    except MemoryError:
        answer = {"kind": "memory", "failed": "memory ran out"}
    except OSError as error:
        answer = {"kind": "disk", "failed": error.strerror or str(error), "errno": error.errno}
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        answer = {"kind": "memory" if _OUT_OF_MEMORY.search(text) else "build", "failed": text}
    lines.write(json.dumps(answer) + "\n")
    lines.flush()
    # Not by way of the interpreter's end, where a library's destructors may still crash.
    os._exit(0)


def _end_with_parent() -> None:
    """Nobody waits for an engine whose compiler was killed."""
    sys.stdin.read()
    os._exit(1)


def _build(job: dict[str, Any], lines: TextIO) -> dict[str, Any]:
    trt = importlib.import_module(job["package"])
    log = _logger(trt)
    if hasattr(trt, "init_libnvinfer_plugins"):  # some operators are plugins of TensorRT's own
        trt.init_libnvinfer_plugins(log, "")
    for path in job["plugins"]:
        if trt.get_plugin_registry().load_library(path) is None:
            raise log.failure(f"TensorRT did not take the plugin library {path}")
    flags = ["STRONGLY_TYPED"]
    if job["packed"] and not job["plugins"]:  # else a library has them
        from trimtab.targets.plugins import qdp

        qdp.register()
        flags.append("PREFER_AOT_PYTHON_PLUGINS")
    builder = trt.Builder(log)
    known = [getattr(trt.NetworkDefinitionCreationFlag, name, None) for name in flags]
    network = builder.create_network(sum(1 << int(flag) for flag in known if flag is not None))
    _parse(trt, network, log, job)
    if "Attention" in job["operators"]:
        _let_decompose(trt, network)
    config = _config(trt, builder, job)
    config.progress_monitor = _monitor(trt, lines)
    timings = _load_timings(config, job["timing_cache"])
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise log.failure("the builder gave no engine")
    with Path(job["out"]).open("wb") as stream:
        stream.write(engine)
    if timings:
        Path(job["timing_cache"]).write_bytes(config.get_timing_cache().serialize())
    return {"version": trt.__version__, "activation_bytes": log.activation_bytes, "peak_bytes": _peak_bytes()}


def _parse(trt: Any, network: Any, log: Any, job: dict[str, Any]) -> None:
    parser = trt.OnnxParser(network, log)
    # An operator that the parser does not know is taken for a plugin, and one without a plugin may end the process.
    if unknown := [name for name in job["operators"] if not parser.supports_operator(name)]:
        raise _Failed("operator", ", ".join(unknown))
    if not parser.parse_from_file(job["graph"]):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise log.failure("; ".join(error.desc() for error in errors[:2]) or "the graph cannot be parsed")


def _let_decompose(trt: Any, network: Any) -> None:
    """Lets an attention that no fused kernel fits, in FP32 or with narrow heads, run as its parts; else it fails."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer  # a network gives its layers out as their base class
            layer.attention.decomposable = True


def _config(trt: Any, builder: Any, job: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    if job["compute_capability"] is not None:
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, "SM" + job["compute_capability"].replace(".", ""), None)
        if capability is None or not config.set_compute_capability(capability, 0):
            raise _Failed(
                "build", f"compute capability {job['compute_capability']} is unknown to this version"
            )
    if job["workspace_bytes"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace_bytes"])
    if job["optimization_level"] is not None:
        config.builder_optimization_level = job["optimization_level"]
    for name, value in job["extra"].items():
        if not hasattr(config, name):
            raise _Failed("build", f"its configuration has no {name!r}")
        setattr(config, name, value)
    return config


def _load_timings(config: Any, path: str | None) -> bool:
    """Whether timings are kept. TensorRT for RTX is never asked: it would want a GPU."""
    if path is None:
        return False
    known = Path(path).read_bytes() if Path(path).exists() else b""
    return bool(config.set_timing_cache(config.create_timing_cache(known), False))


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the errors, and what the builder says of memory."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.activation_bytes: int | None = None

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(text.split()))
            elif found := _ACTIVATIONS.search(text):
                self.activation_bytes = int(found[1])

        def failure(self, otherwise: str) -> _Failed:
            # The first error is the cause; what follows are those who called.
            reason = self.errors[0] if self.errors else otherwise
            memory = any(_OUT_OF_MEMORY.search(text) for text in (*self.errors, otherwise))
            return _Failed("memory" if memory else "build", reason)

    return Logger()


def _monitor(trt: Any, lines: TextIO) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Says what the builder is at."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.last = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if time.monotonic() - self.last > _QUIET_S:
                self.last = time.monotonic()
                lines.write(json.dumps({"at": name}) + "\n")

        def step_complete(self, name: str, step: int) -> bool:
            return True

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()


def _peak_bytes() -> int | None:
    """The most memory that this process has held; unlike getrusage's, without what its parent held."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return None
