"""Everything that needs an NVIDIA GPU, in one command and within 10 minutes.

    python benchmarks/gpu_checks.py [-o gpu_checks.json] [--bundle BUNDLE ...] [--kernels FILE]

Compiles the sample models for this GPU: plain, with feature inheritance and HiDiffusion beyond the trained size, and
with 2-bit weights. For every backend that is installed (ONNX Runtime's CUDA provider, TensorRT for RTX, TensorRT)
builds the engines, draws a picture with each and holds it against the CPU's, times a step of the plain one with and
without CUDA graphs, and sees that a number which is not finite reaches the picture. Then the kernels of packed weights,
by `benchmarks/vq_kernels.py`, which may have compiled them elsewhere. What cannot run here is skipped by name, with the
reason; each check has a process of its own, so that one which dies fails alone. Prints a table and writes JSON. The
exit code is 1 where a check failed.

Send the JSON with a report: docs/hardware.md keeps what has run on which GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).parents[1] / "samples" / "01_shapes" / "models"
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "plain": ("shapes-sd", "--precision", "fp32"),
    "inherit and HiDiffusion": ("shapes-sd", "--inherit", "2", "--size", "128x128", "--hidiffusion"),
    "2 bits": ("shapes-dit", "--vq", "2"),
}
"""Name -> the sample model and what it is compiled with: on a GPU in FP16 unless it says so. The first one is timed."""

PROMPT = "a red circle"
CLASS = 1
BUDGET_S = 600.0
LIMITS = {"fp32": 2 / 255, "fp16": 8 / 255}
"""How far a picture may be from the CPU's, which is FP32, at its worst pixel. FP16's rounding alone was up to 5.1
levels of an 8-bit picture (docs/precision.md)."""
KERNEL_LIMIT = 5e-3
"""Of the kernels' largest difference from cuBLAS by the largest value: four units of FP16's 10 bits are 3.9e-3."""
PACKAGES = ("trimtab", "onnxruntime-gpu", "tensorrt-rtx", "tensorrt", "torch", "triton", "numpy")
TARGETS = {"tensorrt_rtx": "here-rtx", "tensorrt": "here-trt"}
"""Backend -> the name that this GPU has as a target of it."""


@dataclass(frozen=True)
class Machine:
    """What the checks run on.

    Attributes:
        gpu: The GPU's name; None without one.
        why_none: Why there is none.
        sm: Its compute capability.
        memory_bytes: Its memory.
        shared_memory: The CPU lives in it too.
        driver: The driver's version; None where nvidia-smi does not say.
        cuda: The highest CUDA version that the driver serves.
        jetson: Jetson Linux, on a Jetson.
        versions: Package -> its version, of those that are installed.
    """

    gpu: str | None = None
    why_none: str = ""
    sm: str = ""
    memory_bytes: int = 0
    shared_memory: bool = False
    driver: str | None = None
    cuda: str | None = None
    jetson: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What a check found: "ok", "failed" or "skipped", why, and its numbers."""

    check: str
    result: str
    why: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


Check = Callable[[Mapping[str, Path]], dict[str, Any]]
"""Given bundles by name it returns numbers; with "why" among them where it failed."""


def look() -> Machine:
    """This machine."""
    from trimtab.errors import TargetError
    from trimtab.runtime.sessions.check import JETSON
    from trimtab.runtime.sessions.cuda import Driver
    from trimtab.targets.machine import read_text, run_text
    from trimtab.targets.preflight import l4t_version

    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    try:
        driver = Driver()
    except TargetError as error:
        return Machine(why_none=str(error), versions=versions)
    try:
        said = run_text(("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")).split()
        return Machine(
            gpu=driver.name,
            sm=driver.sm,
            memory_bytes=driver.memory()[1],
            shared_memory=driver.integrated,
            driver=said[0] if said else None,
            cuda=driver.version,
            jetson=l4t_version(read_text(JETSON)),
            versions=versions,
        )
    finally:
        driver.close()


# ---- the bundle ----


def device_rows(machine: Machine) -> str:
    """This GPU as a target of both TensorRTs. What a build does not read, the peaks, is no number of it."""
    return "".join(
        f'[{name}]\ntitle = "{machine.gpu}"\nbackend = "{backend}"\nsm = "{machine.sm}"\n'
        f"memory_bytes = {machine.memory_bytes}\nshared_memory = {str(machine.shared_memory).lower()}\n"
        'bandwidth_gb_s = 1\nfp32_tflops = 1\nfp16_tflops = 1\nprecisions = ["fp32", "fp16"]\n'
        for backend, name in TARGETS.items()
    )


