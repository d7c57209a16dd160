"""TensorRT as far as a build needs it: notes every call, fails as it is told. Tests copy it to tensorrt/__init__.py.

``behaviour.json`` beside it says: ``version``; ``strongly_typed_only`` (as from 11 on, without the flag); ``unknown``
operators; and ``endings``, one a build: "engine", "memory", "none", "killed", "abort", "hang", "error" or "full".
"""

from __future__ import annotations

import enum
import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parents[1]
_TOLD = json.loads((_HERE / "behaviour.json").read_text())
__version__ = _TOLD["version"]


def _note(*what: Any) -> None:
    with (_HERE / "calls.jsonl").open("a") as stream:
        stream.write(json.dumps(what) + "\n")


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class IProgressMonitor:
    pass


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    PREFER_AOT_PYTHON_PLUGINS = 3
    if not _TOLD["strongly_typed_only"]:
        STRONGLY_TYPED = 1


class _Error:
    def desc(self) -> str:
        return "no such thing"


def init_libnvinfer_plugins(log: Any, namespace: str) -> None:
    _note("init_libnvinfer_plugins", namespace)


class _Registry:
    def load_library(self, path: str) -> object:
        _note("load_library", path)
        return None if "strange" in path else object()


def get_plugin_registry() -> _Registry:
    return _Registry()


class _Network:
    num_layers = 0


class OnnxParser:
    num_errors = 1

    def __init__(self, network: Any, log: Any) -> None:
        pass

    def supports_operator(self, name: str) -> bool:
        return name not in _TOLD["unknown"]

    def parse_from_file(self, path: str) -> bool:
        _note("parse_from_file", sorted(file.name for file in Path(path).parent.iterdir()))
        return True

    def get_error(self, index: int) -> _Error:
        return _Error()


class _TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"timed;"


class _Config:
    builder_optimization_level = 3
    max_aux_streams = -1
    progress_monitor: Any = None

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        _note("set_memory_pool_limit", pool.name, size)

    def create_timing_cache(self, data: bytes) -> _TimingCache:
        return _TimingCache(data)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        _note("set_timing_cache", cache.data.decode(), ignore_mismatch)
        self.cache = cache
        return True

    def get_timing_cache(self) -> _TimingCache:
        return self.cache


class Builder:
    def __init__(self, log: Any) -> None:
        self.log = log

    def create_network(self, flags: int) -> _Network:
        _note("create_network", flags)
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config()

    def build_serialized_network(self, network: Any, config: _Config) -> bytes | None:
        calls = (_HERE / "calls.jsonl").read_text().splitlines()
        turn = sum(json.loads(call)[0] == "build" for call in calls)
        _note("build", config.builder_optimization_level, config.max_aux_streams)
        ending = _TOLD["endings"][min(turn, len(_TOLD["endings"]) - 1)]
        config.progress_monitor.phase_start("Timing tactics", None, 3)
        if ending == "memory":
            self.log.log(
                ILogger.Severity.ERROR,
                "[virtualMemoryBuffer.cpp] Error Code 2: OutOfMemory (no further info)",
            )
        if ending == "none":
            self.log.log(ILogger.Severity.ERROR, "could not find any\n implementation")
            self.log.log(ILogger.Severity.ERROR, "and so it fails")
        if ending == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if ending == "abort":
            os.write(2, b"terminate called after throwing an instance of 'Trouble'\n")
            os.abort()
        if ending == "hang":
            (_HERE / "pid").write_text(str(os.getpid()))
            time.sleep(60)
        if ending == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if ending == "error":
            raise RuntimeError("what now")
        if ending == "engine":
            self.log.log(ILogger.Severity.INFO, "Total Activation Memory: 4096 bytes")
            return b"an engine"
        return None
