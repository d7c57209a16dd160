"""Loading a bundle, and asking it for pictures. Needs neither torch nor diffusers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.bundle import Bundle, open_bundle
from trimtab.errors import InputError, TargetError
from trimtab.program import check_size
from trimtab.runtime.arguments import (
    Asked,
    all_labels,
    all_negatives,
    all_seeds,
    all_texts,
    check_count,
    choose_schedule,
    control_scale,
    for_size,
    guidance_scale,
    image_guidance_scale,
    number,
    plain,
    whole_size,
)
from trimtab.runtime.engines import Engines
from trimtab.runtime.executor import OnStep, Plan, make_plan
from trimtab.runtime.fixed import fit, fixed_sizes
from trimtab.runtime.guard import first_not_finite
from trimtab.runtime.images import Pixels, read_image, to_images
from trimtab.runtime.inputs import Noise, Request, needs_picture, text_length, unguided
from trimtab.runtime.sessions import Session
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


def load(
    path: str | Path,
    *,
    target: str | None = None,
    provider: str | None = None,
    threads: int = 0,
    low_memory: bool = False,
    tile: int | None = None,
    fast: bool = False,
) -> Pipeline:
    """Opens a bundle. Engines are loaded when they are first needed.

    Args:
        path: The bundle's folder.
        target: Whose engines to run; None for those that were built for this machine's GPU, else the first that
            it can run.
        provider: Where ONNX Runtime runs its graphs: "cpu", which is the default, or "cuda".
        threads: Threads for one operator on the CPU; 0 for one a core.
        low_memory: Hold the engines of one stage at a time, and load them again for every picture.
        tile: Decode in overlapping tiles of so many pixels along a side, which takes the memory of one tile. The
            picture differs a little from that of the whole (docs/memory.md). Engines of fixed sizes must have been
            built for this size too.
        fast: On the CPU, decode packed weights once, at load: as fast as dense ones, and as large. With the provider
            "cuda", products in TF32: less exact than FP32, as torch's convolutions are there.

    Raises:
        InputError: No such folder, provider or number of threads.
        BundleError: Not a bundle, a damaged one, or one of a newer trimtab.
        WrongDevice: The bundle has no engines for this target, or they were built for another device or version.
        MissingDependency: The target's backend is not installed.
        TargetError: The target needs a GPU, and there is none.
    """
    return Pipeline(
        open_bundle(Path(path)),
        target,
        threads,
        provider=provider,
        low_memory=low_memory,
        tile=tile,
        fast=fast,
    )


class Pipeline:
    """A loaded bundle; a context manager that lets go of its engines.

    Args:
        bundle: From `trimtab.bundle.open_bundle`.
        target: Whose engines to run.
        threads: Threads for one operator on the CPU; 0 for one a core.
        provider: As in `load`.
        low_memory: As in `load`.
        tile: As in `load`.
        fast: As in `load`.
    """

    def __init__(
        self,
        bundle: Bundle,
        target: str | None = None,
        threads: int = 0,
        *,
        provider: str | None = None,
        low_memory: bool = False,
        tile: int | None = None,
        fast: bool = False,
    ) -> None:
        self.bundle = bundle
        self._tile = tile
        self.engines = Engines(bundle, target, provider, threads, low_memory, fast)
        self._sizes = fixed_sizes(bundle.contents, self.engines.target)
        self._tokenizers: dict[str, Tokenizer] | None = None
        self._plan: tuple[tuple[Any, ...], Plan] | None = None
        self._turn = threading.RLock()  # buffers are bound once, so one call has them at a time
        self._drawing = False

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
        control: str | Path | Image | Pixels | None = None,
        control_scale: float | None = None,
        image_guidance: float | None = None,
        on_step: OnStep | None = None,
    ) -> Result:
        """Makes pictures. Threads that share a pipeline take turns.

        Args:
            prompt: What to draw: one text, or one for each picture.
            negative_prompt: What not to draw; used where guidance is above 1.
            label: Class, by number or name, or one for each picture, for class-conditional models.
            guidance: Guidance scale; None for the model's default, 1 or less for none (0 or less for Z-Image's).
            seed: The pictures' start noise is what ``torch.Generator("cpu").manual_seed(seed)`` gives, bit for
                bit. One for all pictures together, or one for each. None for a random one.
            count: Pictures for each prompt or label.
            size: (width, height) in pixels; None for the native one.
            schedule: A name such as "dpm++-20", or its number of steps; None for the first.
            image: A picture to start from, or to change by the prompt where that is what the model does (a file, PIL,
                or (height, width, 3) in 0..1).
            mask: Where to draw anew (white), as a file, PIL, or (height, width, 1) in 0..1.
            strength: How much of ``image`` is lost, in 0..1; None for the model's default.
            control: What a model with a ControlNet or a Flux Control draws along, as a file, PIL, or
                (height, width, 3) in 0..1: edges, depth or a pose, whatever it was trained on.
            control_scale: How much it counts for a ControlNet; None for 1.
            image_guidance: InstructPix2Pix's guidance scale of the picture, 1 or more; None for 1.5.
            on_step: Told (steps done, steps in all). It may raise to end the call, and may not draw with this pipeline.

        Raises:
            InputError: Something that this bundle cannot do, or cannot do without.
            BundleError: A file of the bundle is missing or was changed.
            TargetError: An engine failed, or gave numbers that are not finite.
        """
        asked = Asked(
            prompt,
            negative_prompt,
            label,
            guidance,
            seed,
            count,
            size,
            schedule,
            image,
            mask,
            strength,
            control,
            control_scale,
            image_guidance,
        )
        with self._turn:
            if self._drawing:  # this thread, from within on_step
                raise InputError(
                    "a picture was asked for from within on_step, of the pipeline that is drawing one: load the "
                    "bundle once more for it"
                )
            self._drawing = True
            try:
                return self._draw(asked, on_step)
            finally:
                self._drawing = False

    def _draw(self, asked: Asked, on_step: OnStep | None) -> Result:
        requests, plan, settings = self._prepare(asked)
        pictures, total = [], len(requests) * len(plan.steps)
        for part, request in enumerate(requests):
            done = part * len(plan.steps)
            try:
                plan.run(request, on_step and (lambda step, _, done=done: on_step(done + step, total)))  # type: ignore[misc]
            except BaseException:
                self._plan = None  # its state may hold a NaN, and no weight of zero hides one from the next
                raise
            pictures.append(np.array(plan.buffers[self.bundle.contents.outputs[0].name]))
            if not np.isfinite(pictures[-1]).all():
                raise self._not_finite(plan, replace(request, noise=request.noise.again()))
        return Result(np.concatenate(pictures)[: settings.pop("count")], settings)

    def prepare(
        self, prompt: str | Sequence[str] | None = None, **asked: Any
    ) -> tuple[Request, Plan, dict[str, Any]]:
        """What `__call__` runs: the request, the plan for it, and the settings that make the picture again.

        The plan is kept and given again for the same task, schedule, batch, size and length of texts: it is for one
        thread.

        Args:
            prompt: What to draw.
            asked: As `__call__` takes it.

        Raises:
            InputError: As in `__call__`; or more pictures than the engines draw at a time.
        """
        requests, plan, settings = self._prepare(Asked(prompt, **asked))
        if settings.pop("count") != requests[0].batch:
            raise InputError(
                f"the engines for {self.engines.target} draw {requests[0].batch} at a time: ask for as many"
            )
        return requests[0], plan, settings

    def _prepare(self, asked: Asked) -> tuple[list[Request], Plan, dict[str, Any]]:
        """What is asked for as requests that are run in turn, their plan, and the settings, with "count"."""
        contents = self.bundle.contents
        name = self._task_name(asked.image, asked.mask)
        task = contents.tasks[name]
        size = whole_size(asked.size) or contents.size
        check_size(size, contents.size, contents.size_multiple, contents.fixed_size, contents.largest_side)
        kinds = {str(spec.source.get("kind")): spec for spec in task.inputs}
        if asked.image is None and "image" in kinds:  # said before engines are loaded
            raise needs_picture()
        check_count(asked.count, size)
        prompts = all_texts(kinds, asked.prompt, asked.count)
        labels = all_labels(kinds, asked.label, asked.count)
        batch = len(prompts) or len(labels) or asked.count
        scale, rows = guidance_scale(task, kinds, asked.guidance)
        control = control_scale(kinds, asked.control, asked.control_scale)
        image_scale = image_guidance_scale(kinds, asked.image_guidance)
        seeds = all_seeds(asked.seed, batch)
        negative = asked.negative_prompt
        whole = Request(
            batch=batch,
            rows=rows,
            size=size,
            noise=Noise(seeds),
            prompts=prompts,
            negatives=None if negative is None else all_negatives(kinds, negative, batch, asked.count),
            labels=labels,
            guidance=scale,
            unguided=unguided(kinds),
            image=None if asked.image is None else read_image(asked.image, size),
            mask=None if asked.mask is None else read_image(asked.mask, size, gray=True),
            control=None if asked.control is None else read_image(asked.control, size),
            control_scale=control,
            image_guidance=image_scale,
            tokenizers=self._load_tokenizers(),
        )
        # Engines of fixed sizes take the longest text.
        tokens = text_length(task.inputs, None if self._sizes else whole)
        requests = fit(replace(whole, tokens=tokens), self._sizes, contents)
        loop_name = choose_schedule(self.schedules, task, asked.schedule, asked.strength)
        chosen, loop = for_size(task, loop_name, size)
        symbols = requests[0].symbols
        key = (name, chosen, *symbols.values())
        if self._plan is None or self._plan[0] != key:
            self._plan = None  # its buffers go before new ones come
            engines = self.engines
            plan = make_plan(contents, task, loop, symbols, engines.session, engines.backend, self._tile)
            self._plan = (key, plan)
        settings = {
            "task": name,
            "prompt": plain(asked.prompt),
            "negative_prompt": plain(negative),
            "class": plain(asked.label),
            "guidance": scale if task.guidance is not None else None,
            "seed": seeds[0] if len(seeds) == 1 else list(seeds),
            "schedule": chosen,
            "size": f"{size[0]}x{size[1]}",
            "tile": self._tile,
            "strength": task.strength if asked.strength is None else number("strength", asked.strength),
            "control_scale": control if "control_scale" in kinds else None,
            "image_guidance": image_scale if "image_guidance" in kinds else None,
            "model": contents.metadata.get("pipeline"),
            "trimtab": contents.version,
            "count": batch,
        }
        return requests, self._plan[1], {k: v for k, v in settings.items() if v is not None}

    def session(self, segment: str) -> Session:
        """The loaded engine of a segment; of several, the first."""
        return self.engines.session(segment)

    def close(self) -> None:
        """Lets go of engines and buffers, once no thread draws with them."""
        with self._turn:
            self._plan = None
            self.engines.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _not_finite(self, plan: Plan, request: Request) -> TargetError:
        """Why there is no picture: which segment, and at which step."""
        found = first_not_finite(plan, request)
        picture = f"the picture of {self.bundle.folder} holds numbers that are not finite"
        if found is None:
            return TargetError(f"{picture}, and a second run gave none: test the memory of this machine")
        if found.segment is None:
            return TargetError(f"{picture}: {found}; give another one")
        precision = self.engines.precision(found.segment)
        advice = (
            "mend the model's weights, or lower the guidance"
            if precision == "fp32"
            else f"compile it with --precision fp32 in the place of {precision}"
        )
        return TargetError(f"{picture}: {found}; {advice}")

    def _task_name(self, image: object, mask: object) -> str:
        if mask is not None and image is None:
            raise InputError("a mask was given without a picture: give image= (--image FILE) too")
        wanted = self.tasks[0]
        if mask is not None:
            wanted = "inpainting"
        elif image is not None and wanted != "editing":
            wanted = "image-to-image"
        if wanted == "image-to-image" and self.tasks == ("inpainting",):
            raise InputError("this bundle inpaints, and no mask was given: give mask= (--mask FILE) too")
        if wanted not in self.tasks:
            raise InputError(f"this bundle cannot do {wanted}: it does {', '.join(self.tasks)}")
        return wanted

    def _load_tokenizers(self) -> dict[str, Tokenizer]:
        if self._tokenizers is None:
            paths = self.bundle.contents.tokenizers
            self._tokenizers = {name: Tokenizer(self.bundle.path(path)) for name, path in paths.items()}
        return self._tokenizers
