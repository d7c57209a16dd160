"""What people see: results as tables, work in progress as a bar. Nothing here prints."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from trimtab.program import loop_of

Result = dict[str, Any]
"""What a command prints with --json."""


def logs(debug: bool) -> None:
    """Sends warnings, or everything, to stderr: a line each, with tracebacks where there are any."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[handler], force=True)
    if not debug:  # what takes hours says so at its start
        for name in ("planning", "sensitivity"):
            logging.getLogger(f"trimtab.calibration.{name}").setLevel(logging.INFO)


def escape_names(stream: TextIO | None) -> None:
    """Has a stream write what its encoding has no letters for, as a file's name may be, with escapes."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = f"trimtab: {record.levelname.lower()}: {record.getMessage()}"
        return line + "\n" + self.formatException(record.exc_info) if record.exc_info else line


def as_json(result: Result) -> str:
    """One line of JSON, which knows neither NaN nor infinity: null stands in their place."""
    try:
        return json.dumps(result, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(result), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compile(result: Result) -> Iterator[str]:
    """A new bundle."""
    total = sum(f["bytes"] for f in result["files"])
    yield f"{result['bundle']}: {total / 1e6:.1f} MB in {result['seconds']:.1f} s"
    yield from inspect(result)


def build(result: Result) -> Iterator[str]:
    """The engines that were made, and why; what was not."""
    if result["made"]:
        rows = [
            [made["target"], made["segment"], _mb(made["bytes"]), f"{made['seconds']:.1f}", made["reason"]]
            for made in result["made"]
        ]
        yield _table(["target", "segment", "MB", "s", "why"], rows)
    for target, reason in result["skipped"].items():
        yield f"left out {target}: {reason}"
    yield (
        f"{result['bundle']}: {len(result['made'])} engines made, {result['kept']} kept, in {result['seconds']:.1f} s"
    )


def run(result: Result) -> Iterator[str]:
    """Pictures' files and the seed."""
    yield from result["images"]
    yield f"seed {result['settings']['seed']}, {result['seconds']:.2f} s"


def score(result: Result) -> Iterator[str]:
    """Candidates, the cheapest first."""
    rows = [
        [
            c["name"],
            c["kind"],
            f"{c['parameters']:,}",
            f"{c['loss']:.3e}",
            "" if c["error"] is None else f"{c['error']:.1e}",
        ]
        for c in sorted(result["candidates"], key=lambda c: c["loss"])
    ]
    yield _table(["layer", "kind", "parameters", "output loss", "error"], rows)
    yield f"{result['scores']}: {len(rows)} layers on {result['samples']} samples, {result['seconds']:.1f} s"


def distill(result: Result) -> Iterator[str]:
    """What was trained, and how far."""
    before, after = result["parameters"]
    first, last = result["losses"]
    yield f"{result['student']}: {after:,} of {before:,} parameters"
    yield f"{result['steps']} steps in {result['seconds']:.1f} s on {result['data']}, loss {first:.4g} to {last:.4g}"


def bench(result: Result) -> Iterator[str]:
    """Times, a bundle after the other."""
    rows = []
    for entry in result["bundles"]:
        rows.append(
            [
                entry["bundle"],
                "a step",
                _ms(entry["step_ms"]),
                "" if entry["peak_bytes"] is None else _mb(entry["peak_bytes"]),
                _mb(entry["weight_bytes"]),
            ]
        )
        rows.append(["", "a picture", _ms(entry["picture_ms"]), "", ""])
        rows.append(["", "python, a step", _ms(entry["python_ms"]), "", ""])
        rows += [
            ["", f"{s['name']} x{s['calls']}", _ms(s["ms"]), "", _mb(s["weight_bytes"])]
            for s in entry["segments"]
        ]
    yield _table(["bundle", "what", "ms", "peak MB", "weights MB"], rows)
    if "step_ratio" in result:
        yield f"step time, first to second: {result['step_ratio']:.3f}"


def compare(result: Result) -> Iterator[str]:
    """Errors by step and by module."""
    yield _table(["step", "relative error"], [[str(i), f"{e:.3e}"] for i, e in enumerate(result["steps"])])
    if result["modules"]:
        rows = [[m["name"], f"{m['error']:.3e}"] for m in result["modules"]]
        yield _table(["module, at the first step", "relative error"], rows)
    yield f"largest difference of the picture: {result['picture']:.3e} (0..1)"


