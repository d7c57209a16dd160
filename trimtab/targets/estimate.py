"""Memory and time of a bundle on a device, before anything is built: does it fit, and if not, what is in the way.

docs/plan.md says what the models leave out, and how far they are from what was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from trimtab.manifest import Contents
from trimtab.passes.precision import convert
from trimtab.passes.propagation import Extents, propagate
from trimtab.passes.scopes import scopes
from trimtab.passes.split_attention import SplitAttention
from trimtab.program import Program, Schedule, Task, check_size
from trimtab.runtime.arguments import for_size
from trimtab.targets.bindings import Shapes, segment_shapes
from trimtab.targets.cost import Cost, node_costs
from trimtab.targets.device import Device
from trimtab.targets.liveness import Kernel, Peak, Rules, kernels, peak
from trimtab.targets.machine import MEMINFO, meminfo_bytes, read_text
from trimtab.weights import repeated

MIB = 2**20

COMPUTE_EFFICIENCY = 0.6
BANDWIDTH_EFFICIENCY = 0.8
"""Of the device's peaks. Matrix products of a diffusion model's sizes reach half to three quarters of the tensor
cores' peak, and streaming kernels 80 to 90% of the bandwidth. Assumed, and not measured: see docs/plan.md."""

LAUNCH_S = 2.5e-6
"""The least that a kernel takes, however small. Assumed as well."""


@dataclass(frozen=True)
class MemoryModel:
    """What a backend takes beside weights and tensors.

    Attributes:
        rules: What it does to tensors.
        base: What people call what is taken once.
        base_bytes: Once: the process and its libraries, or the driver's context.
        node_bytes: For each node of a loaded graph: its object, its kernel, its place in the plan.
        workspace_bytes: For each engine with a product of matrices: what its kernels share.
        segment_bytes: For each loaded engine: the code of its kernels.
        own_scratch: Every engine keeps memory for its own tensors; else all take turns in one.
    """

    rules: Rules
    base: str
    base_bytes: int = 0
    node_bytes: int = 0
    workspace_bytes: int = 0
    segment_bytes: int = 0
    own_scratch: bool = False


ONNXRUNTIME = MemoryModel(
    Rules(scores=2),  # before and after the softmax
    base="Python and ONNX Runtime",
    base_bytes=66
    * MIB,  # Python, NumPy and ONNX Runtime: 55 MiB imported, and 11 of code touched at the first run
    node_bytes=36_000,  # measured on the sample models, of 542 and 1317 nodes
    own_scratch=True,  # an arena for each session, that never gives back
)

TENSORRT = MemoryModel(
    Rules(fuses=True, joins=True, scores=2, fused_heads=range(12, 257)),  # measured: docs/plan.md
    base="the CUDA context",
    base_bytes=500 * MIB,  # the CUDA context and the library's own modules; assumed, and not measured
    workspace_bytes=8
    * MIB,  # what every engine of the sample models with a product reports beyond its tensors
    segment_bytes=5 * MIB,  # kernels of the sample models' engines: 1.4 to 17 MB
)

SYSTEM_BYTES = {True: 1536 * MIB, False: 512 * MIB}
"""What is taken before trimtab comes, by whether the CPU lives in the same memory. A Jetson Orin Nano of 8 GiB tells
7.4 of, and its system without a desktop takes about 1; a desktop's screen takes a few hundred MiB of its GPU."""


@dataclass(frozen=True)
class SegmentPlan:
    """One segment on the device.

    Attributes:
        name: Of the segment.
        stage: "prologue", "step" or "epilogue".
        weight_bytes: In the precision.
        activation_bytes: Peak of its tensors, and of the kernels' workspace.
        buffer_bytes: Its inputs and outputs.
        fixed_bytes: What the backend takes for the loaded engine beside those.
        ms: Of one call; None where the device's peaks are unknown.
        weights: Module -> bytes, of the outermost modules.
        held: Module -> bytes of tensors at the peak.
    """

    name: str
    stage: str
    weight_bytes: int
    activation_bytes: int
    buffer_bytes: int
    fixed_bytes: int
    ms: float | None
    weights: Mapping[str, int] = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)

    @property
    def own_bytes(self) -> int:
        """What is held as long as it is loaded, without tensors."""
        return self.weight_bytes + self.buffer_bytes + self.fixed_bytes


