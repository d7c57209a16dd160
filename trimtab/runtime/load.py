"""Loading a bundle, and asking it for pictures. Needs neither torch nor diffusers."""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.bundle import Bundle, open_bundle
from trimtab.errors import InputError, TargetError, WrongDevice
from trimtab.program import Schedule, Task, TensorSpec, check_size
from trimtab.runtime.executor import OnStep, Plan, make_plan
from trimtab.runtime.images import Pixels, read_image, to_images
from trimtab.runtime.inputs import Noise, Request, class_names
from trimtab.runtime.sessions import BACKENDS, Session
from trimtab.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Result:
    """What a pipeline made.

    Attributes:
        pixels: (n, height, width, 3) float32 in 0..1.
        settings: Everything that is needed to make it again.
    """

    pixels: Pixels
    settings: dict[str, Any]

    @property
    def images(self) -> list[Image]:
        """The pictures as PIL images."""
        return to_images(self.pixels)


def load(path: str | Path, *, target: str | None = None, threads: int = 0) -> Pipeline:
    """Opens a bundle. Engines are loaded when they are first needed.

    Args:
        path: The bundle's folder.
        target: Which target's engines to run; None for the first that this machine can.
        threads: Threads for one operator on the CPU; 0 for one a core.

    Raises:
        InputError: No such folder.
        BundleError: Not a bundle, a damaged one, or one of a newer trimtab.
        WrongDevice: The bundle has no engines for this target.
    """
    return Pipeline(open_bundle(Path(path)), target, threads)