def buildable(machine: Machine, devices: Path) -> dict[str, str]:
    """Backend -> why its engines cannot be built here, or nothing."""
    from trimtab.errors import TrimtabError
    from trimtab.runtime.sessions.tensorrt import import_backend
    from trimtab.targets.device import find_device
    from trimtab.targets.engines import check_targets

    reasons = {}
    for backend, name in TARGETS.items():
        try:
            import_backend(backend)
            check_targets([find_device(name, devices)])
            reasons[backend] = ""
        except TrimtabError as error:
            reasons[backend] = str(error)
    return reasons


def compile_samples(folder: Path, devices: Path, backends: Sequence[str], end: float) -> dict[str, Path]:
    """The sample models for the CPU and for this GPU, their engines finished.

    Raises:
        RuntimeError: One cannot be compiled or built; with what trimtab said.
    """
    names = [TARGETS[backend] for backend in backends]
    targets = [word for name in ("cpu", *names) for word in ("--target", name)]
    common = ["--devices", str(devices), "--no-cache"]
    bundles = {}
    for number, (name, (model, *options)) in enumerate(VARIANTS.items()):
        bundles[name] = bundle = folder / f"{number}.bundle"
        words = [str(SAMPLES / model), "--steps", "20", *options, *targets, *common, "-o", str(bundle)]
        _trimtab(["compile", *words], end - time.monotonic())
        if "tensorrt" in backends:
            build = ["build", str(bundle), "--target", TARGETS["tensorrt"], *common]
            _trimtab(build, end - time.monotonic())
    return bundles


def _trimtab(words: Sequence[str], timeout: float) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "trimtab", *words], capture_output=True, text=True, timeout=max(timeout, 1)
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"trimtab {words[0]} took more than the {timeout:.0f} s that were left") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])


# ---- the checks: each in a process of its own ----


def picture(bundles: Mapping[str, Path], backend: str) -> dict[str, Any]:
    """A backend's pictures against the CPU's; of the first bundle the time of a step too, and the way of a number that
    is not finite.
    """
    import numpy as np

    from trimtab.runtime.load import load

    where = {"provider": "cuda", "target": "cpu"} if backend == "cuda" else {"target": TARGETS[backend]}
    off: dict[str, float] = {}
    limits: dict[str, float] = {}
    numbers: dict[str, Any] = {"off_cpu": off, "repeats": True}
    for name, bundle in bundles.items():
        with load(bundle, target="cpu") as pipe:
            expected = pipe(**asked(pipe)).pixels
        with load(bundle, **where) as pipe:
            pixels = pipe(**asked(pipe)).pixels
            off[name] = float(np.abs(pixels - expected).max())
            limits[name] = LIMITS[coarsest(pipe)]
            numbers["repeats"] &= bool(np.array_equal(pixels, pipe(**asked(pipe)).pixels))
            if len(off) == 1:
                numbers |= looked_into(pipe, backend)
    if why := too_far(off, limits):
        numbers["why"] = why
    elif not numbers["not_finite_is_seen"]:
        numbers["why"] = "latents that are not finite are decoded into a picture that is"
    return numbers


def too_far(off: Mapping[str, float], limits: Mapping[str, float]) -> str | None:
    """Which picture is further off than is allowed, if one is."""
    for name, limit in limits.items():
        if not off[name] <= limit:
            return f"the picture of {name} is {off[name]:.1e} off the CPU's, and {limit:.1e} is allowed"
    return None


def looked_into(pipe: Any, backend: str) -> dict[str, Any]:
    """The time of a step, with and without graphs, and the way of a number that is not finite."""
    import numpy as np

    numbers: dict[str, Any] = {"step_ms": step_ms(pipe)}
    engines = pipe.engines.backend
    if backend != "cuda":
        numbers["graphs"] = engines.graphs
        engines.use_graphs = False
        numbers["step_ms_without_graphs"] = step_ms(pipe)
    _, plan, _ = pipe.prepare(**asked(pipe))
    call = plan.epilogue.calls[-1]
    numbers["not_finite_is_seen"] = True
    for value in (np.nan, np.inf, -np.inf):
        for latents in call.inputs.values():
            latents[...] = np.full(latents.shape, value, latents.dtype)
        plan.epilogue.run(None)
        seen = not all(np.isfinite(np.asarray(image)).all() for image in call.outputs.values())
        numbers["not_finite_is_seen"] &= seen
    return numbers


