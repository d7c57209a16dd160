"""Calibrates codes and codebooks on the model's own trajectories, in the manner of VQ4DiT.

VQ4DiT (https://arxiv.org/abs/2408.17131): every sub-vector may become one of its n nearest codewords; the weight is
their mixture by a softmax, which training drives to one of them; then the codebooks train. Inputs come from the model
itself, on its way from noise to picture.

What is trained is the graph that ships: layers may have been removed from it, and its weights may be a student's.

Deviations. Convolutions are packed as well. Assignments train block by block, each on what the blocks before it give
now and towards what the whole model's block gives: that costs a block's passes and not the model's, and a block makes
good what earlier ones did. The codebooks and biases then train together, through the whole model towards its
prediction, for what is left of the time. Mixtures start from the distances and not from equal shares.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from trimtab.calibration.gates import OUTPUT
from trimtab.calibration.kmeans import neighbours, rounded, with_error
from trimtab.calibration.torch_graph import TorchGraph
from trimtab.calibration.trajectories import Array
from trimtab.errors import CalibrationError
from trimtab.passes import vq_op
from trimtab.passes.codebooks import CALIBRATED, FORMATS, Codebooks, PackedWeight
from trimtab.passes.scopes import Module, module_tree
from trimtab.passes.vq import Site, sites

logger = logging.getLogger(__name__)


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

_HELD = 2 * 2**30
"""Bytes of a block's examples that are kept, of what it reads and is to give; others are made whenever they come."""

FROZEN = 0.99
"""A ratio from which a sub-vector's choice is made, and the share of made choices from which a layer's is."""


class PackedLayer(nn.Module):
    """The weight of one layer, as a mixture of codewords.

    Args:
        packed: The layer's codes.
        codebook: (k, d) what is trained of its codebook; of layers that share one, the same.
        site: What they stand for.
        candidates: See `Training`; 1 leaves the codes as they are.
    """

    choices: Tensor
    scale: Tensor | None

    def __init__(self, packed: PackedWeight, codebook: nn.Parameter, site: Site, candidates: int) -> None:
        super().__init__()
        self.packed, self.codebook, self.site = packed, codebook, site
        length = packed.codebook.shape[1]
        rows = site.rows()
        if packed.scale is not None:
            rows = rows / packed.scale[:, None]
        vectors = np.ascontiguousarray(vq_op.cut(rows, length).reshape(-1, length), np.float32)
        n = min(candidates, len(packed.codebook))
        indices, distances = neighbours(vectors, packed.codebook, n)
        self.register_buffer("choices", torch.from_numpy(indices))
        scale = None if packed.scale is None else torch.from_numpy(packed.scale)[:, None]
        self.register_buffer("scale", scale)
        unit = float(distances[:, 0].mean()) or 1.0
        self.logits = nn.Parameter(torch.from_numpy(-distances / unit))
        self.hard = n == 1
        if self.hard:
            self.harden()

    def weight(self) -> Tensor:
        """The weight as it is now, laid out as the graph reads it."""
        if self.hard:
            vectors = self.codebook[self.choices[:, 0]]
        else:
            vectors = (self.ratios()[..., None] * self.codebook[self.choices]).sum(1)
        shape = self.site.shape
        rows = vectors.reshape(shape[0], -1)[:, : self.packed.columns]
        if self.scale is not None:
            rows = rows * self.scale
        weight = rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        return weight.T if self.site.inputs_first else weight

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

    def result(self) -> PackedWeight:
        """The codes as they are now; codewords are numbers of FP16."""
        form = FORMATS[self.packed.bits]
        codes = self.choices[:, 0].cpu().numpy().astype(np.uint8).reshape(self.site.shape[0], -1)
        made = replace(
            self.packed,
            codes=vq_op.pack_indices(codes, form.index_bits),
            codebook=rounded(self.codebook.detach().cpu().numpy().copy()),
            method=CALIBRATED,
        )
        return with_error(made, self.site.rows())