class Pipeline:
    """A loaded bundle; a context manager that lets go of its engines.

    Args:
        bundle: From `trimtab.bundle.open_bundle`.
        target: Which target's engines to run.
        threads: Threads for one operator on the CPU; 0 for one a core.
    """

    def __init__(self, bundle: Bundle, target: str | None = None, threads: int = 0) -> None:
        self.bundle = bundle
        self._target = _choose_target(bundle, target)
        self._threads = threads
        self._sessions: dict[str, Session] = {}
        self._tokenizers: dict[str, Tokenizer] | None = None
        self._plan: tuple[tuple[Any, ...], Plan] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """What can be asked for; the first is what is done unless a picture is given."""
        return tuple(self.bundle.contents.tasks)

    @property
    def schedules(self) -> tuple[str, ...]:
        """Names of the schedules; the first is the default."""
        names = [name for task in self.bundle.contents.tasks.values() for name in task.schedules]
        return tuple(dict.fromkeys(name.partition("/")[0] for name in names))

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        label: int | str | Sequence[int | str] | None = None,
        guidance: float | None = None,
        seed: int | Sequence[int] | None = None,
        count: int = 1,
        size: tuple[int, int] | None = None,
        schedule: str | int | None = None,
        image: str | Path | Image | Pixels | None = None,
        mask: str | Path | Image | Pixels | None = None,
        strength: float | None = None,
        on_step: OnStep | None = None,
    ) -> Result:
        """Makes pictures.

        Args:
            prompt: What to draw: one text, or one for each picture.
            negative_prompt: What not to draw; used where guidance is above 1.
            label: Class, by number or name, or one for each picture, for class-conditional models.
            guidance: Guidance scale; None for the model's default, 1 or less for none.
            seed: The pictures' start noise is what ``torch.Generator("cpu").manual_seed(seed)`` gives, bit for
                bit. One for all pictures together, or one for each. None for a random one.
            count: Pictures for each prompt or label.
            size: (width, height) in pixels; None for the native one.
            schedule: A name such as "dpm++-20", or its number of steps; None for the first.
            image: A picture to start from (a file, PIL, or (height, width, 3) in 0..1).
            mask: Where to draw anew (white), as a file, PIL, or (height, width, 1) in 0..1.
            strength: How much of ``image`` is lost, in 0..1; None for the model's default.
            on_step: Told (steps done, steps in all).

        Raises:
            InputError: Something that this bundle cannot do, or cannot do without.
            BundleError: A file of the bundle is missing or was changed.
            TargetError: An engine failed, or gave numbers that are not finite.
        """
        request, plan, settings = self.prepare(
            prompt,
            negative_prompt=negative_prompt,
            label=label,
            guidance=guidance,
            seed=seed,
            count=count,
            size=size,
            schedule=schedule,
            image=image,
            mask=mask,
            strength=strength,
        )
        plan.run(request, on_step)
        pixels = plan.buffers[self.bundle.contents.outputs[0].name].copy()
        if not np.isfinite(pixels).all():
            raise TargetError(
                f"the picture of {self.bundle.folder} holds numbers that are not finite: compile it again "
                "with --precision fp32"
            )
        return Result(pixels, settings)

    def prepare(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        label: int | str | Sequence[int | str] | None = None,
        guidance: float | None = None,
        seed: int | Sequence[int] | None = None,
        count: int = 1,
        size: tuple[int, int] | None = None,
        schedule: str | int | None = None,
        image: str | Path | Image | Pixels | None = None,
        mask: str | Path | Image | Pixels | None = None,
        strength: float | None = None,
    ) -> tuple[Request, Plan, dict[str, Any]]:
        """What `__call__` runs: the request, the plan for it, and the settings that make the picture again.

        The plan is kept and given again for the same task, schedule, batch and size.
        """
        contents = self.bundle.contents
        name = self._task_name(image, mask)
        task = contents.tasks[name]
        if size is not None:
            check_size(size, contents.size, contents.size_multiple, contents.fixed_size)
        size = size or contents.size
        kinds = {str(spec.source.get("kind")): spec for spec in task.inputs}
        if count < 1:
            raise InputError(f"{count} pictures were asked for: ask for one or more")
        prompts = _texts(kinds, prompt, count)
        labels = _labels(kinds, label, count)
        batch = len(prompts) or len(labels) or count
        scale, rows = _guidance(task, kinds, guidance)
        seeds = _seeds(seed, batch)
        request = Request(
            batch=batch,
            rows=rows,
            size=size,
            noise=Noise(seeds),
            prompts=prompts,
            negatives=None if negative_prompt is None else _negatives(kinds, negative_prompt, batch),
            labels=labels,
            guidance=scale,
            image=None if image is None else read_image(image, size),
            mask=None if mask is None else read_image(mask, size, gray=True),
            tokenizers=self._load_tokenizers(),
        )
        chosen, loop = self._schedule(task, schedule, strength)
        key = (name, chosen, batch, rows, size)
        if self._plan is None or self._plan[0] != key:
            self._plan = None  # its buffers go before new ones come
            self._plan = (key, make_plan(contents, task, loop, request.symbols, self.session))
        settings = {
            "task": name,
            "prompt": _plain(prompt),
            "negative_prompt": _plain(negative_prompt),
            "class": _plain(label),
            "guidance": scale if task.guidance is not None else None,
            "seed": seeds[0] if len(seeds) == 1 else list(seeds),
            "schedule": chosen,
            "size": f"{size[0]}x{size[1]}",
            "strength": strength if strength is not None else task.strength,
            "model": contents.metadata.get("pipeline"),
            "trimtab": contents.version,
        }
        return request, self._plan[1], {k: v for k, v in settings.items() if v is not None}

    def session(self, segment: str) -> Session:
        """The loaded engine of a segment."""
        if segment not in self._sessions:
            engine = next(
                e for e in self.bundle.contents.segments[segment].engines if e.target == self._target
            )
            # Every file beside the engine is verified with it: a graph reads weights that others wrote.
            folder = engine.path.rpartition("/")[0] + "/"
            weights = [f.path for f in self.bundle.contents.files if f.path.endswith(".weights")]
            self.bundle.verify([engine.path, *(path for path in weights if path.startswith(folder))])
            self._sessions[segment] = BACKENDS[engine.backend](self.bundle.path(engine.path), self._threads)
        return self._sessions[segment]

    def close(self) -> None:
        """Lets go of engines and buffers."""
        self._plan = None
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- from loose arguments to a request ----

    def _task_name(self, image: object, mask: object) -> str:
        if mask is not None and image is None:
            raise InputError("a mask was given without a picture: give image= (--image FILE) too")
        wanted = (
            "inpainting" if mask is not None else "image-to-image" if image is not None else self.tasks[0]
        )
        if wanted not in self.tasks:
            raise InputError(f"this bundle cannot do {wanted}: it does {', '.join(self.tasks)}")
        return wanted

    def _schedule(
        self, task: Task, schedule: str | int | None, strength: float | None
    ) -> tuple[str, Schedule]:
        names = self.schedules
        if schedule is None:
            name = names[0]
        else:
            matches = [n for n in names if n == str(schedule) or n.rpartition("-")[2] == str(schedule)]
            if not matches:
                raise InputError(
                    f"there is no schedule {schedule!r} in this bundle: it has {', '.join(names)}"
                )
            name = matches[0]
        if task.strength is None:
            if strength is not None:
                raise InputError("a strength was given without a picture: give image= (--image FILE) too")
            return name, task.schedules[name]
        share = task.strength if strength is None else strength
        if not 0 < share <= 1:
            raise InputError(f"the strength {share} is not above 0 and at most 1")
        if share == 1 and name in task.schedules:
            return name, task.schedules[name]  # nothing of the picture is left in the start noise
        total = int(name.rpartition("-")[2])
        start = int(total - total * share) if task.strength_rounds_up else total - int(total * share)
        started = f"{name}/from-{start}"
        if started not in task.schedules:
            starts = [int(n.rpartition("-")[2]) for n in task.schedules if n.startswith(f"{name}/from-")]
            if start >= total:
                raise InputError(
                    f"the strength {share} leaves none of {total} steps: use at least {1 / total:.2g}"
                )
            near = min(starts, key=lambda k: abs(k - start))
            raise InputError(f"{name} cannot start at step {start}: use strength {1 - near / total:.3g}")
        return started, task.schedules[started]

    def _load_tokenizers(self) -> dict[str, Tokenizer]:
        if self._tokenizers is None:
            paths = self.bundle.contents.tokenizers
            self._tokenizers = {name: Tokenizer(self.bundle.path(path)) for name, path in paths.items()}
        return self._tokenizers


