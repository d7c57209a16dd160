"""A compiled denoiser in the place of a torch one, inside a diffusers pipeline."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.bundle import open_bundle
from trimtab.errors import InputError
from trimtab.manifest import SegmentEntry
from trimtab.program import DENOISER, STATE
from trimtab.runtime.load import Pipeline
from trimtab.runtime.sessions import Buffer
from trimtab.shapes import bind, shape

_SAMPLER = {"sample_weights", "next_weights", "clip_weights", "mix", "noise"}

_OF_THE_SHAPE = {"time_ids", "resolution", "aspect_ratio", "img_ids", "txt_ids"}
"""What pipelines hand over and the graph makes itself, of the latents' shape."""

_OF_THE_TEXT = {"encoder_hidden_states", "encoder_attention_mask"}
"""What a denoiser need not heed that lost every layer which read it, and has no input for it any more."""


_DRIVEN_OTHERWISE = {
    "SanaSprint": "is run as TrigFlow, which diffusers' pipeline makes of the model around it",
    "ZImage": "reads one array of texts, and diffusers' pipeline hands over a list of them, each of its own length",
    "DreamLite": "doubles its sample itself, and diffusers' pipeline hands over both halves",
    "FluxFill": "reads mask and picture beside the sample, and diffusers' pipeline hands over all three as one",
}
"""Begin of a pipeline's class -> why what it calls is not what was compiled."""

_READ_OTHERWISE = {
    "control_scale": "holds its ControlNet with its U-Net, and diffusers runs them one after the other",
    "control": "reads a picture beside the sample, and diffusers' pipeline hands over both as one",
    "image_guidance": "is guided by a picture, for which diffusers' pipeline hands over a third row",
    "reference": "looks at a picture, whose tokens diffusers' pipeline puts behind the sample's",
}
"""The denoiser's input -> the same."""


