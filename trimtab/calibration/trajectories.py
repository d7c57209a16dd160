"""What a denoiser really reads: its inputs, recorded on the model's own way from noise to picture.

No data are needed: the start is noise, and the model itself makes everything after it, as in VQ4DiT's zero-data
calibration (https://arxiv.org/abs/2408.17131, section 3.3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import CalibrationError, InputError
from trimtab.program import DENOISER, STATE
from trimtab.runtime.inputs import class_names
from trimtab.runtime.load import Pipeline
from trimtab.runtime.stand_ins import stand_ins

Array = npt.NDArray[Any]

PROMPTS = (
    "a red circle",
    "a photo of a cat on a sofa",
    "a large house by the sea at night",
    "a portrait of an old man, oil painting",
    "two birds on a branch",
    "a bowl of fruit on a wooden table",
    "a city street in the rain",
    "a mountain under a blue sky",
)
"""What a text model is asked for where the user names no prompts: plain things of many kinds."""


@dataclass(frozen=True)
class Sample:
    """One evaluation of the denoiser.

    Attributes:
        step: Its index in the schedule.
        segment: The segment that was called.
        inputs: Graph input -> a copy of what it read, the sampler's own inputs among them.
        output: The guided prediction, (batch, *latent) float32.
    """

    step: int
    segment: str
    inputs: dict[str, Array]
    output: Array

    @property
    def unguided(self) -> dict[str, Array]:
        """The same inputs with every guidance row as a picture of its own, all negative ones first.

        ``model_output`` is then what the model itself says, (rows * batch, *latent).
        """
        rows = len(self.inputs["mix"])
        state = np.concatenate([self.inputs[STATE]] * rows, 1)
        return {**self.inputs, STATE: state, "mix": np.ones(1, np.float32)}


def digest(samples: Iterable[Mapping[str, Array]]) -> str:
    """A hash of samples in their order: names and bytes, 16 hexadecimal digits."""
    found = hashlib.sha256()
    for sample in samples:
        for name, array in sorted(sample.items()):
            found.update(name.encode() + array.tobytes())
    return found.hexdigest()[:16]


def record(
    pipeline: Pipeline,
    requests: Sequence[dict[str, Any]],
    *,
    steps: Iterable[int] | None = None,
) -> list[Sample]:
    """Walks whole trajectories, and keeps the denoiser's inputs at some of the steps.

    Args:
        pipeline: A bundle or a `trimtab.calibration.draft.draft`.
        requests: Arguments of `Pipeline.prepare`, one trajectory each: see `own_requests`.
        steps: Indices into the schedule, for all of them; None for every one.

    Returns:
        By request, then by step.

    Raises:
        InputError: A step that the schedule does not have.
        CalibrationError: The model gives numbers that are not finite.
    """
    return record_each(pipeline, [(options, None if steps is None else set(steps)) for options in requests])


def record_each(
    pipeline: Pipeline,
    walk: Sequence[tuple[dict[str, Any], Collection[int] | None]],
    *,
    on_step: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """As `record`, with steps of its own for every request.

    What comes before the steps is done for all requests first: where memory is low, engines are loaded once.
    ``on_step`` is told of every step that was taken, whether it is kept or not.
    """
    begun = []
    for options, _ in walk:
        request, plan, _ = pipeline.prepare(**options)
        plan.begin(request)
        filled = [plan.buffers[spec.name] for spec in plan.inputs]
        filled += [buffer for call in plan.prologue.calls for buffer in call.outputs.values()]
        begun.append((request, plan, [(buffer, buffer.copy()) for buffer in filled]))
    samples: list[Sample] = []
    for (options, steps), (request, plan, filled_with) in zip(walk, begun, strict=True):
        wanted = set(range(len(plan.steps)) if steps is None else steps)
        if outside := {index for index in wanted if not 0 <= index < len(plan.steps)}:
            raise InputError(
                f"step {min(outside)} was asked for, and the schedule has {len(plan.steps)}: count from 0"
            )
        for buffer, content in filled_with:
            buffer[...] = content
        kept: dict[str, Array] = {}
        for index, step in enumerate(plan.steps):
            if index > max(wanted):
                break
            step.begin(request)
            calls = [call for call in step.calls if call.segment.startswith(DENOISER)]
            # The engine may write the state that it reads, so what it read is kept before it runs.
            before = [
                (call.segment, {name: _copied(kept, name, np.asarray(a)) for name, a in call.inputs.items()})
                for call in calls
                if index in wanted
            ]
            for call in step.calls:
                call.run()
            output = step.results["model_output"]
            if not np.isfinite(output).all():
                raise CalibrationError(
                    f"the model gives numbers that are not finite at step {index} of {options}: mend its weights"
                )
            samples += [Sample(index, segment, inputs, output.copy()) for segment, inputs in before]
            on_step()
    return samples


def _copied(kept: dict[str, Array], name: str, array: Array) -> Array:
    """A copy, or the last one of that name if nothing changed since: a text's embedding is the same in every step."""
    if name not in kept or not np.array_equal(kept[name], array):
        kept[name] = array.copy()
    return kept[name]


