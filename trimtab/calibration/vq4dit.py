"""Calibrates codes and codebooks on the model's own trajectories, in the manner of VQ4DiT.

VQ4DiT (https://arxiv.org/abs/2408.17131): every sub-vector may become one of its n nearest codewords; the weight is
their mixture by a softmax, which training drives to one of them; then the codebooks train. Inputs come from the model
itself, on its way from noise to picture.

Deviations. Convolutions are packed as well. Assignments train block by block, each on what the blocks before it give
now and towards what the whole model's block gives: that costs a block's passes and not the model's, and a block makes
good what earlier ones did. The codebooks and biases then train together, through the whole model towards its
prediction, for what is left of the time. Mixtures start from the distances and not from equal shares.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.calibration.codebooks import FORMATS, Codebooks, PackedWeight
from trimtab.calibration.kmeans import neighbours, rounded, with_error
from trimtab.calibration.trajectories import Sample
from trimtab.errors import CalibrationError
from trimtab.passes import vq_op

logger = logging.getLogger(__name__)

Inputs = Mapping[str, Tensor]
"""The denoiser's inputs by name, of one evaluation."""


@dataclass(frozen=True)
class Training:
    """How to calibrate.

    Attributes:
        minutes: In all, by the clock given to `calibrate`. A third goes to the assignments, the rest to the codebooks.
        candidates: The nearest codewords that a sub-vector chooses from; 1 leaves the assignments as they are.
        logit_rate: Of the mixtures' logits: the paper's.
        codebook_rate: Of codebooks and biases. The paper's is 1e-4, for 50,000 steps; here there are few.
        seed: Of the order of the inputs.
    """

    minutes: float
    candidates: int = 2
    logit_rate: float = 5e-2
    codebook_rate: float = 3e-4
    seed: int = 0


ASSIGNING = 1 / 3
"""Share of the time for the assignments."""

FROZEN = 0.99
"""A ratio from which a sub-vector's choice is made, and the share of made choices from which a layer's is."""


class PackedLayer(nn.Module):
    """The weight of one layer, as a mixture of codewords.

    Args:
        packed: The layer's codes.
        dense: (O, I) or (O, I / group, kh, kw): what it stands for.
        candidates: See `Training`.
    """

    choices: Tensor
    scale: Tensor | None

    def __init__(self, packed: PackedWeight, dense: Tensor, candidates: int) -> None:
        super().__init__()
        self.packed = packed
        self.shape = tuple(dense.shape)
        length = packed.codebook.shape[1]
        rows = vq_op.to_rows(dense.detach().numpy())
        if packed.scale is not None:
            rows = rows / packed.scale[:, None]
        vectors = np.ascontiguousarray(vq_op.cut(rows, length).reshape(-1, length), np.float32)
        n = min(candidates, len(packed.codebook))
        indices, distances = neighbours(vectors, packed.codebook, n)
        self.codebook = nn.Parameter(torch.from_numpy(packed.codebook.copy()))
        self.register_buffer("choices", torch.from_numpy(indices))
        scale = None if packed.scale is None else torch.from_numpy(packed.scale)[:, None]
        self.register_buffer("scale", scale)
        unit = float(distances[:, 0].mean()) or 1.0
        self.logits = nn.Parameter(torch.from_numpy(-distances / unit))
        self.hard = n == 1
        if self.hard:
            self.harden()

    def weight(self) -> Tensor:
        """The layer's weight as it is now."""
        if self.hard:
            vectors = self.codebook[self.choices[:, 0]]
        else:
            vectors = (self.ratios()[..., None] * self.codebook[self.choices]).sum(1)
        rows = vectors.reshape(self.shape[0], -1)[:, : self.packed.columns]
        if self.scale is not None:
            rows = rows * self.scale
        if len(self.shape) == 2:
            return rows
        return rows.reshape(self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 1)

    def ratios(self) -> Tensor:
        """Each candidate's share, (sub-vectors, n); what is frozen is one, and no longer moves."""
        ratios = self.logits.softmax(1)
        frozen = ratios.detach().amax(1, keepdim=True) > FROZEN
        whole = nn.functional.one_hot(ratios.argmax(1), ratios.shape[1]).to(ratios)
        return torch.where(frozen, whole, ratios)

    def undecided(self) -> Tensor:
        """The ratio term: how far the mixtures are from one candidate each, 0 to 1."""
        return (1 - (2 * self.ratios() - 1).abs()).mean()

    def settle(self) -> None:
        """Hardens the layer when nearly all its choices are made."""
        if not self.hard:
            made = (self.logits.detach().softmax(1).amax(1) > FROZEN).float().mean()
            if float(made) >= FROZEN:
                self.harden()

    def harden(self) -> None:
        """Every sub-vector takes its likeliest candidate."""
        best = self.logits.detach().argmax(1, keepdim=True)
        self.choices = self.choices.gather(1, best)
        self.logits = nn.Parameter(torch.zeros(0), requires_grad=False)
        self.hard = True

    def result(self, dense: Tensor) -> PackedWeight:
        """The codes as they are now; codewords are numbers of FP16."""
        form = FORMATS[self.packed.bits]
        codes = self.choices[:, 0].numpy().astype(np.uint8).reshape(self.shape[0], -1)
        made = replace(
            self.packed,
            codes=vq_op.pack_indices(codes, form.index_bits),
            codebook=rounded(self.codebook.detach().numpy().copy()),
            method="calibrated",
        )
        return with_error(made, vq_op.to_rows(dense.detach().numpy()))