@dataclass(frozen=True)
class Plan:
    """A whole picture on the device.

    Attributes:
        device: Its name.
        precision: Of the engines.
        size: (width, height) in pixels.
        segments: In the order in which they run.
        base: What is held beside the segments: the CUDA context, or a process with its libraries.
        base_bytes: Of it.
        peak_bytes: All that is held at once.
        low_memory_bytes: The same with ``--low-memory``: the engines of one stage at a time.
        room_bytes: What the device has for it; None where that is unknown.
        step_ms: Of one step, on average.
        picture_ms: Of one picture with the first schedule.
    """

    device: str
    precision: str
    size: tuple[int, int]
    segments: tuple[SegmentPlan, ...]
    base: str
    base_bytes: int
    peak_bytes: int
    low_memory_bytes: int
    room_bytes: int | None
    step_ms: float | None
    picture_ms: float | None

    def fits(self, low_memory: bool = False) -> bool:
        """Whether the device has room."""
        needed = self.low_memory_bytes if low_memory else self.peak_bytes
        return self.room_bytes is None or needed <= self.room_bytes

    def largest(self, count: int = 3) -> list[tuple[str, int]]:
        """What takes most memory, by the model's own names: the largest, and others of a hundredth of it or more."""
        found = [
            (f"{kind} of {segment.name} {module}".rstrip(), size)
            for segment in self.segments
            for kind, parts in (("weights", segment.weights), ("tensors", segment.held))
            for module, size in parts.items()
        ]
        found.sort(key=lambda entry: entry[1], reverse=True)
        found[1:] = [entry for entry in found[1:] if entry[1] >= self.peak_bytes / 100]
        found.append((self.base, self.base_bytes))
        return sorted(found, key=lambda entry: entry[1], reverse=True)[:count]


def memory_model(device: Device) -> MemoryModel:
    """That of the device's backend."""
    return ONNXRUNTIME if device.backend == "onnxruntime" else TENSORRT


def room(device: Device) -> int | None:
    """Bytes that a device has for a bundle; for a target without a memory of its own, this machine's."""
    if device.memory_bytes is not None:
        return max(0, device.memory_bytes - SYSTEM_BYTES[device.shared_memory])
    return meminfo_bytes(read_text(MEMINFO), "MemTotal")


def plan(
    program: Program,
    contents: Contents,
    device: Device,
    *,
    precision: str,
    size: tuple[int, int] | None = None,
) -> Plan:
    """What a picture takes on a device.

    Args:
        program: Graphs in fp32; their weights are not read.
        contents: What the bundle says of the same program.
        device: The target.
        precision: "fp32", "fp16" or "bf16". For fp16, nothing is taken to overflow.
        size: (width, height) in pixels; None for the native one.

    Raises:
        InputError: The model cannot draw this size.
        PassError: Sizes that do not follow from the inputs'.
    """
    size = size or contents.size
    check_size(size, contents.size, contents.size_multiple, contents.fixed_size, contents.largest_side)
    shapes = segment_shapes(contents, size)
    model = memory_model(device)
    task = next(iter(contents.tasks.values()))
    _, schedule = for_size(task, next(iter(task.schedules)), size)
    segments = [
        _segment(name, stage, program, shapes[name], device, precision, model)
        for name, stage in _stages(task, schedule, contents).items()
    ]
    step, picture = _times(task, schedule, contents, {segment.name: segment.ms for segment in segments})
    return Plan(
        device=device.name,
        precision=precision,
        size=size,
        segments=tuple(segments),
        base=model.base,
        base_bytes=model.base_bytes,
        peak_bytes=model.base_bytes + _held(segments, model),
        low_memory_bytes=model.base_bytes + _low_memory(segments, model),
        room_bytes=room(device),
        step_ms=step,
        picture_ms=picture,
    )


def _held(segments: Iterable[SegmentPlan], model: MemoryModel) -> int:
    segments = list(segments)
    tensors = [segment.activation_bytes for segment in segments]
    together = sum(tensors) if model.own_scratch else max(tensors, default=0)
    return sum(segment.own_bytes for segment in segments) + together


def _low_memory(segments: Iterable[SegmentPlan], model: MemoryModel) -> int:
    """The fullest stage. All engines of the steps are one stage; any other is its own. Buffers stay."""
    segments = list(segments)
    buffers = sum(segment.buffer_bytes for segment in segments)
    stages: dict[str, list[SegmentPlan]] = {}
    for segment in segments:
        stage = "step" if segment.stage == "step" else segment.name
        stages.setdefault(stage, []).append(replace(segment, buffer_bytes=0))
    return buffers + max((_held(stage, model) for stage in stages.values()), default=0)


def _stages(task: Task, schedule: Schedule, contents: Contents) -> dict[str, str]:
    """Segment -> when it runs, for a schedule of a task."""
    found: dict[str, str] = {}
    for call in (*task.prologue, *schedule.prologue):
        found.setdefault(call.segment, "prologue")
    for step in schedule.steps:
        found.update((call.segment, "step") for call in step.calls)
    for call in contents.epilogue:
        found.setdefault(call.segment, "epilogue")
    return found