class Denoiser(torch.nn.Module):
    """Stands where ``pipe.unet`` or ``pipe.transformer`` stood; diffusers keeps its own sampler and guidance.

        pipe = StableDiffusionPipeline.from_pretrained(folder)
        pipe.unet = trimtab.Denoiser("sd15.bundle", pipe.unet)

    The engine's fused sampler is told to give the plain prediction: one guidance row, whose weight is one.

    Args:
        bundle: Folder of a bundle that was compiled from the same pipeline.
        original: The model that it replaces, for its configuration; its weights are not kept.
        target: Whose engines to run.

    Raises:
        InputError: The bundle has no single denoiser, one that diffusers drives in another way (LCM's), or one that
            knows the time steps of its own schedules alone.
        BundleError: The bundle is damaged.
    """

    def __init__(self, bundle: str | Path, original: torch.nn.Module, target: str | None = None) -> None:
        super().__init__()
        self.config: Any = original.config
        # What pipelines ask of a model beside its output.
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        if (embedding := getattr(original, "add_embedding", None)) is not None:
            self.add_embedding = SimpleNamespace(
                linear_1=SimpleNamespace(in_features=embedding.linear_1.in_features)
            )
        opened = open_bundle(Path(bundle))
        segments = opened.contents.segments
        parts = [name for name in segments if name.startswith(DENOISER)]
        if parts != [DENOISER]:
            raise InputError(
                f"{bundle} has the denoisers {', '.join(parts)}, which its own schedule calls in turn: run the bundle "
                "itself, or compile one that skips nothing"
            )
        if getattr(self.config, "time_cond_proj_dim", None) is not None:
            raise InputError(
                f"{bundle} reads the guidance scale, which diffusers hands to a U-Net as an embedding: "
                "run the bundle itself"
            )
        self._segment: SegmentEntry = segments[DENOISER]
        inputs = {spec.name for spec in self._segment.inputs}
        pipeline = str(opened.contents.metadata.get("pipeline"))
        reasons = [why for begin, why in _DRIVEN_OTHERWISE.items() if pipeline.startswith(begin)]
        if reasons := reasons + [why for name, why in _READ_OTHERWISE.items() if name in inputs]:
            raise InputError(f"{bundle} {reasons[0]}: run the bundle itself")
        if "timestep" not in inputs:
            raise InputError(
                f"{bundle} reads rows of the time steps of its own schedules, and diffusers hands over any time step: "
                "run the bundle itself, or compile one without --hoist"
            )
        self._pipeline = Pipeline(opened, target)

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Any:
        """Nothing is cached between calls; transformers' pipelines ask for it."""
        yield

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """The prediction, for the arguments of the original's ``forward``.

        Args:
            args: (sample[, timestep[, encoder_hidden_states]]).
            return_dict: Give an object with ``sample`` or a tuple.
            kwargs: As diffusers' pipelines pass them. What the graph does not read must be None.

        Raises:
            InputError: The graph lacks an argument, or was given one of another shape, or one that it cannot heed: a
                ControlNet's residuals, a time step for each row, a cropping, latents beyond its table of positions.
        """
        given = dict(zip(("hidden_states", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
        given |= given.pop("added_cond_kwargs", None) or {}
        sample: Tensor = given.pop("sample", None) if "sample" in given else given.pop("hidden_states")
        timesteps = torch.as_tensor(given.pop("timestep"), dtype=torch.float32).reshape(-1)
        # Sana's pipeline scales the time step for its model, and the graph does so itself.
        timestep = timesteps[0] / (getattr(self.config, "timestep_scale", None) or 1)
        if (timesteps != timesteps[0]).any():
            raise InputError(
                f"{len(timesteps)} different time steps were given and the graph reads one: give one"
            )
        channels = self._channels
        places = given.get("img_ids")
        side = 1
        if places is not None:
            # Flux hands over tokens, which are 2x2 patches or single latents, and a time step from 0 to 1.
            places = places[0] if places.ndim == 3 else places
            if places[:, 0].any():
                raise InputError(
                    "pictures to look at were given and the compiled denoiser reads none: leave them out"
                )
            height, width = (int(last) + 1 for last in places[:, 1:3].amax(0))
            side = math.isqrt(sample.shape[2] // channels)
            sample = _unpack(sample, height, width, side)
            timestep = timestep * 1000
            if (mask := given.pop("attention_mask", None)) is not None:  # Chroma's, of text and picture
                given["encoder_attention_mask"] = mask[:, : given["encoder_hidden_states"].shape[1]]
        if sample.shape[1] > channels:  # an inpainting U-Net's sample, with mask and masked picture behind
            given["mask"] = sample[:1, channels : channels + 1]
            given["masked_latents"] = sample[:, channels + 1 :]
            sample = sample[:, :channels]
        self._check(sample, given)
        prediction = torch.from_numpy(self._predict(sample, float(timestep), given))
        if places is not None:
            prediction = _pack(prediction, side)
        else:
            missing = (getattr(self.config, "out_channels", None) or channels) - prediction.shape[1]
            if missing > 0:  # a learned variance, which no pipeline reads
                prediction = torch.nn.functional.pad(prediction, (0, 0, 0, 0, 0, missing))
        return SimpleNamespace(sample=prediction) if return_dict else (prediction,)

    def _check(self, sample: Tensor, given: dict[str, Any]) -> None:
        """Raises InputError for an argument that would be passed over and count for something."""
        heeded = {spec.name for spec in self._segment.inputs} | _OF_THE_SHAPE
        if "encoder_hidden_states" not in heeded:
            heeded |= _OF_THE_TEXT
        unheeded = [n for n, v in given.items() if n not in heeded and v is not None and v != {}]
        if unheeded:
            raise InputError(
                f"{unheeded[0]} was given and the compiled denoiser does not read it: leave it out, or keep the "
                "torch model"
            )
        most = (getattr(self.config, "pos_embed_max_size", None) or 0) * getattr(self.config, "patch_size", 1)
        if 0 < most < max(sample.shape[2:]):
            raise InputError(
                f"latents of {sample.shape[3]}x{sample.shape[2]} were given and the model's table of positions ends at "
                f"{most} a side: draw a smaller picture"
            )
        if (ids := given.get("time_ids")) is None:
            return
        height, width, *crop, target_height, target_width = (float(number) for number in ids[0])
        drawn = (height, width) == (target_height, target_width) and not any(crop)
        if not drawn or height * sample.shape[3] != width * sample.shape[2] or (ids != ids[0]).any():
            raise InputError(
                f"the time ids {[int(number) for number in ids[0]]} were given and the compiled denoiser reads a "
                "picture that is drawn whole: leave original_size, target_size and crops_coords_top_left out"
            )

    @property
    def _channels(self) -> int:
        state = next(spec for spec in self._segment.inputs if spec.name == "state")
        channels = state.shape[2]
        assert isinstance(channels, int)
        return channels

    def _predict(self, sample: Tensor, timestep: float, given: dict[str, Any]) -> npt.NDArray[Any]:
        new = self._pipeline.engines.backend.new
        slots = self._pipeline.bundle.contents.slots
        inputs: dict[str, Buffer] = {STATE: new((slots, *sample.shape), "float32")}
        inputs[STATE][0] = sample.numpy()
        symbols: dict[str, int] = {"rows": 1}
        for spec in self._segment.inputs:
            if spec.name == "timestep":
                inputs["timestep"] = new((), spec.dtype)
                inputs["timestep"][...] = timestep
            elif spec.name == "noise":
                inputs["noise"] = new(tuple(sample.shape), spec.dtype)
            elif spec.name in _SAMPLER:
                inputs[spec.name] = new(shape(spec.shape, symbols), spec.dtype)
            elif spec.name != STATE:
                value = given.get(spec.name)
                if value is None:
                    raise InputError(f"the denoiser reads {spec.name}, and the pipeline did not give it")
                array = torch.as_tensor(value).detach().numpy()
                array = array.reshape(-1)[:1].reshape(()) if not spec.shape else array
                inputs[spec.name] = new(array.shape, spec.dtype)
                inputs[spec.name][...] = array
            if (problem := bind(spec.shape, inputs[spec.name].shape, symbols)) is not None:
                raise InputError(
                    f"the compiled denoiser was given {spec.name} with {problem}: give what the model it was compiled "
                    "from takes"
                )
        inputs["sample_weights"][0] = 1
        inputs["mix"][0] = 1
        outputs = {spec.name: new(shape(spec.shape, symbols), spec.dtype) for spec in self._segment.outputs}
        self._pipeline.engines.session(DENOISER, inputs).bind(inputs, outputs)()
        return np.array(outputs["model_output"])


def _unpack(tokens: Tensor, height: int, width: int, side: int) -> Tensor:
    """(rows, height * width, side**2 * channels) -> (rows, channels, side * height, side * width)."""
    grid = tokens.reshape(len(tokens), height, width, -1).permute(0, 3, 1, 2)
    return torch.nn.functional.pixel_shuffle(grid, side)


def _pack(latents: Tensor, side: int) -> Tensor:
    """The way back from `_unpack`."""
    return torch.nn.functional.pixel_unshuffle(latents, side).flatten(2).transpose(1, 2)
