"""Time and memory of bundles, each in a process of its own, measured in turn."""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.child import Child, NoAnswer, serve
from trimtab.errors import InputError, TrimtabError


def bench(
    bundles: Sequence[Path],
    *,
    rounds: int = 3,
    target: str | None = None,
    provider: str | None = None,
    threads: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measures the default picture of one bundle, or of several in turn.

    Bundles take turns picture by picture, so that a machine that changes its speed changes it for all.

    Args:
        bundles: Folders.
        rounds: Pictures of each that count, after one that does not.
        target: Whose engines to run.
        provider: Where ONNX Runtime runs its graphs: "cpu" or "cuda".
        threads: CPU threads; 0 for one a core.
        progress: Told what is being measured.

    Returns:
        ``bundles``, each with ``step_ms``, ``picture_ms`` and ``python_ms`` (medians; the last is what a step
        takes beside its engine calls), ``peak_bytes`` (of the process; None on Windows), ``weight_bytes`` and
        ``segments`` (``name``, ``calls`` in a picture, ``ms`` of one call, ``weight_bytes``); with two bundles
        ``step_ratio``, the median of the rounds' ratios, first to second.

    Raises:
        InputError: Fewer than one round.
        TrimtabError: A bundle cannot be loaded or run: as `trimtab.load` raises it, or its process ended.
    """
    if rounds < 1:
        raise InputError(f"{rounds} rounds were asked for: ask for one or more")
    options = {"target": target, "provider": provider, "threads": threads}
    measured: list[list[dict[str, Any]]] = [[] for _ in bundles]
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(Child(__name__)) for _ in bundles]
        for number in range(rounds + 1):
            what = f"picture {number} of {rounds}" if number else "warming up"
            for bundle, child, pictures in zip(bundles, children, measured, strict=True):
                progress(f"{bundle}: {what}")
                try:
                    pictures.append(child.ask({"bundle": str(bundle), **options}))
                except NoAnswer as error:
                    room = "make room, or choose a bundle of a smaller size"
                    raise TrimtabError(error.line(f"the process that runs {bundle}", room)) from error
    counted = [pictures[1:] for pictures in measured]
    result: dict[str, Any] = {
        "bundles": [_summary(str(b), pictures) for b, pictures in zip(bundles, counted, strict=True)]
    }
    if len(bundles) == 2:
        first, second = counted
        ratios = [_step_ms(a) / _step_ms(b) for a, b in zip(first, second, strict=True)]
        result["step_ratio"] = statistics.median(ratios)
    return result


def main() -> None:
    """A process that draws a picture of its bundle whenever it is asked, and answers with the times of its parts."""
    serve(lambda options: _picture(*_loaded(**options)))


@functools.lru_cache(maxsize=1)
def _loaded(bundle: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A bundle, and what to ask it for; both stay for the next picture."""
    from trimtab.runtime.load import load
    from trimtab.runtime.stand_ins import stand_ins

    pipe = load(bundle, **options)
    contents = pipe.bundle.contents
    return pipe, {"seed": 0, **stand_ins(contents.tasks[pipe.tasks[0]], contents.size)}


def _picture(pipe: Any, options: dict[str, Any]) -> dict[str, Any]:
    """One picture's times. Where steps are CUDA graphs, they are timed as such, and the calls in a second picture."""
    if not getattr(pipe.engines.backend, "graphs", False):
        return _drawn(pipe, options, one_by_one=True)
    whole = _drawn(pipe, options, one_by_one=False)
    return _drawn(pipe, options, one_by_one=True) | {name: whole[name] for name in ("picture", "steps")}


def _drawn(pipe: Any, options: dict[str, Any], *, one_by_one: bool) -> dict[str, Any]:
    calls: dict[str, list[float]] = {}
    in_calls = 0.0

    def on_call(segment: str, seconds: float) -> None:
        nonlocal in_calls
        in_calls += seconds
        calls.setdefault(segment, []).append(seconds)

    told = on_call if one_by_one else None
    start = time.perf_counter()
    request, plan, _ = pipe.prepare(**options)
    # As `Plan.run` does it, which returns while a GPU still works, and says nothing of where the first step begins.
    plan.begin(request, told)
    plan.prologue.wait()
    marks = [time.perf_counter()]
    in_steps: list[float] = []
    for step in plan.steps:
        in_calls = 0.0
        step.run(request, told)
        step.bound.wait()
        marks.append(time.perf_counter())
        in_steps.append(in_calls)
    plan.epilogue.run(told)
    plan.epilogue.wait()
    whole = time.perf_counter() - start
    steps = [b - a for a, b in itertools.pairwise(marks)]
    python = [step - inside for step, inside in zip(steps, in_steps, strict=True)]
    segments = pipe.bundle.contents.segments
    return {
        "picture": whole,
        "steps": steps,
        "python": python,
        "calls": calls,
        "peak_bytes": peak_bytes(),
        "weight_bytes": {name: segments[name].weight_bytes for name in calls},
    }


def _step_ms(picture: dict[str, Any]) -> float:
    return 1000 * float(statistics.median(picture["steps"]))


def _summary(bundle: str, pictures: list[dict[str, Any]]) -> dict[str, Any]:
    weights = pictures[0]["weight_bytes"]
    segments = []
    for name in weights:
        times = [seconds for picture in pictures for seconds in picture["calls"][name]]
        calls = len(pictures[0]["calls"][name])
        segments.append(
            {
                "name": name,
                "calls": calls,
                "ms": 1000 * statistics.median(times),
                "weight_bytes": weights[name],
            }
        )
    return {
        "bundle": bundle,
        "step_ms": statistics.median(map(_step_ms, pictures)),
        "picture_ms": 1000 * statistics.median(picture["picture"] for picture in pictures),
        "python_ms": 1000 * statistics.median(p for picture in pictures for p in picture["python"]),
        "peak_bytes": max((p["peak_bytes"] for p in pictures if p["peak_bytes"] is not None), default=None),
        "weight_bytes": sum(weights.values()),
        "segments": segments,
    }


def peak_bytes() -> int | None:
    """The most memory that this process has held; None on Windows, which Python does not ask."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        # getrusage's count begins with what the parent held when it started this process; this one does not.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