def calibrate(
    model: ir.Model,
    codebooks: Codebooks,
    inputs: Sequence[Mapping[str, Array]],
    training: Training,
    progress: Callable[[str], None] = logger.info,
    clock: Callable[[], float] = time.monotonic,
) -> Codebooks:
    """Trains the codes of a denoiser.

    On a GPU where torch has one, else on the CPU; in float32.

    Args:
        model: The denoiser with its sampler fused; not changed.
        codebooks: Of its weights, by k-means. What is calibrated already, and their ``parameters``, stay.
        inputs: Graph input -> array, of evaluations that `trimtab.calibration.trajectories` recorded.
        training: How.
        progress: Told the losses.
        clock: Seconds; `time.process_time` for results that do not depend on what else the machine does.

    Returns:
        The codebooks, with the biases that were trained beside them.

    Raises:
        CalibrationError: No inputs; a name that the model does not have; a loss that is not finite.
        PassError: An operator that torch cannot run.
    """
    if not inputs:
        raise CalibrationError("no inputs were given to calibrate on: record at least one evaluation")
    run = _Run(model, codebooks, inputs, training, progress, clock)
    end = clock() + 60 * training.minutes
    run.assign(end - 60 * training.minutes * (1 - ASSIGNING))
    biases = run.train_codebooks(end)
    made = {name: layer.result() for name, layer in run.layers.items()}
    return replace(
        codebooks,
        layers={**codebooks.layers, **made},
        parameters={**codebooks.parameters, **biases},
    )


def block_of(parameter: str) -> str:
    """The outermost repeated block that a parameter lies in: its path up to the first number."""
    parts = parameter.split(".")
    first = next((k for k, part in enumerate(parts) if part.isdecimal()), len(parts) - 2)
    return ".".join(parts[: first + 1])