def _times(
    task: Task, schedule: Schedule, contents: Contents, ms: Mapping[str, float | None]
) -> tuple[float | None, float | None]:
    known = {name: value for name, value in ms.items() if value is not None}
    if len(known) < len(ms):
        return None, None
    steps = sum(known[call.segment] for step in schedule.steps for call in step.calls)
    around = sum(known[call.segment] for call in (*task.prologue, *schedule.prologue, *contents.epilogue))
    return steps / max(1, len(schedule.steps)), around + steps


def _segment(
    name: str,
    stage: str,
    program: Program,
    shapes: tuple[Shapes, ...],
    device: Device,
    precision: str,
    model: MemoryModel,
) -> SegmentPlan:
    # On a CPU, ONNX Runtime casts weights back as it loads, and computes in float32.
    precision = precision if device.sm else "fp32"
    own = program.segments[name].model
    graph = convert(own, precision, {}).model
    if device.backend == "onnxruntime":
        SplitAttention(shapes[0])(graph)  # as lowering does
    again = repeated(own)  # lowering makes them one, in engines of every kind
    most: tuple[Peak, Extents] | None = None
    for binding in shapes:
        extents = propagate(graph, binding)
        found = peak(graph, extents, model.rules)
        if most is None or found.bytes > most[0].bytes:
            most = (found, extents)
    assert most is not None
    top, extents = most
    costs = node_costs(graph, shapes[0])
    workspace = model.workspace_bytes if any(cost.macs for cost in costs.values()) else 0
    outside = (*graph.graph.inputs, *graph.graph.outputs)
    return SegmentPlan(
        name=name,
        stage=stage,
        weight_bytes=sum(_nbytes(graph, name) for name in graph.graph.initializers if name not in again),
        activation_bytes=top.bytes + workspace,
        buffer_bytes=sum(extents[value].bytes for value in outside),
        fixed_bytes=model.segment_bytes + model.node_bytes * len(graph.graph),
        ms=_ms(kernel_seconds(graph, costs, extents, device, precision, model.rules)),
        weights=_by_part(graph, extents, again),
        held=_by_module(top.held),
    )


def _ms(timed: Iterable[tuple[Kernel, float]] | None) -> float | None:
    return None if timed is None else 1000 * sum(seconds for _, seconds in timed)


def kernel_seconds(
    model: ir.Model,
    costs: Mapping[ir.Node, Cost],
    extents: Extents,
    device: Device,
    precision: str,
    rules: Rules,
) -> list[tuple[Kernel, float]] | None:
    """Every kernel of one run with its seconds: the longer of its arithmetic and its traffic.

    Args:
        model: The graph.
        costs: Of its nodes.
        extents: Of its tensors.
        device: Its peaks; None comes back where it has none.
        precision: Which of them.
        rules: What runs in one kernel.
    """
    tflops = device.fp32_tflops if precision == "fp32" else device.fp16_tflops
    if tflops is None or device.bandwidth_gb_s is None:
        return None
    timed = []
    for kernel in kernels(model, extents, rules):
        flops = 2 * sum(costs[node].macs for node in kernel.nodes)
        moved = sum(costs[node].weight_bytes for node in kernel.nodes) + kernel.bytes
        seconds = max(
            LAUNCH_S,
            flops / (COMPUTE_EFFICIENCY * tflops * 1e12),
            moved / (BANDWIDTH_EFFICIENCY * device.bandwidth_gb_s * 1e9),
        )
        timed.append((kernel, seconds))
    return timed


def _nbytes(model: ir.Model, name: str) -> int:
    value = model.graph.initializers.get(name)
    return value.const_value.nbytes if value is not None and value.const_value is not None else 0


def _by_part(model: ir.Model, extents: Extents, again: frozenset[str]) -> dict[str, int]:
    """Outermost module -> bytes of the weights that its nodes read; each weight once."""
    parts: dict[str, int] = {}
    for name, value in model.graph.initializers.items():
        if name in again:
            continue
        node = next(iter(value.consumers()), None)
        if node is not None:
            part = next((path.partition(".")[0] for path in scopes(node) if path), "")
            parts[part] = parts.get(part, 0) + extents[value].bytes
    return parts


def _by_module(held: Mapping[ir.Node, int]) -> dict[str, int]:
    modules: dict[str, int] = {}
    for node, size in held.items():
        module = next(reversed(scopes(node)), "") or node.op_type
        modules[module] = modules.get(module, 0) + size
    return modules
