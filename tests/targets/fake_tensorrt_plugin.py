"""tensorrt.plugin as far as a registration needs it. Tests copy it to tensorrt/plugin.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensorrt import _note


class TensorDesc: ...


class AutoTuneCombination: ...


class KernelLaunchParams: ...


class SymExprs: ...


def register(name: str) -> Callable[[Any], Any]:
    _note("register", name)
    return lambda function: function


def autotune(name: str) -> Callable[[Any], Any]:
    return lambda function: function


aot_impl = autotune
