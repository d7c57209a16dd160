"""Everything that needs an NVIDIA GPU, in one command and within 10 minutes.

    python benchmarks/gpu_checks.py [-o gpu_checks.json] [--bundle BUNDLE]

Compiles the sample model for this GPU, and for every backend that is installed (ONNX Runtime's CUDA provider, TensorRT
for RTX, TensorRT) builds its engines, draws a picture and holds it against the CPU's, times a step with and without
CUDA graphs, and sees that a number which is not finite reaches the picture. Then the Triton kernels, by
`benchmarks/vq_kernels.py`. What cannot run here is skipped by name, with the reason; each check has a process of its
own, so that one which dies fails alone. Prints a table and writes JSON. The exit code is 1 where a check failed.

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

MODEL = Path(__file__).parents[1] / "samples" / "01_shapes" / "models" / "shapes-sd"
PROMPT = "a red circle"
BUDGET_S = 600.0
LIMIT = 2 / 255
"""How far a picture may be from the CPU's, at its worst pixel: two levels of an 8-bit picture. All is fp32."""
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


Check = Callable[[Path], dict[str, Any]]
"""Given the bundle it returns numbers; with "why" among them where it failed."""


def look() -> Machine:
    """This machine."""
    from trimtab.errors import TargetError
    from trimtab.runtime.sessions.check import JETSON
    from trimtab.runtime.sessions.cuda import Driver
    from trimtab.targets.preflight import l4t_version, read_text, run_text

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


def compile_sample(bundle: Path, devices: Path, backends: Sequence[str], timeout: float) -> None:
    """The sample model for the CPU and for this GPU, its engines finished.

    Raises:
        RuntimeError: It cannot be compiled or built; with what trimtab said.
    """
    names = [TARGETS[backend] for backend in backends]
    targets = [word for name in ("cpu", *names) for word in ("--target", name)]
    common = ["--devices", str(devices), "--no-cache"]
    _trimtab(["compile", str(MODEL), "--steps", "20", *targets, *common, "-o", str(bundle)], timeout)
    if "tensorrt" in backends:
        _trimtab(["build", str(bundle), "--target", TARGETS["tensorrt"], *common], timeout)


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


def picture(bundle: Path, backend: str) -> dict[str, Any]:
    """A backend's picture against the CPU's, the time of a step, and the way of a number that is not finite."""
    import numpy as np

    from trimtab.runtime.load import load

    with load(bundle, target="cpu") as pipe:
        expected = pipe(PROMPT, seed=0).pixels
    where = {"provider": "cuda", "target": "cpu"} if backend == "cuda" else {"target": TARGETS[backend]}
    with load(bundle, **where) as pipe:
        pixels = pipe(PROMPT, seed=0).pixels
        again = pipe(PROMPT, seed=0).pixels
        numbers: dict[str, Any] = {"off_cpu": float(np.abs(pixels - expected).max())}
        numbers["repeats"] = bool(np.array_equal(pixels, again))
        numbers["step_ms"] = step_ms(pipe)
        engines = pipe.engines.backend
        if backend != "cuda":
            numbers["graphs"] = engines.graphs
            engines.use_graphs = False
            numbers["step_ms_without_graphs"] = step_ms(pipe)
        _, plan, _ = pipe.prepare(PROMPT, seed=0)
        call = plan.epilogue.calls[-1]
        numbers["not_finite_is_seen"] = True
        for value in (np.nan, np.inf, -np.inf):
            for latents in call.inputs.values():
                latents[...] = np.full(latents.shape, value, latents.dtype)
            plan.epilogue.run(None)
            seen = not all(np.isfinite(np.asarray(image)).all() for image in call.outputs.values())
            numbers["not_finite_is_seen"] &= seen
    if numbers["off_cpu"] > LIMIT:
        numbers["why"] = f"the picture is {numbers['off_cpu']:.1e} off the CPU's, and {LIMIT:.1e} is allowed"
    elif not numbers["not_finite_is_seen"]:
        numbers["why"] = "latents that are not finite are decoded into a picture that is"
    return numbers


def step_ms(pipe: Any, pictures: int = 5) -> float:
    """The median time of a step, over some pictures after one that does not count."""
    times: list[float] = []
    request, plan, _ = pipe.prepare(PROMPT, seed=0)
    for number in range(pictures + 1):
        marks: list[float] = []
        plan.run(request, lambda done, total, marks=marks: marks.append(time.perf_counter()))
        times += [b - a for a, b in itertools.pairwise(marks)] if number else []
    return 1000 * statistics.median(times)