def coarsest(pipe: Any) -> str:
    """What the engines of a pipeline compute in: "fp16" if any does."""
    found = {
        engine.precision
        for segment in pipe.bundle.contents.segments.values()
        for engine in segment.engines
        if engine.target == pipe.engines.target
    }
    return "fp16" if "fp16" in found else "fp32"


def asked(pipe: Any) -> dict[str, Any]:
    """What is drawn: by a text, or by a class."""
    kinds = {spec.source.get("kind") for task in pipe.bundle.contents.tasks.values() for spec in task.inputs}
    return {"seed": 0, **({"prompt": PROMPT} if "tokens" in kinds else {"label": CLASS})}


def step_ms(pipe: Any, pictures: int = 5) -> float:
    """The median time of a step, over some pictures after one that does not count."""
    times: list[float] = []
    request, plan, _ = pipe.prepare(**asked(pipe))
    for number in range(pictures + 1):
        marks: list[float] = []
        plan.run(request, lambda done, total, marks=marks: marks.append(time.perf_counter()))
        times += [b - a for a, b in itertools.pairwise(marks)] if number else []
    return 1000 * statistics.median(times)


def kernels(bundles: Mapping[str, Path]) -> dict[str, Any]:
    """The kernels of packed weights: their results and times against cuBLAS."""
    import vq_kernels

    lines = vq_kernels.measure(bundles.get("kernels"))["lines"]
    worst = max(line["error"] for line in lines)
    numbers: dict[str, Any] = {
        "error": worst,
        "goals_met": sum(line["met"] for line in lines),
        "lines": len(lines),
    }
    for rows in vq_kernels.ROWS:
        ratios = [line["ratio"] for line in lines if line["rows"] == rows]
        numbers[f"ratio_at_{rows}"] = statistics.geometric_mean(ratios)
    if not worst <= KERNEL_LIMIT:
        numbers["why"] = f"a product is {worst:.1e} off cuBLAS's, and {KERNEL_LIMIT:.1e} is allowed"
    return numbers


def cuda(bundles: Mapping[str, Path]) -> dict[str, Any]:
    """ONNX Runtime's CUDA provider."""
    return picture(bundles, "cuda")


def tensorrt_rtx(bundles: Mapping[str, Path]) -> dict[str, Any]:
    """TensorRT for RTX."""
    return picture(bundles, "tensorrt_rtx")


def tensorrt(bundles: Mapping[str, Path]) -> dict[str, Any]:
    """TensorRT."""
    return picture(bundles, "tensorrt")


KERNELS = "2-bit kernels"

CHECKS: Mapping[str, tuple[Check, tuple[str, ...], str]] = {
    "ONNX Runtime CUDA": (cuda, ("onnxruntime-gpu",), "in the place of onnxruntime, see docs/targets.md"),
    "TensorRT for RTX": (tensorrt_rtx, ("tensorrt-rtx",), "pip install 'trimtab[rtx]'"),
    "TensorRT": (
        tensorrt,
        ("tensorrt",),
        "pip install 'trimtab[tensorrt]'; on a Jetson it comes with JetPack",
    ),
    KERNELS: (kernels, ("torch", "triton"), "pip install 'trimtab[kernels]'"),
}
"""Name -> the check, the packages that it needs, and how to get them."""

PICTURES = {"ONNX Runtime CUDA": "cuda", "TensorRT for RTX": "tensorrt_rtx", "TensorRT": "tensorrt"}
"""The checks that draw -> their backend."""


def skipped(machine: Machine, compiled: bool = False) -> dict[str, str]:
    """Check -> why it cannot run on this machine; nothing of those that can.

    Args:
        machine: From `look`.
        compiled: There are kernels already, and no need of Triton.
    """
    reasons = {}
    for name, (_, packages, advice) in CHECKS.items():
        needed = ("torch",) if name == KERNELS and compiled else packages
        absent = [package for package in needed if package not in machine.versions]
        if machine.gpu is None:
            reasons[name] = machine.why_none
        elif absent:
            reasons[name] = f"{' and '.join(absent)} not installed: {advice}"
    return reasons


