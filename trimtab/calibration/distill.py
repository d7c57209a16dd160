"""Distillation: a denoiser with layers removed learns to answer as the whole one does.

    L = |e_T - e_S|^2 / elements + sum over blocks of |f_T - f_S|^2 / |f_T|^2 [+ |y - e_S|^2 / elements]

e is the prediction and f a block's output of teacher T and student S. Dividing by the teacher's norm keeps the few
blocks with large features from drowning the rest (LAPTOP-Diff, https://arxiv.org/abs/2404.11098, section 3.3).
No data are needed: x_t lies on the teacher's own trajectories. With captioned pictures x_t are those, noised, and the
last term, with what noise itself says of the answer y, is added.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from trimtab.calibration.batches import Batches
from trimtab.calibration.gates import OUTPUT
from trimtab.calibration.torch_graph import TorchGraph
from trimtab.calibration.trajectories import Array
from trimtab.errors import CalibrationError, InputError
from trimtab.passes.candidates import Candidates
from trimtab.passes.experts import EXPERTS, ROUTING, AddExperts, Experts
from trimtab.passes.removal import RemovalPlan, RemoveLayers
from trimtab.passes.scopes import module_tree
from trimtab.passes.student import assembled, digest
from trimtab.staging import write_file

FEATURES = ("normalized", "plain", "none")

Progress = Callable[[float, float], None]
"""Told (the share of the budget that is spent, the loss)."""

_SAVE_SECONDS = 60.0
_AVERAGE = 0.999
"""Decay of the averaged weights a step, once the run is long enough: see `_Student.step`."""

_BETAS = (0.9, 0.99)

_SHARE_OF_EXPERTS = 0.25
"""Of the learning rate. An expert's step adds to the common kernel's, and AdamW takes it for larger than it is: the
second moment is an average over steps of all ranges, most of which do not reach the expert."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """How a student is trained.

    Attributes:
        steps: Of the optimizer; None for no limit.
        minutes: Of wall time; None for no limit. The first of the two ends the run.
        batch: Evaluations a step, all of one time step.
        rate: AdamW's learning rate at its highest: it rises over the first fiftieth, then falls as a cosine.
        features: "normalized", "plain" (mean squared differences), or "none" for the output term alone.
        seed: Of the batches.
    """

    steps: int | None = None
    minutes: float | None = None
    batch: int = 16
    rate: float = 3e-4
    features: str = "normalized"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise InputError(f"there are no features {self.features!r}: choose {', '.join(FEATURES)}")
        if self.steps is None and self.minutes is None:
            raise InputError("training needs a budget: give steps or minutes")
        for name in ("steps", "minutes", "batch", "rate"):
            number = getattr(self, name)
            if number is not None and not 0 < number < math.inf:
                raise InputError(f"{name} {number}: a finite number above 0 is needed")

    def spent(self, steps: int, seconds: float) -> float:
        """The share that is gone, from 0 to 1."""
        by_steps = steps / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_time))


@dataclasses.dataclass(frozen=True)
class Student:
    """What came of it.

    Attributes:
        weights: Initializer -> float32 array, averaged over the last steps.
        teacher: `trimtab.passes.student.digest` of these initializers before.
        steps: Of the optimizer.
        seconds: Spent, with those before a resume.
        losses: The loss of the first step and of the last.
    """

    weights: Mapping[str, Array]
    teacher: str
    steps: int
    seconds: float
    losses: tuple[float, float]


def distill(
    model: ir.Model,
    plan: RemovalPlan,
    batches: Batches,
    budget: Budget,
    *,
    starts: Mapping[str, str] | None = None,
    experts: Experts | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Student:
    """Trains the student on what the teacher says.

    On a GPU where torch has one, with bfloat16 products; else on the CPU in float32.

    Args:
        model: The teacher: the denoiser with its sampler fused; not changed.
        plan: What the student lacks.
        batches: What to train on.
        budget: How long, and what for.
        starts: See `trimtab.passes.student.assembled`; every other module starts from its own weights.
        experts: Of the student's convolutions; None leaves them plain.
        checkpoint: A file that the state is kept in; if it is there already, training goes on from it. The same
            steps then follow as without the interruption.
        progress: Told how far it is.

    Raises:
        CalibrationError: The loss is not finite; the checkpoint is damaged or of another run.
        PassError: The plan is of another model; an operator of the graph is not known to torch here; a module cannot
            start from another; experts are to be of a convolution that there is not.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    smaller = model.clone()
    RemoveLayers(plan.removed)(smaller)
    pairs = _compared(model, plan, smaller, budget.features)
    teacher = TorchGraph(model, [mine for mine, _ in pairs], device)
    begun = smaller.clone()
    for name, array in assembled(model, smaller.graph.initializers, starts or {}).items():
        begun.graph.initializers[name].const_value = ir.tensor(array, name=name)
    if experts is not None:
        for graph in (smaller, begun):
            AddExperts(experts)(graph)
    student = TorchGraph(begun, list(dict.fromkeys(its for _, its in pairs)), device)
    run = _Student(student.weights, budget)
    # The budget may grow from one run to the next: all else must be the same.
    kind = dataclasses.asdict(dataclasses.replace(budget, steps=1, minutes=None))
    header = {
        "removed": list(plan.removed),
        "teacher": digest(smaller, student.weights),
        "kind": kind,
        "starts": dict(starts or {}),
        "experts": experts and dataclasses.asdict(experts),
        "data": batches.identity,
    }
    if checkpoint is not None and checkpoint.exists():
        run.load(checkpoint, header)
    saved = time.monotonic()
    while (spent := budget.spent(run.steps, run.seconds)) < 1:
        start = time.monotonic()
        batch = batches.of(budget.seed, run.steps, budget.batch)
        inputs = {name: torch.from_numpy(array).to(device) for name, array in batch.inputs.items()}
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            with torch.no_grad():
                wanted = teacher(inputs)
            given = student(inputs, run.weights)
            loss = _loss([(wanted[mine], given[its]) for mine, its in pairs], budget.features == "normalized")
            if batch.target is not None:
                answer = torch.from_numpy(batch.target).to(device)
                loss = loss + (answer - given[OUTPUT].float()).square().mean()
        if not math.isfinite(value := loss.item()):
            raise CalibrationError(
                f"the loss is not finite at step {run.steps}: give a lower learning rate than {budget.rate:g}"
            )
        # Of the step that is being taken, so that the last one has the lowest rate and the first one some.
        run.step(loss, value, (1 + math.cos(math.pi * spent)) / 2 * min(1.0, 50 * spent + 0.02))
        run.seconds += time.monotonic() - start
        if progress is not None:
            progress(budget.spent(run.steps, run.seconds), value)
        if checkpoint is not None and time.monotonic() - saved > _SAVE_SECONDS:
            run.save(checkpoint, header)
            saved = time.monotonic()
    if checkpoint is not None:
        run.save(checkpoint, header)
    weights = {name: tensor.cpu().numpy() for name, tensor in run.averages.items()}
    return Student(weights, str(header["teacher"]), run.steps, run.seconds, run.losses)