def kernels(bundle: Path) -> dict[str, Any]:
    """The kernels of packed weights: their results and times against cuBLAS."""
    import vq_kernels

    lines = vq_kernels.measure()["lines"]
    worst = max(line["error"] for line in lines)
    numbers: dict[str, Any] = {
        "error": worst,
        "goals_met": sum(line["met"] for line in lines),
        "lines": len(lines),
        "ratio": statistics.median(line["ratio"] for line in lines),
    }
    if not worst <= KERNEL_LIMIT:
        numbers["why"] = f"a product is {worst:.1e} off cuBLAS's, and {KERNEL_LIMIT:.1e} is allowed"
    return numbers


def cuda(bundle: Path) -> dict[str, Any]:
    """ONNX Runtime's CUDA provider."""
    return picture(bundle, "cuda")


def tensorrt_rtx(bundle: Path) -> dict[str, Any]:
    """TensorRT for RTX."""
    return picture(bundle, "tensorrt_rtx")


def tensorrt(bundle: Path) -> dict[str, Any]:
    """TensorRT."""
    return picture(bundle, "tensorrt")


CHECKS: Mapping[str, tuple[Check, tuple[str, ...], str]] = {
    "ONNX Runtime CUDA": (cuda, ("onnxruntime-gpu",), "pip install 'trimtab[gpu]'"),
    "TensorRT for RTX": (tensorrt_rtx, ("tensorrt-rtx",), "pip install 'trimtab[rtx]'"),
    "TensorRT": (
        tensorrt,
        ("tensorrt",),
        "pip install 'trimtab[tensorrt]'; on a Jetson it comes with JetPack",
    ),
    "Triton kernels": (kernels, ("torch", "triton"), "pip install 'trimtab[kernels]'"),
}
"""Name -> the check, the packages that it needs, and how to get them."""

PICTURES = {"ONNX Runtime CUDA": "cuda", "TensorRT for RTX": "tensorrt_rtx", "TensorRT": "tensorrt"}
"""The checks that draw -> their backend."""


def skipped(machine: Machine) -> dict[str, str]:
    """Check -> why it cannot run on this machine; nothing of those that can."""
    reasons = {}
    for name, (_, packages, advice) in CHECKS.items():
        absent = [package for package in packages if package not in machine.versions]
        if machine.gpu is None:
            reasons[name] = machine.why_none
        elif absent:
            reasons[name] = f"{' and '.join(absent)} not installed: {advice}"
    return reasons


def isolated(check: Check, bundle: Path, timeout: float) -> dict[str, Any]:
    """Runs a check in a process of its own; what becomes of it is always an answer."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(check, bundle, theirs), daemon=True)
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


def _answer(check: Check, bundle: Path, connection: Connection) -> None:
    try:
        connection.send(check(bundle))
    except Exception as error:  # whatever it is, it is the result
        line = (str(error).strip().splitlines() or [""])[0]
        connection.send({"why": f"{type(error).__name__}: {line}"})


def run_all(machine: Machine, bundle: Path | None, folder: Path) -> list[Finding]:
    """All checks in turn.

    Args:
        machine: From `look`.
        bundle: The sample model compiled elsewhere for "cpu", `TARGETS`; None to compile it here.
        folder: Where to.
    """
    end = time.monotonic() + BUDGET_S
    reasons, broken = skipped(machine), {}
    if bundle is None and any(name not in reasons for name in PICTURES):
        bundle, devices = folder / "sample.bundle", folder / "devices.toml"
        devices.write_text(device_rows(machine))
        whys = buildable(machine, devices)
        for name, backend in PICTURES.items():
            if whys.get(backend):
                reasons.setdefault(name, whys[backend])
        try:
            wanted = [
                backend for name, backend in PICTURES.items() if backend in TARGETS and name not in reasons
            ]
            compile_sample(bundle, devices, wanted, end - time.monotonic())
        except RuntimeError as error:
            broken = dict.fromkeys(PICTURES, f"the sample model: {error}")
    findings = []
    for name, (check, _, _) in CHECKS.items():
        if name in reasons:
            findings.append(Finding(name, "skipped", reasons[name]))
            continue
        start = time.monotonic()
        numbers = {"why": broken[name]} if name in broken else isolated(check, bundle or folder, end - start)
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
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None, machine: Callable[[], Machine] = look) -> int:
    """Runs the checks; gives the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu_checks.json"), metavar="FILE")
    parser.add_argument("--bundle", type=Path, help="the sample model, compiled elsewhere and built here")
    given = parser.parse_args(arguments)
    here = machine()
    with tempfile.TemporaryDirectory() as folder:
        findings = run_all(here, given.bundle, Path(folder))
    show(here, findings)
    result = {"machine": asdict(here), "findings": [asdict(finding) for finding in findings]}
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {given.output}")
    return int(any(finding.result == "failed" for finding in findings))


if __name__ == "__main__":
    raise SystemExit(main())
