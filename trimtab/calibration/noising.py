"""The way from a picture to noise that a model was trained on, and what it is asked to predict there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.calibration.trajectories import Array
from trimtab.errors import InputError


@dataclass(frozen=True)
class Noising:
    """x_t = signal[t] * x_0 + noise[t] * n, for every time step t of training.

    Attributes:
        timesteps: What the model is told, (steps,) float32.
        signal: (steps,) float32.
        noise: (steps,) float32.
        kind: What is predicted: "epsilon" (n), "sample" (x_0), "v_prediction" (signal n - noise x_0), or
            "flow_prediction" (n - x_0).
    """

    timesteps: Array
    signal: Array
    noise: Array
    kind: str

    def noised(self, index: int, latents: Array, drawn: Array) -> Array:
        """What the model reads."""
        noised: Array = self.signal[index] * latents + self.noise[index] * drawn
        return noised

    def target(self, index: int, latents: Array, drawn: Array) -> Array:
        """What it should answer."""
        targets: dict[str, Callable[[], Array]] = {
            "epsilon": lambda: drawn,
            "sample": lambda: latents,
            "v_prediction": lambda: self.signal[index] * drawn - self.noise[index] * latents,
            "flow_prediction": lambda: drawn - latents,
        }
        return targets[self.kind]()


def noising_of(scheduler: Any) -> Noising:
    """That of a diffusers scheduler.

    Variance-preserving ones have ``alphas_cumprod``: what they scale a model's input to is x_t, whatever they keep
    between steps. Of the flow-matching ones, x_t = (1 - sigma) x_0 + sigma n, and the model is told 1000 sigma.

    Raises:
        InputError: A scheduler of another kind.
    """
    name, config = type(scheduler).__name__, scheduler.config
    kind = str(config.get("prediction_type", "epsilon"))
    if name.startswith("FlowMatch"):
        sigmas = np.asarray(scheduler.sigmas, np.float32)
        sigmas = sigmas[sigmas > 0]
        steps = np.float32(config["num_train_timesteps"])
        return Noising(steps * sigmas, 1 - sigmas, sigmas, "flow_prediction")
    if hasattr(scheduler, "alphas_cumprod") and kind in ("epsilon", "sample", "v_prediction"):
        kept = np.asarray(scheduler.alphas_cumprod, np.float64)
        signal, noise = np.sqrt(kept).astype(np.float32), np.sqrt(1 - kept).astype(np.float32)
        return Noising(np.arange(len(kept), dtype=np.float32), signal, noise, kind)
    raise InputError(
        f"how {name} with the prediction {kind} noises pictures is not known here: train without data, on the "
        "model's own trajectories"
    )