def inspect(result: Result) -> Iterator[str]:
    """Segments, schedules and passes."""
    rows = []
    for segment in result["segments"]:
        engines = ", ".join(
            f"{e['target']} ({e['backend']}, {_mb(e['bytes'])} MB)" for e in segment["engines"]
        )
        rows.append([segment["name"], f"{segment['parameters']:,}", _mb(segment["weight_bytes"]), engines])
    yield _table(["segment", "parameters", "weights MB", "engines"], rows)
    loops: dict[tuple[str, str], Result] = {}
    for schedule in result["schedules"]:
        # Of those that start later the first is the whole loop.
        loops.setdefault((schedule["task"], loop_of(schedule["name"])), schedule)
    rows = []
    for (task, name), schedule in loops.items():
        kinds = collections.Counter(" + ".join(calls) for calls in schedule["calls"])
        rows += [[task, name, str(count), kind] for kind, count in kinds.items()]
    yield _table(["task", "schedule", "steps", "calls of a step"], rows)
    if result["removal"]:
        yield from _removal(result["removal"])
    if result["passes"]:
        yield _table(
            ["pass", "segment", "applied", "refused"],
            [[p["name"], p["segment"], str(p["applied"]), str(p["refused"])] for p in result["passes"]],
        )


def _removal(plan: Result) -> Iterator[str]:
    """What was removed, how much was asked for, and what it costs."""
    line = f"removed {len(plan['removed'])} layers by {plan['method']}"
    if plan["reached"] is not None:
        where = f" on {plan['details']['device']}" if plan["measure"] == "time" else ""
        line += f": {plan['reached']:.1%} of {plan['measure']}{where}"
        line += "" if plan["share"] is None else f", {plan['share']:.1%} asked for"
    yield line
    if plan["joint_loss"] is not None:
        line = f"loss {plan['joint_loss']:.3e} measured, {plan['predicted_loss']:.3e} predicted"
        if plan["rank_correlation"] is not None:
            sets = plan["details"]["random_sets"]
            line += f"; their rank correlation over {sets} random sets is {plan['rank_correlation']:.2f}"
        yield line


def plan(result: Result) -> Iterator[str]:
    """Segments with their bytes and times, and the sum."""
    rows = [
        [
            s["name"],
            s["stage"],
            _mb(s["weight_bytes"]),
            _mb(s["activation_bytes"]),
            _mb(s["buffer_bytes"] + s["fixed_bytes"]),
            "" if s["ms"] is None else _ms(s["ms"]),
        ]
        for s in result["segments"]
    ]
    yield _table(["segment", "runs in", "weights MB", "activations MB", "other MB", "ms"], rows)
    needed = result["low_memory_bytes" if result["low_memory"] else "peak_bytes"]
    room = result["room_bytes"]
    yield (
        f"{result['device']}, {result['precision']}, {result['size'][0]}x{result['size'][1]}: {_mb(needed)} MB"
        + ("" if room is None else f" of {_mb(room)} MB: it fits")
    )
    yield f"{_mb(result['base_bytes'])} MB of it are {result['base']}"
    yield "most of it: " + ", ".join(f"{part['name']} {_mb(part['bytes'])} MB" for part in result["largest"])
    if result["step_ms"] is not None:
        yield f"a step {_ms(result['step_ms'])} ms, a picture {_ms(result['picture_ms'])} ms at best"


def devices(result: Result) -> Iterator[str]:
    """The known devices; FP16 is dense, with FP32 accumulation."""
    header = ["name", "device", "SM", "memory GiB", "bandwidth GB/s", "fp16 TFLOPS", "backend", ""]
    rows = [
        [
            d["name"],
            d["title"],
            d["sm"] or "",
            f"{d['memory_bytes'] / 2**30:g}" if d["memory_bytes"] else "",
            f"{d['bandwidth_gb_s']:g}" if d["bandwidth_gb_s"] else "",
            f"{d['fp16_tflops']:g}" if d["fp16_tflops"] else "",
            d["backend"],
            "<- at hand" if d["name"] == result["at_hand"] else "",
        ]
        for d in result["devices"]
    ]
    yield _table(header, rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, title in enumerate(header):
        numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
        table.add_column(title, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*map(Text, row))  # brackets in a name are no markup
    # A pipe has no width of its own, and cut names help nobody.
    console = Console() if _is_terminal(sys.stdout) else Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _is_terminal(stream: TextIO | None) -> bool:
    """None stands for a stream that was closed before Python began."""
    return stream is not None and stream.isatty()


def _is_number(cell: str) -> bool:
    return not cell or cell.replace(",", "").replace(".", "").replace("e-", "").replace("e+", "").isdecimal()


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f}"


def _ms(value: float) -> str:
    return f"{value:.2f}"


@contextlib.contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A line that says what is being worked on and for how long, on a terminal; debug logs elsewhere."""
    if not _is_terminal(sys.stderr):
        yield logging.getLogger(__name__).debug
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda text: progress.update(task, description=text)


@contextlib.contextmanager
def bar() -> Iterator[Callable[[int, int], None] | None]:
    """A bar over the steps, on a terminal only."""
    if not _is_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
