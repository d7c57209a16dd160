"""Reading linear arithmetic off code that was not written for it.

Every value that enters a scheduler (a sample, a model output, a draw of noise, a clipped prediction) becomes
a basis element: a latent that is one at the element's own position and zero elsewhere. Schedulers work
element by element, so whatever one returns holds, at position k, the coefficient of element k.

What is not linear is intercepted: draws of noise and clips are replaced by fresh elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from trimtab.errors import ExportError

Row = dict[int, float]
"""Element -> coefficient, without zeros."""

_NORMAL = {torch.randn, torch.randn_like}
_OTHER_RANDOM = {
    torch.rand, torch.rand_like, torch.randint, torch.normal, torch.bernoulli, torch.multinomial,
    torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.bernoulli_, torch.Tensor.exponential_,
}  # fmt: skip
_CLIP = {torch.clamp, torch.clip, torch.Tensor.clamp, torch.Tensor.clip}


@dataclass(frozen=True)
class Element:
    """A basis element.

    Attributes:
        kind: "noise" and "image" before the first evaluation; "sample", "output", "clipped" and "draw" after
            it.
        evaluation: The evaluation that makes it, -1 before the first. A sample belongs to the one that
            returns it.
    """

    kind: str
    evaluation: int


class Basis:
    """The elements so far, and latents that stand for them.

    Args:
        capacity: The most elements there can be: the size of the latent.
        owner: Who is being probed, for messages.
    """

    def __init__(self, capacity: int, owner: str) -> None:
        self.elements: list[Element] = []
        self.shape = (1, capacity, 1, 1)
        self._owner = owner

    def fresh(self, kind: str, evaluation: int) -> torch.Tensor:
        """A latent, float64 of `shape`, that stands for a new element."""
        if len(self.elements) == self.shape[1]:
            raise ExportError(
                f"{self._owner} draws noise or clips more often than 4 times in an evaluation; "
                "a sampler table has one noise and one clip: use another scheduler"
            )
        unit = torch.zeros(self.shape, dtype=torch.float64)
        unit[0, len(self.elements)] = 1.0
        self.elements.append(Element(kind, evaluation))
        return unit

    def row(self, latent: torch.Tensor, what: str) -> Row:
        """The coefficients that a latent holds.

        Raises:
            ExportError: It has another shape, or coefficients that are not finite.
        """
        if tuple(latent.shape) != self.shape:
            raise ExportError(
                f"{self._owner} turned a latent of shape {self.shape} into {tuple(latent.shape)} ({what}); "
                "a sampler table needs schedulers that keep the shape: use another scheduler"
            )
        values = latent.detach().to(torch.float64).flatten().numpy()
        if not np.isfinite(values).all():
            raise ExportError(
                f"{self._owner} has a coefficient that is not finite in {what}; "
                "change its prediction_type, its timestep_spacing or the number of steps"
            )
        return {int(k): float(values[k]) for k in np.flatnonzero(values)}


class Interception(TorchFunctionMode):
    """Takes the place of draws, clips and casts of latents while it is entered.

    Schedulers upcast half precision latents to float32; of float64 ones that would lose digits of the coefficients, so
    that casts of those to a narrower type are ignored.

    Args:
        shape: The latents' shape; operations on other shapes run as they are.
        draw: Gives what a draw of standard normal noise returns.
        clip: (latent, r) -> what a clip to [-r, r] returns. None lets clips run as they are.
        owner: Who is being run, for messages.

    Raises:
        ExportError: Within it, for randomness or clips that a table cannot hold.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        draw: Callable[[], torch.Tensor],
        clip: Callable[[torch.Tensor, float], torch.Tensor] | None,
        owner: str,
    ) -> None:
        super().__init__()
        self._shape = shape
        self._draw = draw
        self._clip = clip
        self._owner = owner

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _NORMAL:
            shape = _drawn_shape(args, kwargs)
            if shape != self._shape:
                raise ExportError(
                    f"{self._owner} draws noise of shape {shape} for latents of shape {self._shape}; "
                    "a sampler table needs noise of the latents' shape: use another scheduler"
                )
            return self._draw()
        if func in _OTHER_RANDOM:
            raise ExportError(
                f"{self._owner} draws random numbers with {getattr(func, '__name__', func)}; "
                "a sampler table needs standard normal noise: use another scheduler"
            )
        if (
            self._clip is not None
            and func in _CLIP
            and self._is_latent(args[0] if args else kwargs.get("input"))
        ):
            return self._clip(*self._clip_arguments(args, kwargs))
        result = func(*args, **kwargs)
        if (
            func in (torch.Tensor.to, torch.Tensor.float, torch.Tensor.half, torch.Tensor.type)
            and self._is_latent(args[0])
            and args[0].dtype == torch.float64
            and result.is_floating_point()
        ):
            return args[0]
        return result

    def _is_latent(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and tuple(value.shape) == self._shape

    def _clip_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, float]:
        names = ("input", "min", "max")
        given = dict(zip(names, args, strict=False)) | kwargs
        low, high = given.get("min"), given.get("max")
        for bound in (low, high):
            if isinstance(bound, torch.Tensor) and bound.numel() > 1:
                raise ExportError(
                    f"{self._owner} clips every element to a bound of its own; "
                    "a sampler table needs one range: use another scheduler"
                )
        if low is None or high is None or float(low) != -float(high):
            raise ExportError(
                f"{self._owner} clips to [{low}, {high}]; a sampler table needs a range [-r, r]: "
                "use another scheduler"
            )
        latent: torch.Tensor = given["input"]
        return latent, float(high)