def isolated(check: Check, bundles: Mapping[str, Path], timeout: float) -> dict[str, Any]:
    """Runs a check in a process of its own; what becomes of it is always an answer."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(check, bundles, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(max(timeout, 0)):
            return {"why": f"not done in the {timeout:.0f} s that were left"}
        answer: dict[str, Any] = ours.recv()
        return answer
    except EOFError:
        process.join()
        return {"why": f"its process died (exit code {process.exitcode})"}
    finally:
        process.kill()
        process.join()


def _answer(check: Check, bundles: Mapping[str, Path], connection: Connection) -> None:
    try:
        connection.send(check(bundles))
    except Exception as error:  # whatever it is, it is the result
        line = (str(error).strip().splitlines() or [""])[0]
        connection.send({"why": f"{type(error).__name__}: {line}"})


def run_all(
    machine: Machine, bundles: Mapping[str, Path], folder: Path, kernels: Path | None = None
) -> list[Finding]:
    """All checks in turn.

    Args:
        machine: From `look`.
        bundles: Name -> a bundle that was compiled elsewhere for "cpu" and `TARGETS`; none to compile `VARIANTS` here.
        folder: Where to.
        kernels: From `vq_kernels.py --compile`; None to compile them here.
    """
    end = time.monotonic() + BUDGET_S
    reasons, broken = skipped(machine, kernels is not None), {}
    if not bundles and any(name not in reasons for name in PICTURES):
        devices = folder / "devices.toml"
        devices.write_text(device_rows(machine))
        whys = buildable(machine, devices)
        for name, backend in PICTURES.items():
            if whys.get(backend):
                reasons.setdefault(name, whys[backend])
        try:
            wanted = [
                backend for name, backend in PICTURES.items() if backend in TARGETS and name not in reasons
            ]
            bundles = compile_samples(folder, devices, wanted, end)
        except RuntimeError as error:
            broken = dict.fromkeys(PICTURES, f"the sample model: {error}")
    findings = []
    for name, (check, _, _) in CHECKS.items():
        if name in reasons:
            findings.append(Finding(name, "skipped", reasons[name]))
            continue
        start = time.monotonic()
        given = bundles if name in PICTURES else {"kernels": kernels} if kernels else {}
        numbers = {"why": broken[name]} if name in broken else isolated(check, given, end - start)
        why = numbers.pop("why", "")
        result = "failed" if why else "ok"
        findings.append(Finding(name, result, why, numbers, round(time.monotonic() - start, 1)))
    return findings


def show(machine: Machine, findings: Sequence[Finding]) -> None:
    """The table."""
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    if machine.gpu is None:
        print(f"no NVIDIA GPU; {versions}")
    else:
        jetson = f", Jetson Linux {machine.jetson}" if machine.jetson else ""
        print(
            f"{machine.gpu} (compute capability {machine.sm}, {machine.memory_bytes / 2**30:.1f} GiB){jetson}"
        )
        print(f"driver {machine.driver or 'unknown'}, CUDA {machine.cuda}; {versions}")
    print()
    base = next((f.numbers.get("step_ms") for f in findings if f.check == "ONNX Runtime CUDA"), None)
    for finding in findings:
        said = [f"{name} {_number(value)}" for name, value in finding.numbers.items()]
        if base and "step_ms" in finding.numbers and finding.check != "ONNX Runtime CUDA":
            said.append(f"step / ONNX Runtime's {finding.numbers['step_ms'] / base:.2f}")
        text = "; ".join(filter(None, (finding.why, ", ".join(said))))
        print(f"{finding.check:18} {finding.result:8} {text}")


def _number(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{_number(each)} ({name})" for name, each in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None, machine: Callable[[], Machine] = look) -> int:
    """Runs the checks; gives the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu_checks.json"), metavar="FILE")
    parser.add_argument(
        "--bundle", type=Path, nargs="+", default=[], help="sample models, compiled elsewhere and built here"
    )
    parser.add_argument("--kernels", type=Path, metavar="FILE", help="from vq_kernels.py --compile")
    given = parser.parse_args(arguments)
    here = machine()
    with tempfile.TemporaryDirectory() as folder:
        bundles = {bundle.stem: bundle for bundle in given.bundle}
        findings = run_all(here, bundles, Path(folder), given.kernels)
    show(here, findings)
    result = {"machine": asdict(here), "findings": [asdict(finding) for finding in findings]}
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {given.output}")
    return int(any(finding.result == "failed" for finding in findings))


if __name__ == "__main__":
    raise SystemExit(main())