def _compared(model: ir.Model, plan: RemovalPlan, smaller: ir.Model, features: str) -> list[tuple[str, str]]:
    """Names of the teacher's values and of the student's in their place; the first are the predictions."""
    bypass = {str(old.name): str(new.name) for old, new in Candidates(model).bypass(plan.removed).items()}
    left = {str(v.name) for node in smaller.graph for v in node.outputs}
    blocks = [] if features == "none" else block_outputs(model)
    pairs = [(name, bypass.get(name, name)) for name in blocks]
    return [(OUTPUT, OUTPUT), *((mine, its) for mine, its in pairs if its in left)]


def block_outputs(model: ir.Model) -> list[str]:
    """Names of what the denoiser's outermost blocks give: U-Net levels, transformer blocks.

    In a graph without module names: what every residual branch leads to.
    """
    names = []
    for path, module in module_tree(model.graph).items():
        listed = path.count(".") == 1 and path.rpartition(".")[2].isdigit()
        outputs = [v for v in module.outputs if v.shape is not None and v.shape.rank() >= 3]
        if (listed or path == "mid_block") and outputs:
            names.append(str(outputs[-1].name))
    if not names:
        candidates = Candidates(model)
        branches = [name for name, c in candidates.items() if c.kind == "branch"]
        names = [str(value.name) for name in branches for value in candidates.own_bypass(name)]
    return names