def _choose_target(bundle: Bundle, target: str | None) -> str:
    segments = bundle.contents.segments.values()
    available = [e.target for e in next(iter(segments)).engines] if segments else []
    able = [
        name
        for name in available
        if all(
            any(e.target == name and e.built and e.backend in BACKENDS for e in s.engines) for s in segments
        )
    ]
    if target is None and able:
        return able[0]
    if target in able:
        return str(target)
    wanted = f"for {target}" if target else "that this machine can run"
    raise WrongDevice(
        f"{bundle.folder} has no engines {wanted}: it has {', '.join(available) or 'none'}; compile with --target cpu"
    )


def _guidance(task: Task, kinds: Mapping[str, TensorSpec], guidance: float | None) -> tuple[float, int]:
    """The guidance scale and the number of rows that it takes."""
    if task.guidance is None:
        if guidance is not None:
            raise InputError("a guidance scale was given and this model has no guidance: leave it out")
        return 1.0, 1
    scale = float(task.guidance if guidance is None else guidance)
    if not np.isfinite(scale):
        raise InputError(f"the guidance scale {scale} is not a finite number")
    # As in diffusers, a scale of 1 or less turns classifier-free guidance off.
    mix = kinds.get("mix")
    rows = 2 if mix is not None and mix.source.get("classifier_free") and scale > 1 else 1
    return scale, rows


def _seeds(seed: int | Sequence[int] | None, batch: int) -> tuple[int, ...]:
    if seed is None:
        return (secrets.randbelow(2**32),)
    if isinstance(seed, int | np.integer):
        return (int(seed),)
    if len(seed) != batch:
        raise InputError(f"{len(seed)} seeds were given for {batch} pictures: give one, or one for each")
    return tuple(seed)


def _texts(
    kinds: Mapping[str, TensorSpec], prompt: str | Sequence[str] | None, count: int
) -> tuple[str, ...]:
    if "tokens" not in kinds:
        if prompt is not None:
            raise InputError("a prompt was given and this model does not read any: leave it out")
        return ()
    if prompt is None or (len(prompt) == 0 and not isinstance(prompt, str)):
        raise InputError("no prompt was given and this model needs one: give prompt= (--prompt TEXT)")
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    return tuple(text for text in texts for _ in range(count))


def _negatives(kinds: Mapping[str, TensorSpec], value: str | Sequence[str], batch: int) -> tuple[str, ...]:
    if "tokens" not in kinds:
        raise InputError("a negative prompt was given and this model does not read any: leave it out")
    if isinstance(value, str):
        return (value,) * batch
    if not value or batch % len(value):
        raise InputError(
            f"{len(value)} negative prompts were given for {batch} pictures: give one, or one for each prompt"
        )
    return tuple(text for text in value for _ in range(batch // len(value)))


def _labels(
    kinds: Mapping[str, TensorSpec], label: int | str | Sequence[int | str] | None, count: int
) -> tuple[int, ...]:
    if "label" not in kinds:
        if label is not None:
            raise InputError("a class was given and this model has none: leave it out")
        return ()
    if label is None or (not isinstance(label, int) and len(label) == 0):
        raise InputError("no class was given and this model needs one: give label= (--class N)")
    labels = [label] if isinstance(label, int | str) else list(label)
    names = class_names(kinds["label"])
    return tuple(number for value in labels for number in [_class_number(names, value)] * count)


def _class_number(names: Mapping[str, int], label: int | str) -> int:
    if not isinstance(label, str):
        return int(label)
    if label in names:
        return names[label]
    if label.removeprefix("-").isdecimal():
        return int(label)
    near = difflib.get_close_matches(label, names, 3, 0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "give its number"
    raise InputError(f"there is no class {label!r} in this model: {hint}")


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | None) else list(value)