class _Run:
    """One calibration: the model, the student's weights as they are now, and what both are given.

    Attributes:
        layers: Initializer -> what is trained in its place.
    """

    def __init__(
        self,
        model: ir.Model,
        codebooks: Codebooks,
        inputs: Sequence[Mapping[str, Array]],
        training: Training,
        progress: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        places = {site.name: site for site in sites(model)}
        if missing := [name for name in codebooks.layers if name not in places]:
            raise CalibrationError(f"the model has no {missing[0]}: give the model of the codebooks")
        self._graph = TorchGraph(model, [OUTPUT], device)
        self._modules = module_tree(model.graph)
        self._all = Module("", tuple(model.graph))
        self._inputs = [
            {name: torch.from_numpy(np.asarray(array)).to(device) for name, array in values.items()}
            for values in inputs
        ]
        self._training, self._progress, self._clock = training, progress, clock
        order = np.random.default_rng(training.seed).permutation(len(inputs)).tolist()
        self._order = itertools.cycle(order)
        self.layers: dict[str, PackedLayer] = {}
        self._weights = dict(self._graph.weights)
        held = {name: torch.from_numpy(array).to(device) for name, array in codebooks.parameters.items()}
        self._weights |= {name: value for name, value in held.items() if name in self._weights}
        shared: dict[bytes, nn.Parameter] = {}
        with torch.no_grad():
            for name, packed in codebooks.layers.items():
                if packed.method == CALIBRATED:  # its codes need not be the nearest
                    self._weights[name] = torch.from_numpy(places[name].laid_out(packed.rows())).to(device)
                else:
                    key = packed.codebook.tobytes()
                    if key not in shared:
                        shared[key] = nn.Parameter(torch.from_numpy(packed.codebook.copy()).to(device))
                    layer = PackedLayer(packed, shared[key], places[name], training.candidates).to(device)
                    self.layers[name], self._weights[name] = layer, layer.weight()
        names = (name for layer in self.layers.values() for name in _biases(layer.site))
        self._biases = [n for n in dict.fromkeys(names) if n in self._weights and n not in held]

    def assign(self, end: float) -> None:
        """Block by block: trains the mixtures until they have chosen, or the block's share of the time is over."""
        members: dict[str, dict[str, PackedLayer]] = {}
        for name, layer in self.layers.items():
            if not layer.hard:
                members.setdefault(block_of(name), {})[name] = layer
        work = {path: sum(layer.choices.shape[0] for layer in own.values()) for path, own in members.items()}
        left = sum(work.values())
        for path, own in members.items():
            share = work[path] / left
            left -= work[path]
            until = self._clock() + max(0.0, end - self._clock()) * share
            self._progress(self._assign_block(path, own, until))

    def _assign_block(self, path: str, own: Mapping[str, PackedLayer], until: float) -> str:
        module = self._modules.get(path, self._all)
        outputs = [name for name in _names(module.outputs) if name in self._graph]
        given = [name for name in _names(module.inputs) if name in self._graph]
        block = self._graph.part(outputs, given)
        before, whole = self._graph.part(given), self._graph.part(outputs)

        held: dict[int, tuple[dict[str, Tensor], list[Tensor]]] = {}
        room = _HELD

        @torch.no_grad()
        def example(index: int) -> tuple[dict[str, Tensor], list[Tensor]]:
            """What the block reads now, and what the model's own gives; made when it is needed, in the block's time."""
            nonlocal room
            if index in held:
                return held[index]
            values = self._inputs[index]
            read, wanted = before(values, self._weights), list(whole(values).values())
            made = values | read, wanted
            size = sum(tensor.nbytes for tensor in (*read.values(), *wanted))
            if size <= room:
                held[index], room = made, room - size
            return made

        optimizer = torch.optim.RMSprop(
            [layer.logits for layer in own.values()], lr=self._training.logit_rate, alpha=0.9
        )
        first = last = 0.0
        steps = 0
        while self._clock() < until and any(not layer.hard for layer in own.values()):
            read, wanted = example(next(self._order))
            now = self._weights | {name: layer.weight() for name, layer in own.items()}
            fit = _distance(block(read, now).values(), wanted)
            first = first or float(fit.detach())
            soft = [layer.undecided() for layer in own.values() if not layer.hard]
            loss = fit / (first or 1.0) + torch.stack(soft).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            last, steps = float(fit.detach()), steps + 1
            if steps % 10 == 0:
                for layer in own.values():
                    layer.settle()
        with torch.no_grad():
            for name, layer in own.items():
                if not layer.hard:
                    layer.harden()
                self._weights[name] = layer.weight()
        return f"assigned {path or 'all'}: {steps} steps, error {first:.3g} -> {last:.3g}"

    def train_codebooks(self, end: float) -> dict[str, npt.NDArray[np.float32]]:
        """Trains codebooks and the packed layers' biases towards the model's own predictions."""

        @functools.cache
        @torch.no_grad()
        def wanted(index: int) -> Tensor:
            return self._graph(self._inputs[index])[OUTPUT]

        biases = {name: self._weights[name].clone() for name in self._biases}
        books = dict.fromkeys(layer.codebook for layer in self.layers.values())
        trained = [*books, *biases.values()]
        if not trained:
            return {}
        for value in trained:
            value.requires_grad_(True)
        rate = self._training.codebook_rate
        optimizer = torch.optim.RMSprop(trained, lr=rate, alpha=0.9)
        start, losses = self._clock(), list[float]()
        while (now := self._clock()) < end:
            # Down to nothing at the end, so that the last step is no jump.
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - (now - start) / (end - start))
            index = next(self._order)
            weights = self._weights | biases | {name: layer.weight() for name, layer in self.layers.items()}
            loss = _distance([self._graph(self._inputs[index], weights)[OUTPUT]], [wanted(index)])
            if not torch.isfinite(loss):
                raise CalibrationError(
                    "the calibration's loss is not finite: ask for fewer minutes or a lower rate"
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
        if losses:
            tail = max(1, len(losses) // 10)
            begun, reached = np.mean(losses[:tail]), np.mean(losses[-tail:])
            self._progress(f"trained codebooks: {len(losses)} steps, error {begun:.3g} -> {reached:.3g}")
        return {name: value.detach().cpu().numpy() for name, value in biases.items()}


def _biases(site: Site) -> Iterator[str]:
    """The initializers that the layers of a weight add to each output channel."""
    for node, _ in site.value.uses():
        added = list(node.inputs[2:3])
        for reader, index in node.outputs[0].uses():
            if reader.op_type == "Add":
                added.append(reader.inputs[1 - index])
        for value in added:
            tensor = None if value is None else value.const_value
            if value is not None and tensor is not None and tensor.size == site.shape[0]:
                yield str(value.name)


def _names(values: Iterable[ir.Value]) -> list[str]:
    return [str(value.name) for value in values]


def _distance(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> Tensor:
    """Squared error relative to what is wanted, the mean over tensors of numbers; of zeros, the error itself."""
    pairs = [(f, w) for f, w in zip(found, wanted, strict=True) if w.is_floating_point()]
    powers = [w.square().mean() for _, w in pairs]
    errors = [(f - w).square().mean() / (p if p else 1.0) for (f, w), p in zip(pairs, powers, strict=True)]
    return torch.stack(errors).mean()
