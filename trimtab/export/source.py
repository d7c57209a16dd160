"""A diffusers pipeline on disk: what it is made of, opened one component at a time."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.bundle import MANIFEST
from trimtab.errors import ExportError, InputError, first_line
from trimtab.export.checkpoint import STEMS, check_room, find_checkpoint, unread, widened

logger = logging.getLogger(__name__)


_EXPORTED = ("controlnet", "text_encoder", "transformer", "unet", "vae")
"""What the names of the models that are exported begin with: safety checkers and image encoders are not."""

_RENAMED = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
"""``norm_type`` -> the class that diffusers makes of an old Transformer2DModel."""


class Source:
    """A folder written by ``save_pretrained``.

    Components are loaded one at a time and in float32, so that a caller who lets go of each before it asks
    for the next never holds more than the largest.

    Args:
        folder: Holds ``model_index.json``.
        scratch: A folder for weights of half precision, which are mapped from there in float32 while they are read
            (`trimtab.export.checkpoint.widened`); None to hold them in memory.

    Raises:
        InputError: No such folder, or not a diffusers pipeline.
    """

    def __init__(self, folder: Path, scratch: Path | None = None) -> None:
        index = folder / "model_index.json"
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder: give the folder of a diffusers pipeline")
        if not index.is_file() and (folder / MANIFEST).is_file():
            raise InputError(
                f"{folder} is a bundle, compiled already: give the model that it was compiled from"
            )
        if not index.is_file():
            raise InputError(
                f"{folder} holds no model_index.json: give a folder written by a diffusers pipeline's "
                "save_pretrained, or a .toml file that names .onnx files"
            )
        try:
            self.index: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
            self.pipeline_class = str(self.index["_class_name"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{index} cannot be read as a pipeline's index ({error}): save it again"
            ) from None
        self.folder, self.scratch = folder, scratch

    def has(self, name: str) -> bool:
        """Whether the pipeline comes with this component."""
        entry = self.index.get(name)
        return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None

    @property
    def denoiser(self) -> str:
        """The component that is run step after step: "unet" or "transformer"."""
        return "transformer" if "transformer" in self.index else "unet"

    def class_name(self, name: str) -> str:
        """The class of a component, such as "UNet2DConditionModel"."""
        return str(self._entry(name)[1])

    def _entry(self, name: str) -> list[Any]:
        entry = self.index.get(name)
        if not self.has(name):
            raise InputError(f"{self.folder} has no {name}: {self.pipeline_class} needs one")
        if not (self.folder / name).is_dir():
            raise InputError(f"{self.folder / name} is missing: copy the pipeline again, whole")
        assert isinstance(entry, list)
        return entry

    def config(self, name: str) -> dict[str, Any]:
        """A component's configuration, without loading it; what a diffusers class takes by default is filled in.

        Raises:
            InputError: It is missing or cannot be read, or its class is not installed.
        """
        return self._configured(name)[1]

    def hollow(self, name: str) -> Any:
        """A model of diffusers as its configuration says, without weights: on torch's meta device, in a second.

        Raises:
            InputError: Its configuration is missing or cannot be read, or its class is not installed.
            Exception: Whatever its layers do where they do not take the configuration, or that device.
        """
        import torch

        cls, config = self._configured(name)
        with torch.device("meta"):
            return cls.from_config(config)

    def _configured(self, name: str) -> tuple[Any, dict[str, Any]]:
        """A component's class and its configuration, whole."""
        library, class_name = self._entry(name)
        path = self.folder / name / "config.json"
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path} cannot be read ({error}): copy the pipeline again, whole") from None
        if class_name == "Transformer2DModel":
            class_name = _RENAMED.get(str(found.get("norm_type")), class_name)
        cls = self._class(name, library, class_name)
        if library != "diffusers":  # transformers' classes take their defaults from classes of their own
            return cls, found
        parameters = inspect.signature(cls).parameters.values()
        return cls, {p.name: p.default for p in parameters if p.default is not p.empty} | found

    def _class(self, name: str, library: str, class_name: str) -> Any:
        """A component's class.

        Raises:
            InputError: It is not installed, is not one of the two libraries', or might run code of the folder.
        """
        if str(library) not in STEMS:
            # The pipeline's own python package ("stable_diffusion", ...), or remote code, which is never run.
            raise InputError(
                f"{name} is a {library}.{class_name}: only diffusers and transformers are loaded"
            )
        cls = getattr(importlib.import_module(library), str(class_name), None)
        if cls is None:
            raise InputError(
                f"{library} has no {class_name}, which {self.folder / name} needs: upgrade {library}"
            )
        if not _is_known(cls, library):
            # Others, as DiffusionPipeline and AutoModel, look into the folder for code, and ask whether to run it.
            raise InputError(
                f"{name} is a {library}.{class_name}, which is no model, scheduler or tokenizer: save the pipeline "
                "again"
            )
        return cls

    def load(self, name: str) -> Any:
        """Loads a model in float32 and eval mode, or a scheduler or tokenizer.

        Raises:
            InputError: The component is missing, damaged, or of a class that is not installed.
            TrimtabError: The disk is full.
        """
        library, class_name = self._entry(name)
        cls = self._class(name, library, class_name)
        if not _is_model(cls):
            return self._from_pretrained(name, cls, self.folder / name)
        checkpoint = find_checkpoint(self.folder / name, STEMS[library])
        with widened(checkpoint, self.scratch) as read:
            options = _weight_options(library, read.variant)
            component, info = self._from_pretrained(name, cls, read.folder, **options)
        if missing := sorted(info["missing_keys"]):  # which the libraries make up, and warn
            # transformers 5 saves under names that transformers 4 does not know.
            newer = f", or upgrade {library}: it has others" if info["unexpected_keys"] else ""
            raise InputError(
                f"{self.folder / name} lacks {len(missing)} of {class_name}'s weights ({missing[0]}): copy it "
                f"again{newer}"
            )
        return component.eval()

    def _from_pretrained(self, name: str, cls: Any, folder: Path, **options: Any) -> Any:
        """What a component's class makes of a folder."""
        library, class_name = self._entry(name)
        if library != "diffusers":
            options["trust_remote_code"] = False
        try:
            with _no_bar(library):
                return cls.from_pretrained(folder, local_files_only=True, **options)
        except Exception as error:  # from_pretrained raises whatever the layer below did
            raise InputError(
                f"{self.folder / name} cannot be loaded as {class_name} ({first_line(error)}): copy it again"
            ) from error

    def check_weights(self) -> None:
        """Looks at the weight files of every model that is exported: the last is loaded long after the first.

        Raises:
            InputError: One is missing, cut short, or of a form that is not read; its class is not installed; or a text
                encoder lacks its tokenizer.
            TrimtabError: The disk has no room for them.
        """
        found = []
        for name in self.index:
            if name.startswith(_EXPORTED) and self.has(name):
                library, class_name = self._entry(name)
                self._class(name, library, class_name)
                found.append(find_checkpoint(self.folder / name, STEMS[library]))
                if name.startswith("text_encoder"):
                    self._entry(name.replace("text_encoder", "tokenizer"))
        if self.scratch is not None:
            check_room(found, self.scratch)


