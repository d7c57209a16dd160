"""What a pipeline family contributes: graphs, and how their tensors are wired."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
import torch

from trimtab.errors import ExportError, InputError
from trimtab.export.encoders import Blend, MaskEncoder, VaeDecoder, VaeEncoder, latent_scale
from trimtab.export.examples import EVEN_LATENT, ROWS
from trimtab.export.source import Source, tokenizer_json
from trimtab.export.trace import Example, trace
from trimtab.program import DENOISER, STATE, TEXT, Call, TensorSpec

logger = logging.getLogger(__name__)

Keep = Callable[[str, ir.Model], ir.Model]
"""Writes a segment's weights to disk as soon as they are traced, so that torch's copy can go."""

START_NOISE = f"{STATE}[0]"
"""Slot where sampler tables look for the noise that sampling starts from."""


@dataclass
class Parts:
    """What a program is made from: graphs, and how their tensors are wired.

    Attributes:
        pipeline: What it is exported from, for reports: a pipeline's class, or a file.
        keep: Where weights go.
        segments: Name -> graph.
        tokenizers: Name -> text of its tokenizer.json.
        tasks: What is asked for, of what the pipeline can do; none for all.
        inputs: Tensors that every task needs from the host.
        prologue: Calls that every task makes.
        conditioning: Denoiser input -> tensor name.
        channels: Channels of a latent.
        colors: Channels of a picture.
        factor: Pixels to a latent, along a side.
        multiple: What a picture's sides must be multiples of, in pixels.
        size: Native (width, height) in pixels.
        trained_size: What it was before the user chose another.
        fixed_size: Why the graphs only take the native size, or None.
        largest_side: What no side of a picture can exceed, in pixels, or None.
        guidance: Default guidance scale, None without guidance.
        classifier_free: Guidance by a second, negative row.
        unguided: The guidance scale that changes nothing, from which down there is none: 1, or 0 where the pipeline
            counts from there.
        guided_below: Smaller scales than that guide too.
        task_guidance: Task -> default guidance scale where it is another.
        no_pictures: Why no picture can be given to start from, or None.
        strength: Task that starts from a picture -> its default strength; what is not here cannot be done, or is not
            asked for.
        strength_rounds_up: Whether ``steps * strength`` is rounded up to whole steps, or down.
        strength_steps: What strengths are shares of, where that is not a schedule's steps: see `trimtab.program.Task`.
        picture_scale: What the latents of a given picture are multiplied by, where it is not the sample's scale.
        posterior: Latents are drawn from the distribution that a picture is encoded as; else they are its mean, or
            what an autoencoder without one gives.
        own_posteriors: In image-to-image, pictures with seeds of their own also draw for themselves from the
            posterior of the picture that they start from.
        refines: The denoiser is for pictures that have been drawn, and starts from nothing else.
        inpainting_channels: The denoiser reads mask and masked picture itself.
        mask_pixels: Of such a mask it reads every pixel, stacked along channels, and not one for each latent.
        masked_first: A masked picture is encoded, and drawn from its posterior, before all else; or behind the noise.
        inpaints_from_noise: Inpainting of full strength starts from noise alone, and not from the picture under as much
            noise as the first step has.
        one_step_denoised: With one step the pipeline decodes the picture that the scheduler foresees, and not its next
            sample: so are distilled models (DMD) drawn.
        step_options: What the family's pipeline hands to the scheduler's ``step``.
    """

    pipeline: str
    keep: Keep
    segments: dict[str, ir.Model] = field(default_factory=dict)
    tokenizers: dict[str, str] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    inputs: list[TensorSpec] = field(default_factory=list)
    prologue: list[Call] = field(default_factory=list)
    conditioning: dict[str, str] = field(default_factory=dict)
    channels: int = 4
    colors: int = 3
    factor: int = 8
    multiple: int = 8
    size: tuple[int, int] = (512, 512)
    trained_size: tuple[int, int] | None = None
    fixed_size: str | None = None
    largest_side: int | None = None
    guidance: float | None = 7.5
    classifier_free: bool = True
    unguided: int = 1
    guided_below: bool = False
    task_guidance: dict[str, float] = field(default_factory=dict)
    no_pictures: str | None = None
    strength: dict[str, float] = field(default_factory=dict)
    strength_rounds_up: bool = False
    strength_steps: int | None = None
    picture_scale: float | None = None
    posterior: bool = True
    own_posteriors: bool = False
    refines: bool = False
    inpainting_channels: bool = False
    mask_pixels: bool = False
    masked_first: bool = False
    inpaints_from_noise: bool = True
    one_step_denoised: bool = False
    step_options: dict[str, float] = field(default_factory=lambda: {"eta": 0.0})

    def call(self, segment: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        """Adds a call to the prologue."""
        self.prologue.append(Call(segment, dict(inputs), dict(outputs)))

    def noise(self, name: str) -> TensorSpec:
        """A program input of noise, of the latents' shape."""
        shape = ("batch", self.channels, f"height//{self.factor}", f"width//{self.factor}")
        return TensorSpec(name, "float32", shape, {"kind": "noise"})

    @property
    def from_noise(self) -> str | None:
        """The task that starts from noise alone, or None for a denoiser that only inpaints or refines."""
        if self.inpainting_channels or self.refines:
            return None
        kinds = {spec.source.get("kind") for spec in self.inputs}
        if "image" in kinds:
            return "editing"
        if "tokens" in kinds:
            return "text-to-image"
        return "class-to-image" if "label" in kinds else "unconditional"

    def choose_tasks(self) -> None:
        """Leaves out of ``strength`` what is not asked for.

        Raises:
            InputError: Something is asked for that the pipeline cannot do.
        """
        able = [task for task in (self.from_noise, *self.strength) if task is not None]
        if unable := [task for task in self.tasks if task not in able]:
            raise InputError(f"{self.pipeline} cannot do {unable[0]}: it does {', '.join(able)}")
        if self.tasks:
            self.strength = {task: share for task, share in self.strength.items() if task in self.tasks}

    def start_from_pictures(self, strength: Mapping[str, float]) -> None:
        """Sets ``strength``, unless no picture can be given.

        Raises:
            ExportError: The denoiser cannot do without.
        """
        if self.no_pictures is None:
            self.strength = dict(strength)
            if self.inpainting_channels:
                self.strength.pop("image-to-image", None)
        elif self.from_noise is None:
            what = "inpainting" if self.inpainting_channels else "pictures that have been drawn"
            raise ExportError(f"the denoiser is for {what}, and {self.no_pictures}: choose another")
        elif strength:
            logger.info("%s are left out: %s", " and ".join(strength), self.no_pictures)


