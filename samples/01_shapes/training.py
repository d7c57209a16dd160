"""What all trainings here share: a wall-clock budget, averaged weights, checkpoints.

Every training is given minutes, not steps: it ends on time on a slow or busy machine, and the learning rate
follows the share of the time that is gone, so the weights are always annealed when it ends.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

WARMUP = 0.02  # of the budget
FLOOR = 0.01  # of the peak learning rate


class Budget:
    """Minutes to spend; time spent before a checkpoint counts."""

    def __init__(self, minutes: float, spent: float = 0.0) -> None:
        self._seconds = 60.0 * minutes
        self._start = time.monotonic() - spent

    @property
    def spent(self) -> float:
        """Seconds."""
        return time.monotonic() - self._start

    @property
    def fraction(self) -> float:
        """Share of the budget that is gone, 0 to 1."""
        return min(self.spent / self._seconds, 1.0)

    def rate(self, peak: float) -> float:
        """The learning rate now: linear warm-up, then a cosine down to FLOOR."""
        warm = min(self.fraction / WARMUP, 1.0)
        return peak * warm * (FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * self.fraction)))


class Ema:
    """An exponential moving average of a module's parameters.

    The decay grows as (1 + step) / (10 + step) up to its limit, so that the average forgets the random start.
    """

    def __init__(self, module: nn.Module, decay: float = 0.998) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self._decay = decay
        self._step = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the module's present weights in."""
        decay = min(self._decay, (1 + self._step) / (10 + self._step))
        self._step += 1
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1.0 - decay)
        for mine, new in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(new)


class Trainer:
    """Module, AdamW and average, saved together; iterating yields step numbers until the time is up."""

    def __init__(
        self, module: nn.Module, minutes: float, rate: float, checkpoint: Path, weight_decay: float = 0.01
    ) -> None:
        self.module, self.ema, self._peak, self._path = module, Ema(module), rate, checkpoint
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=weight_decay, foreach=True
        )
        self.step, spent = 0, 0.0
        if checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)
            module.load_state_dict(saved["module"])
            self.ema.module.load_state_dict(saved["ema"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, spent = saved["step"], saved["spent"]
            self.ema._step = self.step
        self.budget = Budget(minutes, spent)

    def __iter__(self) -> Iterator[int]:
        saved = self.budget.spent
        while self.budget.fraction < 1.0:
            yield self.step
            if self.budget.spent - saved > 120.0:
                self.save()
                saved = self.budget.spent
        self.save()

    def update(self, loss: torch.Tensor) -> None:
        """One optimiser step, at the learning rate of the moment."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.budget.rate(self._peak)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update(self.module)
        self.step += 1

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "module": self.module.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "spent": self.budget.spent,
        }
        torch.save(state, self._path.with_suffix(".new"))
        self._path.with_suffix(".new").replace(self._path)

    def report(self, every: int, **values: float | torch.Tensor) -> None:
        """Print a line on each `every`-th step."""
        if self.step % every == 0:
            print(line({"minutes": self.budget.spent / 60.0, "step": self.step, **values}), flush=True)


def line(values: Mapping[str, float | torch.Tensor]) -> str:
    """`name value` pairs, four digits each."""
    numbers = {n: v.item() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
    return "  ".join(f"{name} {number:.4g}" for name, number in numbers.items())
