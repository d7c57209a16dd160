"""What a share is of: parameters, bytes, or the time of a step that is predicted for a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from trimtab.errors import InputError
from trimtab.passes.candidates import Candidates
from trimtab.passes.precision import convert
from trimtab.passes.propagation import propagate
from trimtab.targets.cost import node_costs
from trimtab.targets.device import Device
from trimtab.targets.estimate import kernel_seconds, memory_model


@dataclass(frozen=True)
class Measure:
    """A whole number for every set of candidates.

    Attributes:
        name: One of `trimtab.recipe.MEASURES`.
        unit: What is counted, for messages.
        total: Of the whole model.
        freed: Names of candidates -> what all of them free together: at least the sum over them, as what only they
            share goes with the last.
        details: Where the numbers come from.
    """

    name: str
    unit: str
    total: int
    freed: Callable[[Iterable[str]], int]
    details: Mapping[str, str] = field(default_factory=dict)


def parameters(candidates: Candidates) -> Measure:
    """Elements of weights, exactly."""
    return Measure(
        "parameters", "parameters", candidates.parameters, lambda names: candidates.freed(names)[0]
    )


def weight_bytes(candidates: Candidates) -> Measure:
    """Bytes of the initializers as the graph holds them, exactly: weights of several types count by their width."""
    return Measure("bytes", "bytes", candidates.bytes, lambda names: candidates.freed(names)[1])


def step_time(
    candidates: Candidates,
    model: ir.Model,
    shapes: Mapping[str, Sequence[int]],
    device: Device,
    precision: str,
) -> Measure:
    """Nanoseconds of one evaluation, as `trimtab.targets.estimate` predicts them.

    A kernel is freed once nothing that it makes is needed. What is left is not fused anew, so that what is freed is
    at most what the estimate of the smaller graph says (docs/removal.md has how far the two are apart).

    Args:
        candidates: Of the model.
        model: The denoiser in float32; not changed.
        shapes: Graph input -> sizes.
        device: Its peaks must be known.
        precision: "fp32", "fp16" or "bf16".

    Raises:
        InputError: The device has no known peaks.
    """
    precision = precision if device.sm else "fp32"
    graph = convert(model, precision, {}).model
    rules = memory_model(device).rules
    extents = propagate(graph, shapes)
    timed = kernel_seconds(graph, node_costs(graph, shapes), extents, device, precision, rules)
    if timed is None:
        raise InputError(
            f"no time can be predicted for {device.name}, whose peaks are not known: give the target that the "
            "share of time is of, or the peaks in a file of devices (docs/devices.md)"
        )
    known = {str(v.name) for node in model.graph for v in node.outputs}
    parts: list[tuple[set[str], int]] = []
    for kernel, seconds in timed:
        made = {str(value.name) for node in kernel.nodes for value in node.outputs}
        parts.append((made & known, round(1e9 * seconds)))  # casts are the precision's, and stay

    def freed(names: Iterable[str]) -> int:
        lost = candidates.lost(names)
        return sum(time for made, time in parts if made and made <= lost)

    return Measure(
        "time",
        f"ns of a step on {device.name} in {precision}",
        sum(time for _, time in parts),
        freed,
        {"device": device.name, "precision": precision},
    )