def own_requests(
    pipeline: Pipeline,
    count: int,
    *,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Requests for trajectories of any model: its own prompts or classes, one seed each.

    A model that reads a picture is given one of noise (`stand_ins`); one that only inpaints draws it anew as a whole.

    Args:
        pipeline: Says what the model needs.
        count: How many.
        prompts: For text models; None for `PROMPTS`. They are taken in turn.
        seed: Of the first; the next ones follow.
        **options: Further arguments of `Pipeline.prepare` for all of them: schedule, guidance, size.

    Raises:
        InputError: No prompts, or prompts for a model that reads none.
    """
    task = pipeline.bundle.contents.tasks[pipeline.tasks[0]]
    inputs = {str(spec.source.get("kind")): spec for spec in task.inputs}
    needed = stand_ins(task, options.get("size") or pipeline.bundle.contents.size)
    texts = PROMPTS if prompts is None else tuple(prompts)
    if not texts:
        raise InputError("no prompts were given: give at least one")
    if prompts is not None and "tokens" not in inputs:
        raise InputError("prompts were given, and the model reads none: leave them out")
    classes: Sequence[int] = ()
    if "label" in inputs:
        # The named ones: a model may have room for more classes than it was trained for.
        named = sorted(set(class_names(inputs["label"]).values()))
        classes = named or range(int(inputs["label"].source.get("classes", 1)))
    generator = np.random.default_rng(seed)
    requests = []
    for index in range(count):
        request: dict[str, Any] = needed | options | {"seed": seed + index}
        if "tokens" in inputs:
            request["prompt"] = texts[index % len(texts)]
        if classes:
            request["label"] = int(generator.choice(classes))
        requests.append(request)
    return requests


def stratified(
    pipeline: Pipeline, count: int, each: int, *, prompts: Sequence[str] | None = None, seed: int = 0
) -> list[tuple[dict[str, Any], list[int]]]:
    """Requests for trajectories, and of each the steps to keep: strata of the schedule, dealt to the requests in turn.

    Args:
        pipeline: Of the whole model.
        count: Evaluations in all; fewer where the schedule is so short that draws of one trajectory meet.
        each: Evaluations of one trajectory.
        prompts: As `own_requests` takes them.
        seed: Of the trajectories and of the steps.
    """
    requests = own_requests(pipeline, -(-count // each), prompts=prompts, seed=seed)
    length = len(pipeline.prepare(**requests[0])[1].steps)
    generator = np.random.default_rng(seed)
    # One draw from each of `count` equal parts of the schedule.
    strata = (np.arange(count) + generator.random(count)) / count
    steps = np.minimum((strata * length).astype(int), length - 1)
    return [
        (request, sorted(set(steps[number :: len(requests)].tolist())))
        for number, request in enumerate(requests)
    ]