def calibrate(
    module: nn.Module,
    codebooks: Codebooks,
    inputs: Sequence[Inputs],
    training: Training,
    progress: Callable[[str], None] = logger.info,
    clock: Callable[[], float] = time.monotonic,
) -> Codebooks:
    """Trains the codes of a denoiser.

    Args:
        module: From `trimtab.export.denoisers.denoiser_module`; left as it was.
        codebooks: Of its weights, by k-means.
        inputs: Of the module, from `trimtab.calibration.trajectories`.
        training: How.
        progress: Told the losses.
        clock: Seconds; `time.process_time` for results that do not depend on what else the machine does.

    Returns:
        The codebooks, with the biases that were trained beside them.

    Raises:
        CalibrationError: No inputs; a name that the module does not have; a loss that is not finite.
    """
    if not inputs:
        raise CalibrationError("no inputs were given to calibrate on: record at least one evaluation")
    end = clock() + 60 * training.minutes
    middle = end - 60 * training.minutes * (1 - ASSIGNING)
    parameters = dict(module.get_submodule("model").named_parameters())
    layers: dict[str, PackedLayer] = {}
    for name, packed in codebooks.layers.items():
        if name.removesuffix(".T") not in parameters:
            raise CalibrationError(
                f"the model has no {name.removesuffix('.T')}: give the model of the codebooks"
            )
        dense = parameters[name.removesuffix(".T")]
        layers[name.removesuffix(".T")] = PackedLayer(packed, dense, training.candidates)
    student = copy.deepcopy(module).requires_grad_(False)
    with torch.no_grad():
        _write(student, layers)
    order = itertools.cycle(np.random.default_rng(training.seed).permutation(len(inputs)).tolist())
    if any(not layer.hard for layer in layers.values()):
        _assign(module, student, layers, inputs, training, middle, order, progress, clock)
    biases = _train_codebooks(module, student, layers, inputs, training, end, order, progress, clock)
    made = {
        name: layers[name.removesuffix(".T")].result(parameters[name.removesuffix(".T")])
        for name in codebooks.layers
    }
    return replace(codebooks, layers=made, parameters=biases)


def inputs_of(module: nn.Module, samples: Sequence[Sample]) -> list[Inputs]:
    """What a denoiser's module is given in recorded evaluations."""
    taken = inspect.signature(module.forward).parameters
    return [
        {
            name: torch.from_numpy(sample.sample if name == "sample" else np.asarray(sample.inputs[name]))
            for name in taken
        }
        for sample in samples
    ]


def _write(student: nn.Module, layers: Mapping[str, PackedLayer]) -> None:
    model = student.get_submodule("model")
    for name, layer in layers.items():
        model.get_parameter(name).data.copy_(layer.weight())


def block_of(parameter: str) -> str:
    """The outermost repeated block that a parameter lies in: its path up to the first number."""
    parts = parameter.split(".")
    first = next((k for k, part in enumerate(parts) if part.isdecimal()), len(parts) - 2)
    return ".".join(parts[: first + 1])