def _loss(pairs: Sequence[tuple[Tensor, Tensor]], normalized: bool) -> Tensor:
    (prediction, answer), *features = [(wanted.float(), given.float()) for wanted, given in pairs]
    loss = (prediction - answer).square().mean()
    for wanted, given in features:
        error = (wanted - given).square()
        power = wanted.square().sum() if normalized else 0
        loss = loss + (error.sum() / power if power else error.mean())  # of zeros, the error itself
    return loss


class _Student:
    """Weights, AdamW's moments, and averaged weights: all that a checkpoint holds."""

    def __init__(self, start: Mapping[str, Tensor], budget: Budget) -> None:
        self.weights = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
        self.averages = {name: tensor.clone() for name, tensor in start.items()}
        self.steps, self.seconds = 0, 0.0
        self.losses = (math.nan, math.nan)
        self._rate = budget.rate
        of_experts = [name for name in start if name.endswith((EXPERTS, ROUTING))]
        groups = [
            {"params": [self.weights[name] for name in start if name not in of_experts], "share": 1.0},
            {"params": [self.weights[name] for name in of_experts], "share": _SHARE_OF_EXPERTS},
        ]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            budget.rate,
            _BETAS,
            weight_decay=0.0,
            foreach=True,
        )

    def step(self, loss: Tensor, value: float, factor: float) -> None:
        """One step at a share of the highest learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * factor * group["share"]
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0, error_if_nonfinite=False)
        self._optimizer.step()
        self.steps += 1
        self.losses = (value if self.steps == 1 else self.losses[0], value)
        # Short runs average over their last tenth, long ones over the last thousand steps.
        decay = min(_AVERAGE, self.steps / (self.steps + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averages.values()), list(self.weights.values()), 1 - decay)

    def save(self, path: Path, header: Mapping[str, Any]) -> None:
        """Writes the checkpoint, whole or not at all."""
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            state = self._optimizer.state[weight]
            tensors |= {f"weight.{name}": weight.detach(), f"average.{name}": self.averages[name]}
            if state:
                tensors |= {f"first.{name}": state["exp_avg"], f"second.{name}": state["exp_avg_sq"]}
        entry = {"header": header, "steps": self.steps, "seconds": self.seconds, "losses": self.losses}
        data = save({k: t.contiguous() for k, t in tensors.items()}, {"trimtab": json.dumps(entry)})
        write_file(path, data)

    def load(self, path: Path, header: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint.

        Raises:
            CalibrationError: It is damaged, or of another run.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                entry = json.loads((file.metadata() or {})["trimtab"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            if entry["header"] != json.loads(json.dumps(header)):
                raise CalibrationError(
                    f"{path} is the checkpoint of another plan, model, data or kind of training: remove it"
                )
            for name, weight in self.weights.items():
                with torch.no_grad():
                    weight.copy_(tensors[f"weight.{name}"])
                    self.averages[name].copy_(tensors[f"average.{name}"])
                if f"first.{name}" in tensors:
                    self._optimizer.state[weight] = {
                        "step": torch.tensor(float(entry["steps"])),
                        "exp_avg": tensors[f"first.{name}"].to(weight.device),
                        "exp_avg_sq": tensors[f"second.{name}"].to(weight.device),
                    }
            self.steps, self.seconds = int(entry["steps"]), float(entry["seconds"])
            self.losses = (float(entry["losses"][0]), float(entry["losses"][1]))
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CalibrationError(f"{path} is no whole checkpoint ({error}): remove it") from error