def _weight_options(library: str, variant: str | None) -> dict[str, Any]:
    """For from_pretrained of a model: float32, the variant, and what was missing beside the model."""
    import torch

    dtype = "dtype" if library == "transformers" else "torch_dtype"
    # Only safetensors: a pickle runs code when it is opened.
    return {dtype: torch.float32, "use_safetensors": True, "variant": variant, "output_loading_info": True}


@contextlib.contextmanager
def _no_bar(library: str) -> Iterator[None]:
    """Both libraries draw a bar for what they load in parts, also where nobody sees a terminal."""
    logs = importlib.import_module(f"{library}.utils.logging")
    shown = logs.is_progress_bar_enabled()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logs.enable_progress_bar()


def _is_known(cls: Any, library: str) -> bool:
    """Whether it is a class of a kind that reads a folder's data alone."""
    import torch

    if library == "diffusers":
        from diffusers import SchedulerMixin as Other
    else:
        from transformers import PreTrainedTokenizerBase as Other
    return isinstance(cls, type) and issubclass(cls, torch.nn.Module | Other)


def _is_model(cls: type) -> bool:
    import torch

    return issubclass(cls, torch.nn.Module)


def find(model: str) -> Path:
    """The folder of a model: a path as it is, a hub id downloaded (or found in the hub's cache).

    ``owner/name@revision`` is a branch, a tag or a commit of the hub's; without one it is the main branch.

    Raises:
        InputError: Neither a path nor a model that the hub gives.
    """
    path = Path(model)
    if path.exists():
        return path
    parts = model.split("/")
    if path.is_absolute() or model.startswith(".") or len(parts) != 2 or not all(parts):
        raise InputError(
            f"{model} does not exist: give a diffusers folder, a .toml file or a hub id (owner/name)"
        )
    return _download(model)


def _download(model: str) -> Path:
    import huggingface_hub

    name, _, version = model.partition("@")
    revision = version or None
    patterns = ["*.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model", "*/*.jinja"]
    # Single-file checkpoints of the same weights, and what other frameworks would load.
    ignored = ["*.bin", "*.ckpt", "*.msgpack", "*.onnx*", "openvino*", "flax*", "safety_checker/*"]
    with contextlib.suppress(Exception):  # without a network the cache is looked into below
        # Asked once: a listing of the files is tried six times, in half a minute.
        info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10)
        ignored += unread([file.rfilename for file in info.siblings or ()])
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored
            )
        )
    except Exception as error:  # requests, httpx and hub errors share no base
        raise InputError(
            f"{model} is no folder here and the hub did not give it ({type(error).__name__}: {first_line(error)}): "
            "check the name and the network, or give a folder"
        ) from error


def tokenizer_json(tokenizer: Any, length: int) -> str:
    """A tokenizer as the text of a ``tokenizer.json`` that cuts and pads to ``length`` by itself, on its own sides.

    Args:
        tokenizer: A transformers tokenizer.
        length: Tokens of every encoded prompt.

    Raises:
        ExportError: The tokenizer has no fast form.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # transformers before 5 opens the slow form where a folder's index names it
        from transformers.convert_slow_tokenizer import convert_slow_tokenizer

        try:
            backend = convert_slow_tokenizer(tokenizer)
        except Exception as error:  # its converters raise what they like
            raise ExportError(
                f"{type(tokenizer).__name__} has no fast form ({first_line(error)}): "
                "save the tokenizer's tokenizer.json beside it"
            ) from error
    fast = Tokenizer.from_str(backend.to_str())
    if tokenizer.pad_token_id is None:
        raise ExportError(f"{type(tokenizer).__name__} has no padding token: set one and save it again")
    fast.enable_truncation(length, direction=tokenizer.truncation_side)
    fast.enable_padding(
        direction=tokenizer.padding_side,
        length=length,
        pad_id=tokenizer.pad_token_id,
        pad_token=tokenizer.pad_token,
    )
    return str(fast.to_str())
