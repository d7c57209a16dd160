"""How diffusers' pipelines run a scheduler: what is set, in which order, and what is passed.

Follows ``retrieve_timesteps``, ``get_timesteps``, ``prepare_latents`` and ``prepare_extra_step_kwargs`` of
diffusers' text-to-image, image-to-image and inpainting pipelines, and their loops.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.errors import ExportError, InputError, TrimtabError
from trimtab.silence import errors_alone

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Walk:
    """What to run, and how diffusers' pipelines run it."""

    scheduler: Any
    steps: int
    start: int
    from_image: bool
    keep_start: bool
    timesteps_options: dict[str, Any]
    step_options: dict[str, Any]
    owner: str
    denoised: bool = False

    def prepare(self) -> tuple[Any, torch.Tensor]:
        """A fresh copy with its timesteps set, and the timesteps to run.

        As ``retrieve_timesteps`` and ``get_timesteps`` of the pipelines.
        """
        scheduler = copy.deepcopy(self.scheduler)
        trig_flow = self.owner == "SCMScheduler"
        if trig_flow:  # its pipeline scales latents by sigma_data around it, and its noise is of as much
            scheduler.register_to_config(sigma_data=1.0)
        options = dict(self.timesteps_options)
        custom = [name for name in ("timesteps", "sigmas") if options.get(name) is not None]
        if not custom:
            options["num_inference_steps"] = self.steps
        elif any(len(options[name]) != self.steps for name in custom):
            raise InputError(
                f"{len(options[custom[0]])} {custom[0]} were given for {self.steps} steps: give one for each"
            )
        try:
            with errors_alone("diffusers"):  # some warn of what they set right themselves, at every walk
                scheduler.set_timesteps(device="cpu", **options)
        except Exception as error:
            given = "".join(f" with {name}" for name in self.timesteps_options)
            raise InputError(
                f"{self.owner} does not take {self.steps} steps{given} ({_line(error)}): "
                "choose other steps or another --scheduler"
            ) from error
        begin = self.start * getattr(scheduler, "order", 1)
        timesteps: torch.Tensor = scheduler.timesteps[begin:]
        if trig_flow:  # the last is where the last step ends
            timesteps = timesteps[:-1]
        if not len(timesteps):
            raise InputError(f"start={self.start} leaves none of {self.steps} steps: start earlier")
        # Text-to-image pipelines leave the begin index alone; the ones that take an image set it.
        if (self.from_image or self.keep_start) and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        return scheduler, timesteps

    def first_sample(
        self, scheduler: Any, timesteps: torch.Tensor, noise: torch.Tensor, image: torch.Tensor | None
    ) -> torch.Tensor:
        """What ``prepare_latents`` of the pipelines returns."""
        if self.from_image:
            assert image is not None
            return add_noise(scheduler, image, noise, timesteps[:1].repeat(len(noise)))
        # Flow-matching schedulers have no init_noise_sigma: their pipelines start from the noise as it is.
        sample: torch.Tensor = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        return sample

    def step(
        self, scheduler: Any, output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """The next sample."""
        accepted = inspect.signature(scheduler.step).parameters
        options = {
            name: value for name, value in self.step_options.items() if name in accepted or name != "eta"
        }
        unknown = [name for name in options if name not in accepted]
        if unknown:
            raise InputError(f"step of {self.owner} does not take {', '.join(unknown)}: leave it out")
        results = scheduler.step(output, timestep, sample, return_dict=False, **options)
        # Not all schedulers say what they think the picture is; diffusers' pipeline then fails.
        result: torch.Tensor = results[1] if self.denoised and len(results) > 1 else results[0]
        return result

    def known(
        self, scheduler: Any, timesteps: torch.Tensor, index: int, image: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """What inpainting puts outside of the mask after evaluation ``index``."""
        if index + 1 == len(timesteps):
            return image
        return add_noise(scheduler, image, noise, timesteps[index + 1 : index + 2])


def can_add_noise(scheduler: Any) -> bool:
    """Whether a scheduler can start from a picture; one that cannot (IPNDM) only draws from noise."""
    return hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise")


def add_noise(
    scheduler: Any, image: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The image's latents at the noise level of a timestep, under either name that diffusers has for it."""
    if hasattr(scheduler, "add_noise"):
        noisy: torch.Tensor = scheduler.add_noise(image, noise, timesteps)
    elif hasattr(scheduler, "scale_noise"):
        noisy = scheduler.scale_noise(image, timesteps, noise)
    else:
        raise ExportError(
            f"{type(scheduler).__name__} has neither add_noise nor scale_noise and an image needs one: "
            "use another scheduler"
        )
    return noisy


def model_input(scheduler: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The sample as the model gets it; flow-matching schedulers do not scale it."""
    if not hasattr(scheduler, "scale_model_input"):
        return sample
    scaled: torch.Tensor = scheduler.scale_model_input(sample, timestep)
    return scaled


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def blaming(owner: str) -> Iterator[None]:
    """Turns whatever a scheduler raises into an ExportError with its name."""
    try:
        yield
    except TrimtabError:
        raise
    except Exception as error:
        raise ExportError(
            f"{owner} failed while it was probed ({type(error).__name__}: {_line(error)}); "
            "a scheduler that runs is needed: change its configuration or use another one"
        ) from error