def _drawn_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    if not args:
        args = (kwargs.get("size", kwargs.get("input", ())),)
    first = args[0]
    if isinstance(first, torch.Tensor):
        return tuple(first.shape)
    return tuple(args) if isinstance(first, int) else tuple(first)


def reduce_row(row: Row, relations: list[tuple[int, Row]], elements: list[Element], evaluation: int) -> Row:
    """Rewrite a row so that it reads fewer elements that have to be kept.

    Some schedulers keep sums (UniPC and SASolver keep the corrected sample), which unroll to the whole
    history, or keep the noise of an earlier evaluation, which no slot holds. But every sample is an element
    and also a known sum of older ones: adding a multiple of ``sample - sum = 0`` changes nothing but the
    form. Exact, up to the rounding of float64.

    Args:
        row: What evaluation ``evaluation`` reads.
        relations: (sample's element, its row), oldest first.
        elements: The basis.
        evaluation: Draws of earlier evaluations than this one have to go.

    Returns:
        A row of the same value. It still holds draws of earlier evaluations where no relation takes them
        away.
    """

    def stale(k: int) -> bool:
        return elements[k].kind == "draw" and elements[k].evaluation < evaluation

    for sample, relation in reversed(relations):
        if not any(map(stale, row)):
            break
        newest = max((k for k in row if k in relation and stale(k)), default=None)
        if newest is not None:
            row = _add_relation(row, sample, relation, row[newest] / relation[newest])
    for sample, relation in reversed(relations[-3:]):
        shared = [k for k in row if k in relation]
        if not shared:
            continue
        # The multiple that takes away most elements: the commonest ratio.
        ratios = np.sort(np.array([row[k] / relation[k] for k in shared]))
        groups = np.split(ratios, np.flatnonzero(np.abs(np.diff(ratios)) > 1e-9 * np.abs(ratios[1:])) + 1)
        multiple = float(np.median(max(groups, key=len)))
        candidate = _add_relation(row, sample, relation, multiple)
        # A form with much larger coefficients would cost digits in float32.
        largest = max(abs(value) for value in row.values())
        if (
            len(candidate) < len(row)
            and not any(map(stale, candidate))
            and max(abs(v) for v in candidate.values()) < 100 * largest
        ):
            row = candidate
    return row


def _add_relation(row: Row, sample: int, relation: Row, multiple: float) -> Row:
    result = dict(row)
    for k, value in relation.items():
        before, change = result.get(k, 0.0), multiple * value
        result[k] = before - change
        if abs(result[k]) <= 1e-9 * max(abs(before), abs(change)):
            del result[k]
    result[sample] = result.get(sample, 0.0) + multiple
    return {k: value for k, value in result.items() if value != 0.0}
