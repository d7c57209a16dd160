"""Everything that trimtab raises on purpose.

TrimtabError
├── InputError          a value, file or option that the user gave
├── ExportError         a model that cannot become a Program
├── PassError           a graph that a pass cannot take
├── CalibrationError    a measurement that cannot be made or trusted
├── TargetError         a device or an engine
│   ├── UnsupportedOp   the backend has no such operator
│   ├── BuildFailed     the engine builder gave up
│   └── WrongDevice     an engine that was built for another device
├── BundleError         a bundle that is damaged, foreign or too new
└── MissingDependency   an optional package that is not installed

Every message is one line: what was found, what was needed, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


class TrimtabError(Exception):
    """Base of all errors that trimtab raises on purpose."""


class InputError(TrimtabError):
    """A value, a file or an option that the user gave cannot be used."""


class ExportError(TrimtabError):
    """A model cannot be turned into a Program."""


class PassError(TrimtabError):
    """A pass was given a graph or data that it cannot work on."""


class CalibrationError(TrimtabError):
    """A measurement on the model failed or cannot be trusted."""


class TargetError(TrimtabError):
    """Something about a device or an engine."""


class UnsupportedOp(TargetError):
    """The backend has no implementation of an operator."""


class BuildFailed(TargetError):
    """The engine builder gave up."""


class WrongDevice(TargetError):
    """The engine was built for another device or version."""


class BundleError(TrimtabError):
    """A bundle is damaged, foreign or newer than this version of trimtab."""


class MissingDependency(TrimtabError):
    """An optional package is not installed.

    Args:
        package: The name that was imported.
        extra: The extra of trimtab that installs it; "" where none does.
        advice: What to do, where that is another thing than to install the extra.
    """

    def __init__(self, package: str, extra: str, advice: str | None = None) -> None:
        told = advice or f"run pip install 'trimtab[{extra}]'"
        super().__init__(f"the package {package!r} is not installed and is needed here: {told}")
        self.package = package
        self.extra = extra
        self._advice = advice

    def __reduce__(self) -> tuple[type[MissingDependency], tuple[str, str, str | None]]:
        """So that it comes back whole from a process of a caller's pool."""
        return type(self), (self.package, self.extra, self._advice)


def first_line(error: BaseException) -> str:
    """What a message quotes of an error that others raised: 200 characters of its first line, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def did_you_mean(word: str, words: Iterable[str], otherwise: str) -> str:
    """What a message about an unknown word ends with: "did you mean a or b?", or else something to do."""
    near = difflib.get_close_matches(word, [*words], 3, 0.5)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def nearest(name: str, known: Iterable[str], others: Iterable[str] = ()) -> str:
    """ "did you mean x? known are x, y": what an error says about a name that is none of the known ones.

    ``others`` are taken as well, and not listed.
    """
    names = [*known]
    listed = f"known are {', '.join(names) or 'none'}"
    hint = did_you_mean(name, [*names, *others], "")
    return f"{hint} {listed}" if hint else listed


_COMPILE_PACKAGES = (
    "torch",
    "onnx_ir",
    "onnxscript",
    "onnx",
    "diffusers",
    "transformers",
    "scipy",
    "huggingface_hub",
)


def explain(error: BaseException, extra: Callable[[], str]) -> str:
    """What a user is told of any error, in one line.

    Args:
        error: What was raised.
        extra: Gives the extra that installs the packages which are imported where they are needed.
    """
    if isinstance(error, TrimtabError):
        return str(error)
    if isinstance(error, MemoryError):
        return "memory ran out: choose a smaller size or batch"
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in _COMPILE_PACKAGES:
            return str(MissingDependency(package, extra()))
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename} cannot be used ({error.strerror}): check its name and who may read and write it"
    return f"{type(error).__name__}: {first_line(error)} (a fault in trimtab: run it with --debug)"
