"""The schedulers that trimtab knows by name, and what it refuses before probing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.errors import ExportError, InputError, MissingDependency, first_line, nearest

SCHEDULERS: dict[str, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "ipndm": "IPNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++-singlestep": "DPMSolverSinglestepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "sasolver": "SASolverScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2-ancestral": "KDPM2AncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
    "consistency": "CMStochasticIterativeScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
    "flow-lcm": "FlowMatchLCMScheduler",
    "edm-euler": "EDMEulerScheduler",
    "edm-dpm++": "EDMDPMSolverMultistepScheduler",
    "scm": "SCMScheduler",
}
"""Short name -> diffusers class."""

_BROWNIAN = "its noise comes from a Brownian tree, so that draws depend on one another"
REFUSED: dict[str, str] = {
    "DPMSolverSDEScheduler": _BROWNIAN,
    "CosineDPMSolverMultistepScheduler": _BROWNIAN,
}
"""diffusers class -> why no table can hold it."""


def scheduler_name(scheduler: Any) -> str:
    """The short name of a scheduler's class, or the class's own name where it has none."""
    name = type(scheduler).__name__
    return next((short for short, known in SCHEDULERS.items() if known == name), name)


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """Build a scheduler from another one's configuration, as users of diffusers switch schedulers.

    Args:
        name: A short name of `SCHEDULERS` or the name of a diffusers class.
        config: The pipeline's own ``scheduler.config``.

    Raises:
        InputError: No such scheduler, or one for another kind of model than the configuration's.
        ExportError: A scheduler that no table can hold.
    """
    try:
        import diffusers
    except ImportError as error:
        raise MissingDependency("diffusers", "compile") from error

    class_name = SCHEDULERS.get(name, name)
    check_supported(class_name)
    scheduler_class = getattr(diffusers, class_name, None)
    if scheduler_class is None or not (
        class_name in SCHEDULERS.values() or hasattr(scheduler_class, "set_timesteps")
    ):
        raise InputError(f"there is no scheduler {name!r}: {nearest(name, SCHEDULERS, SCHEDULERS.values())}")
    needed = _kind_of_class(class_name, config)
    found = _kind_of_config(config)
    if found is not None and needed != found:
        fitting = [short for short, known in SCHEDULERS.items() if _kind_of_class(known, config) == found]
        raise InputError(
            f"{class_name} is for {needed} models and the pipeline's scheduler is for {found} ones: "
            f"choose one of {', '.join(fitting)}"
        )
    try:
        return scheduler_class.from_config(config)
    except Exception as error:  # a constructor raises what it likes
        raise InputError(
            f"{class_name} does not take these options ({first_line(error)}): mend the scheduler's configuration, or "
            f"choose one of {', '.join(SCHEDULERS)}"
        ) from error


def check_supported(class_name: str) -> None:
    """Refuse the classes that are known not to fit a table.

    Raises:
        ExportError: With the reason.
    """
    if class_name in REFUSED:
        raise ExportError(
            f"{class_name} cannot become a sampler table: {REFUSED[class_name]}; "
            "independent draws are needed: use dpm++ or euler-ancestral"
        )


_ALONE = {"CMStochasticIterativeScheduler": "consistency", "SCMScheduler": "trig-flow"}
"""Schedulers for a kind of model that no other is for."""


def _kind_of_class(class_name: str, config: Mapping[str, Any]) -> str:
    if class_name.startswith("FlowMatch"):
        return "flow-matching"
    if class_name.startswith("EDM"):
        return "EDM"
    if class_name in _ALONE:
        return _ALONE[class_name]
    solvers = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver")
    if class_name.startswith(solvers) and config.get("prediction_type") == "flow_prediction":
        return "flow-matching"
    return "diffusion"


def _kind_of_config(config: Mapping[str, Any]) -> str | None:
    """None where the configuration does not say which class it was written for."""
    name = str(config.get("_class_name", ""))
    if name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction":
        return "flow-matching"
    if name.startswith("EDM"):
        return "EDM"
    return _ALONE.get(name, "diffusion") if name else None
