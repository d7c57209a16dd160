"""A small stand-in for `tensorrt` and `tensorrt.plugin`: holds a definition to the documented rules, then runs it.

The rules are those of NVIDIA's Python API reference for `tensorrt.plugin`: types in annotations, tensors before
attributes, the order of arguments of each decorated function, what an implementation returns, and that extra
arguments are SymInt32. Sizes are numbers here and not symbols.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

ATTRIBUTES = (int, float, str, bool, bytes, npt.NDArray[np.int32])


class SymInt32:
    has_builder = True
    """Whether a number may become an expression: not where a plugin is asked for types alone."""

    def __init__(self, value: int | SymInt32 | None = None) -> None:
        assert self.has_builder or isinstance(value, SymInt32)
        self.value: int = value.value if isinstance(value, SymInt32) else value  # type: ignore[assignment]
        assert isinstance(self.value, int)

    def __mul__(self, other: int | SymInt32) -> SymInt32:
        return type(self)(self.value * SymInt32(other).value)


class ShapeExpr(SymInt32):
    is_fake = False


class FakeExpr(ShapeExpr):
    """A size where types are asked for and not sizes; only other fakes may be made of it."""

    is_fake = True

    def __init__(self) -> None:
        pass


class SymExprs:
    def __init__(self, length: int) -> None:
        self.items: list[Any] = [None] * length

    def __setitem__(self, index: int, value: SymInt32) -> None:
        assert isinstance(value, SymInt32)
        self.items[index] = value

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class SymIntExprs(SymExprs):
    pass


class TensorDesc:
    def __init__(self, shape: tuple[Any, ...], dtype: str, fake: bool = False) -> None:
        self.shape_expr = (
            [FakeExpr()] * len(shape)
            if fake
            else [size if isinstance(size, ShapeExpr) else ShapeExpr(size) for size in shape]
        )
        self.dtype = dtype
        self.ndim = len(shape)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size.value for size in self.shape_expr)


class AutoTuneCombination:
    def __init__(self, io_types: str, layouts: str, tactics: list[int]) -> None:
        self.io_types, self.layouts, self.tactics = io_types, layouts, tactics


class KernelLaunchParams:
    NAMES = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")

    def __init__(self) -> None:
        for name in self.NAMES:
            setattr(self, name, 0 if name == "shared_mem" else 1)

    def __setattr__(self, name: str, value: int | SymInt32) -> None:
        assert name in self.NAMES
        self.__dict__[name] = SymInt32(value)


class Definition:
    """What the decorators have been given for one plugin."""

    def __init__(self, describe: Callable[..., Any]) -> None:
        self.describe = describe
        parameters = inspect.signature(describe).parameters
        kinds = {name: parameter.annotation for name, parameter in parameters.items()}
        assert all(parameter.default is inspect.Parameter.empty for parameter in parameters.values())
        self.tensors = [name for name, kind in kinds.items() if kind is TensorDesc]
        self.attributes = [name for name, kind in kinds.items() if kind is not TensorDesc]
        assert list(kinds) == self.tensors + self.attributes, "tensors come first"
        assert all(kinds[name] in ATTRIBUTES for name in self.attributes), "types, not their names"
        assert not {"outputs", "stream", "tactic"} & set(self.attributes)
        assert inspect.signature(describe).return_annotation is TensorDesc

    def attach(self, function: Callable[..., Any], last: list[str], *, all_attributes: bool) -> None:
        names = list(inspect.signature(function).parameters)
        kept = [name for name in self.attributes if name in names]
        assert names == self.tensors + kept + last
        # TensorRT hands an ahead-of-time implementation every attribute, whichever it names.
        assert not all_attributes or kept == self.attributes


def fake(version: str = "10.9.0.34") -> tuple[types.ModuleType, types.ModuleType, dict[str, Definition]]:
    """The two modules, and the definitions that land in them."""
    trt, trtp = types.ModuleType("tensorrt"), types.ModuleType("tensorrt.plugin")
    definitions: dict[str, Definition] = {}

    def register(plugin_id: str) -> Callable[[Any], Any]:
        namespace, name = plugin_id.split("::")
        assert "." not in plugin_id and namespace not in ("", "trt", "tensorrt", "std") and name

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            assert plugin_id not in definitions
            definitions[plugin_id] = Definition(function)
            return function

        return decorate

    def autotune(plugin_id: str) -> Callable[[Any], Any]:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            definitions[plugin_id].attach(function, ["outputs"], all_attributes=False)
            returned = inspect.signature(function).return_annotation
            assert typing.get_origin(returned) is list and typing.get_args(returned) == (AutoTuneCombination,)
            definitions[plugin_id].combinations = function  # type: ignore[attr-defined]
            return function

        return decorate

    def aot_impl(plugin_id: str) -> Callable[[Any], Any]:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            definitions[plugin_id].attach(function, ["outputs", "tactic"], all_attributes=True)
            returned = inspect.signature(function).return_annotation
            assert typing.get_origin(returned) is tuple
            name, kernel, launch, extra = typing.get_args(returned)
            assert set(typing.get_args(name)) == set(typing.get_args(kernel)) == {str, bytes}
            assert launch is KernelLaunchParams and issubclass(extra, SymExprs)
            definitions[plugin_id].implement = function  # type: ignore[attr-defined]
            return function

        return decorate

    def cdiv(first: ShapeExpr, second: int) -> ShapeExpr:
        assert isinstance(first, ShapeExpr), "two plain numbers are refused"
        return ShapeExpr(-(-first.value // second))

    def from_shape_expr(shape: tuple[Any, ...], dtype: str) -> TensorDesc:
        assert isinstance(shape, tuple)
        return TensorDesc(shape, dtype)

    members = (
        SymInt32,
        ShapeExpr,
        SymExprs,
        SymIntExprs,
        TensorDesc,
        AutoTuneCombination,
        KernelLaunchParams,
    )
    for member in (*members, register, autotune, aot_impl, cdiv, from_shape_expr):
        setattr(trtp, member.__name__, member)
    trt.__version__ = version  # type: ignore[attr-defined]
    trt.plugin = trtp  # type: ignore[attr-defined]
    return trt, trtp, definitions