class PipelineParts(Parts):
    """Parts that are traced from a diffusers pipeline.

    Args:
        source: The pipeline.
        keep: Where weights go.
    """

    def __init__(self, source: Source, keep: Keep) -> None:
        super().__init__(source.pipeline_class, keep)
        self.source = source

    def add(
        self, name: str, module: torch.nn.Module, inputs: Mapping[str, Example], outputs: list[str]
    ) -> None:
        """Traces a module into the segment ``name``."""
        self.segments[name] = self.keep(name, trace(module, inputs, outputs))

    def denoiser(self, module: torch.nn.Module, inputs: Mapping[str, Example]) -> None:
        """Traces the denoiser. Its prediction has the sample's shape, whatever expression the trace found.

        Raises:
            InputError: A task is asked for that it cannot do.
            ExportError: It cannot be traced, or predicts other channels.
        """
        self.choose_tasks()
        self.add(DENOISER, module, inputs, ["prediction"])
        graph = self.segments[DENOISER].graph
        found = graph.outputs[0].shape
        if found is not None and isinstance(found[1], int) and found[1] != self.channels:
            raise ExportError(
                f"the denoiser predicts {found[1]} channels, and {self.channels} are needed, as its sample has: "
                "a U-Net with a learned variance is not supported"
            )
        sample = next(value for value in graph.inputs if value.name == "sample")
        graph.outputs[0].shape = sample.shape

    def output_width(self, segment: str, output: str) -> int:
        """The last, fixed axis of a segment's output."""
        for value in self.segments[segment].graph.outputs:
            if value.name == output and value.shape is not None:
                width = value.shape[-1]
                assert isinstance(width, int)
                return width
        raise AssertionError(f"{segment} has no output {output}")

    def tokens(
        self,
        name: str,
        tokenizer: str,
        length: int,
        *,
        mask: bool = False,
        open_length: bool = False,
        length_of: str | None = None,
        **prompt: str | bool | int,
    ) -> None:
        """Adds the program input ``name`` (rows*batch, length) int64, and its attention mask where wanted.

        ``open_length``: nothing reads the padding, which is at the right and left out: the axis is as long as the
        longest prompt needs.
        ``length_of``: a tokenizer whose own length is kept to where it is smaller.
        ``prompt``: What is made of prompts first: in ``lowercase``; a ``prefix`` before and a ``suffix`` behind; an
        ``instruction`` before those that are not negative, of which ``negative_length`` tokens are read.
        """
        loaded = self.source.load(tokenizer)
        if length_of is not None:
            own = loaded if length_of == tokenizer else self.source.load(length_of)
            length = min(length, own.model_max_length)
        if open_length:
            loaded.padding_side = "right"
        self.tokenizers[tokenizer] = tokenizer_json(loaded, length)
        shape = ("rows*batch", TEXT if open_length else length)
        source = {"tokenizer": tokenizer, **prompt, **({"length": length} if open_length else {})}
        self.inputs.append(TensorSpec(name, "int64", shape, {"kind": "tokens", **source}))
        if mask:
            self.inputs.append(TensorSpec(name + "_mask", "int64", shape, {"kind": "token_mask", **source}))

    def read_latents(self, picture: str, latents: str) -> None:
        """Has a picture encoded before the steps, for a denoiser that reads its latents.

        Args:
            picture: Program input; where it has a posterior, what is drawn from that is drawn before all other noise.
            latents: The tensor, and the denoiser's input.

        Raises:
            ExportError: The autoencoder reads other pictures than are given.
        """
        if reason := reads_no_pictures(self.source):
            raise ExportError(f"the denoiser reads a picture, and {reason}: choose another")
        noise = START_NOISE
        if self.posterior:
            noise = f"{latents}_noise"
            self.inputs.append(self.noise(noise))
        self.call("vae_encoder", {"image": picture, "noise": noise}, {"latents": latents})
        self.conditioning[latents] = latents

    def look_at_picture(self, scale: float | None = None) -> None:
        """Adds the picture that the denoiser changes by a text, of which it reads the latents (``picture_scale``)."""
        self.posterior = False  # its mean, and nothing is drawn
        self.picture_scale = scale
        self.inputs.append(picture_input("image", "image"))
        self.read_latents("image", "reference")

    def read_control(self) -> None:
        """Adds the picture that is drawn along."""
        self.inputs.append(picture_input("control_image", "control"))

    def read_guidance(self, inputs: dict[str, Example]) -> None:
        """Of a denoiser that reads the guidance scale itself (LCM, Flux, Sana-Sprint): no second, negative row."""
        inputs["guidance"] = Example(torch.tensor(7.5))
        self.inputs.append(TensorSpec("guidance", "float32", (), {"kind": "guidance"}))
        self.conditioning["guidance"] = "guidance"
        self.classifier_free = False

    def vae(self) -> None:
        """Adds the decoder, and the encoder and mask graphs that pictures as inputs need where they can be given."""
        vae = self.source.load("vae")
        scale, shift = latent_scale(self.pipeline, vae)
        height, width = EVEN_LATENT
        latents = Example(
            torch.randn(ROWS, self.channels, height, width), ("batch", None, "latent_height", "latent_width")
        )
        if self.strength or any(call.segment == "vae_encoder" for call in self.prologue):
            # The encoder's sizes are counted in latents, so that no size is asked for that it would cut off.
            unit, own = self.factor, self.picture_scale
            image = Example(torch.rand(1, height * unit, width * unit, 3), (None, "height", "width", None))
            self.add(
                "vae_encoder",
                VaeEncoder(vae, *((scale, shift) if own is None else (own, 0.0)), draws=self.posterior),
                {"image": image, "noise": latents},
                ["latents"],
            )
        self.add("vae_decoder", VaeDecoder(vae, scale, shift), {"latents": latents}, ["image"])
        if "inpainting" in self.strength:
            self._masks()

    def _masks(self) -> None:
        """Adds the graphs of inpainting: mask and masked picture, and the blend of plain denoisers."""
        height, width = EVEN_LATENT
        open_latent = ("batch", None, "latent_height", "latent_width")
        one = (None, "height", "width", None)
        unit = self.factor
        self.add(
            "mask_encoder",
            MaskEncoder(unit, pixels=self.mask_pixels),
            {
                "image": Example(torch.rand(1, height * unit, width * unit, 3), one),
                "mask": Example(torch.rand(1, height * unit, width * unit, 1), one),
            },
            ["masked_image", "latent_mask"],
        )
        if self.inpainting_channels:
            return
        latents = torch.randn(ROWS, self.channels, height, width)
        self.add(
            "blend",
            Blend(),
            {
                "proposal": Example(latents, open_latent),
                "state": Example(torch.stack([latents] * 3), ("slots", *open_latent)),
                "known_weights": Example(torch.rand(2)),
                "mask": Example(
                    torch.rand(1, 1, height, width), (None, None, "latent_height", "latent_width")
                ),
            },
            ["sample"],
        )


def picture_input(name: str, kind: str) -> TensorSpec:
    """A program input of one picture for all."""
    return TensorSpec(name, "float32", (1, "height", "width", 3), {"kind": kind})


def reads_no_pictures(source: Source) -> str | None:
    """Why a pipeline's autoencoder cannot encode the pictures that are given, or None."""
    channels = source.config("vae").get("in_channels", 3)
    return (
        None if channels == 3 else f"the autoencoder reads pictures of {channels} channels, and 3 are given"
    )