def _assign(
    teacher: nn.Module,
    student: nn.Module,
    layers: Mapping[str, PackedLayer],
    inputs: Sequence[Inputs],
    training: Training,
    end: float,
    order: Iterator[int],
    progress: Callable[[str], None],
    clock: Callable[[], float],
) -> None:
    """Block by block: trains the mixtures until they have chosen, or the block's share of the time is over."""
    members: dict[str, dict[str, PackedLayer]] = {}
    for name, layer in layers.items():
        members.setdefault(block_of(name), {})[name] = layer
    work = {path: sum(layer.choices.shape[0] for layer in own.values()) for path, own in members.items()}
    left = sum(work.values())
    for path, own in members.items():
        share = work[path] / left
        left -= work[path]
        until = clock() + max(0.0, end - clock()) * share
        given = [_block_call(student, path, values) for values in inputs]
        wanted = [_flat(_block_call(teacher, path, values).result) for values in inputs]
        block = student.get_submodule("model").get_submodule(path)
        trained = [layer.logits for layer in own.values() if not layer.hard]
        optimizer = torch.optim.RMSprop(trained, lr=training.logit_rate, alpha=0.9)
        first = last = 0.0
        steps = 0
        while clock() < until and any(not layer.hard for layer in own.values()):
            index = next(order)
            weights = {name.removeprefix(path + "."): layer.weight() for name, layer in own.items()}
            call = given[index]
            result = torch.func.functional_call(block, weights, call.arguments, call.keywords)
            fit = _distance(_flat(result), wanted[index])
            first = first or float(fit.detach())
            soft = [layer.undecided() for layer in own.values() if not layer.hard]
            loss = fit / first + torch.stack(soft).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            last, steps = float(fit.detach()), steps + 1
            if steps % 10 == 0:
                for layer in own.values():
                    layer.settle()
        for layer in own.values():
            if not layer.hard:
                layer.harden()
        with torch.no_grad():
            _write(student, own)
        progress(f"assigned {path}: {steps} steps, error {first:.3g} -> {last:.3g}")


def _train_codebooks(
    teacher: nn.Module,
    student: nn.Module,
    layers: Mapping[str, PackedLayer],
    inputs: Sequence[Inputs],
    training: Training,
    end: float,
    order: Iterator[int],
    progress: Callable[[str], None],
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Trains codebooks and the packed layers' biases towards the model's own predictions."""
    with torch.no_grad():
        wanted = [teacher(**values) for values in inputs]
    model = student.get_submodule("model")
    names = [name.removesuffix("weight") + "bias" for name in layers]
    biases = {name: value for name, value in model.named_parameters() if name in names}
    trained = [layer.codebook for layer in layers.values()] + list(biases.values())
    for value in trained:
        value.requires_grad_(True)
    optimizer = torch.optim.RMSprop(trained, lr=training.codebook_rate, alpha=0.9)
    start, steps, losses = clock(), 0, []
    while (now := clock()) < end:
        for group in optimizer.param_groups:  # down to nothing at the end, so that the last step is no jump
            group["lr"] = training.codebook_rate * (1 - (now - start) / (end - start))
        index = next(order)
        weights = {f"model.{name}": layer.weight() for name, layer in layers.items()}
        result = torch.func.functional_call(student, weights, (), dict(inputs[index]))
        loss = _distance([result], [wanted[index]])
        if not torch.isfinite(loss):
            raise CalibrationError(
                "the calibration's loss is not finite: ask for fewer minutes or a lower rate"
            )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
        steps += 1
    if losses:
        tail = max(1, len(losses) // 10)
        progress(
            f"trained codebooks: {steps} steps, error {np.mean(losses[:tail]):.3g} -> {np.mean(losses[-tail:]):.3g}"
        )
    return {name: value.detach().numpy().copy() for name, value in biases.items()}


@dataclass(frozen=True)
class _BlockCall:
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    result: Any


@torch.no_grad()
def _block_call(module: nn.Module, path: str, values: Inputs) -> _BlockCall:
    """What a block is called with, and gives, within a run of its model."""
    seen: list[_BlockCall] = []

    def note(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> None:
        seen.append(_BlockCall(arguments, keywords, result))

    block = module.get_submodule("model").get_submodule(path)
    with block.register_forward_hook(note, with_kwargs=True):
        module(**values)
    return seen[0]


def _flat(result: Any) -> list[Tensor]:
    """The tensors of a block's result, whatever tuples they lie in."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in _flat(part)]


def _distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Squared error relative to what is wanted, the mean over tensors."""
    terms = [(f - w).square().mean() / w.square().mean() for f, w in zip(found, wanted, strict=True)]
    return torch.stack(terms).mean()
