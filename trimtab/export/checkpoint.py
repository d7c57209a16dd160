"""The weight files of a model on disk: which of them are read, whether they are whole, and how they are mapped."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.errors import InputError, TrimtabError, first_line

if TYPE_CHECKING:
    from torch import Tensor

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Library -> what the names of its weight files begin with; a variant's name and a shard's number follow."""

_NARROW = re.compile("BF16|F16|F8_.*")
"""What safetensors calls the floating-point types that float32 holds exactly."""

_SHARD_BYTES = 1 << 28
"""Of float32 weights in one file: what `widened` holds in memory, or one tensor where that is larger."""


@dataclass(frozen=True)
class Weight:
    """A tensor in a file.

    Attributes:
        file: Where it lies.
        name: What it is called there.
        type: As safetensors calls it, such as "BF16".
        size: Its elements.
    """

    file: Path
    name: str
    type: str
    size: int

    @property
    def is_narrow(self) -> bool:
        """Whether its type is narrower than float32."""
        return _NARROW.fullmatch(self.type) is not None

    @property
    def float32_bytes(self) -> int:
        """At the most: an integer has up to eight, and few models have any."""
        return self.size * (4 if "F" in self.type else 8)

    def widened(self) -> Tensor:
        """Its numbers, in float32 where they are narrower.

        Raises:
            InputError: They cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, "pt") as stored:
                weight: Tensor = stored.get_tensor(self.name)
        except SafetensorError as error:
            raise InputError(f"{self.file} cannot be read ({first_line(error)}): copy it again") from error
        return weight.float() if self.is_narrow else weight.clone()


@dataclass(frozen=True)
class Checkpoint:
    """One model's weights.

    Attributes:
        folder: Of the model.
        stem: Of `STEMS`.
        variant: What from_pretrained calls them, such as "fp16"; None for the plain ones.
        weights: All of them, in one file or in shards, which are whole.
    """

    folder: Path
    stem: str
    variant: str | None
    weights: tuple[Weight, ...]

    @property
    def is_narrow(self) -> bool:
        """Whether some of them are narrower than float32."""
        return any(weight.is_narrow for weight in self.weights)

    @property
    def float32_bytes(self) -> int:
        """What they take in float32."""
        return sum(weight.float32_bytes for weight in self.weights)


def find_checkpoint(folder: Path, stem: str) -> Checkpoint:
    """The weights of a model: the plain ones, else those of the variant fp32, fp16 or another.

    Raises:
        InputError: There are none, or one of their files is missing or cut short.
    """
    files = [f for f in sorted(folder.glob("*.safetensors")) if re.match(rf"{stem}[.-]", f.name)]
    if not files:
        other = [*folder.glob("*.bin"), *folder.glob("*.ckpt"), *folder.glob("*.msgpack")]
        found = f"only {other[0].name}" if other else "no weight file"
        raise InputError(
            f"{folder} holds {found}, and a .safetensors file is needed: save the pipeline again with "
            "safe_serialization=True"
        )
    there = {file.name for file in files}
    wanted = _variant(_variant_of(file.name, stem) for file in files)
    variant = f".{wanted}" if wanted else ""
    whole = f"{stem}{variant}.safetensors"
    names = {whole} if whole in there else _shards(folder, stem, variant)
    if missing := names - there:
        raise InputError(f"{folder} lacks {min(missing)}, a shard of its weights: copy it again")
    return Checkpoint(folder, stem, wanted, tuple(w for n in sorted(names) for w in _weights(folder / n)))


def check_room(checkpoints: Collection[Checkpoint], scratch: Path) -> None:
    """Refuses models that a disk has no room for: every weight in float32, and one model's a second time (`widened`).

    Raises:
        TrimtabError: It has not.
    """
    needed = sum(each.float32_bytes for each in checkpoints)
    needed += max((each.float32_bytes for each in checkpoints if each.is_narrow), default=0)
    if (free := shutil.disk_usage(scratch).free) < needed:
        raise TrimtabError(
            f"the weights take {needed / 1e6:,.0f} MB in float32 while they are exported, and the disk of "
            f"{scratch.parent} has {free / 1e6:,.0f} left: make room, or choose another place"
        )


@contextlib.contextmanager
def widened(checkpoint: Checkpoint, scratch: Path | None) -> Iterator[Checkpoint]:
    """The same weights in float32, to be read from a folder that is gone after the block.

    diffusers and transformers map weights that are of the type that is asked for: the system reads them as they are
    needed, and drops them where memory is. What they convert lies in memory as a whole, 48 GB of the 12 billion
    parameters of a FLUX.1 in BF16. So it is converted here, a few of them at a time. What was mapped stays on the disk
    while it is read, whether or not it still has a name.

    Args:
        checkpoint: Of any types; without narrow ones it is given back as it is.
        scratch: A folder on the disk that `check_room` found room on; None leaves narrow ones too.

    Raises:
        InputError: They cannot be read.
        TrimtabError: The disk is full.
    """
    if scratch is None or not checkpoint.is_narrow:
        yield checkpoint
        return
    # Windows removes no file that is mapped.
    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as temporary:
        _widen(checkpoint, Path(temporary))
        yield find_checkpoint(Path(temporary), checkpoint.stem)


def _widen(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes a model's weights into a folder, in float32 and in shards, beside its configuration."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with contextlib.suppress(FileNotFoundError):  # whoever loads the model says what is missing
        shutil.copy(checkpoint.folder / "config.json", folder)
    shards = list(_in_shards(checkpoint.weights))
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{checkpoint.stem}-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {weight.name: weight.widened() for weight in shard}
        try:
            save_file(tensors, folder / name, {"format": "pt"})
        except SafetensorError as error:
            raise TrimtabError(
                f"{folder.parent.parent} cannot be written ({first_line(error)}): make room, or choose another place"
            ) from error
        index |= dict.fromkeys(tensors, name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / f"{checkpoint.stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _in_shards(weights: Iterable[Weight]) -> Iterator[list[Weight]]:
    shard: list[Weight] = []
    for weight in weights:
        if shard and sum(each.float32_bytes for each in shard) + weight.float32_bytes > _SHARD_BYTES:
            yield shard
            shard = []
        shard.append(weight)
    if shard:
        yield shard


def _shards(folder: Path, stem: str, variant: str) -> set[str]:
    """The shards that the index of a variant names (".fp16", or "" for the plain weights); none where there is none."""
    # Versions of diffusers put the variant's name before or behind "index".
    names = {f"{stem}.safetensors.index{variant}.json", f"{stem}.safetensors{variant}.index.json"}
    for path in (folder / name for name in sorted(names)):
        if path.is_file():
            try:
                return set(map(str, json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(f"{path} cannot be read ({first_line(error)}): copy it again") from None
    return set()


def _variant_of(name: str, stem: str) -> str | None:
    """The variant that a file of weights belongs to, such as "fp16" or "non_ema"; None for the plain ones."""
    return re.sub(r"-\d+-of-\d+", "", name)[len(stem) :].rpartition(".")[0][1:] or None


def _variant(found: Iterable[str | None]) -> str | None:
    """Of several variants of one model's weights the one that is read."""
    variants = set(found)
    return next(v for v in (None, "fp32", "fp16", *sorted(map(str, variants))) if v in variants)


def unread(names: Iterable[str]) -> list[str]:
    """Of a pipeline's files the weights that nothing reads: other variants, and other forms of the same."""
    weights: dict[str, list[str]] = {}
    others: list[str] = []
    for name in names:
        folder, _, file = name.rpartition("/")
        if file.endswith(".safetensors"):
            stem = next((s for s in STEMS.values() if re.match(rf"{s}[.-]", file)), None)
            (others if stem is None else weights.setdefault(f"{folder}/{stem}", [])).append(name)
    for place, found in weights.items():
        variants = {name: _variant_of(name, place) for name in found}
        wanted = _variant(variants.values())
        others += [name for name, variant in variants.items() if variant != wanted]
    return others


def _weights(file: Path) -> list[Weight]:
    """What a file says that it holds.

    Raises:
        InputError: It is no safetensors file, or shorter than it says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(min(length, size))
    try:
        entries = {key: entry for key, entry in json.loads(text).items() if key != "__metadata__"}
        found = [Weight(file, key, str(e["dtype"]), math.prod(e["shape"])) for key, e in entries.items()]
        needed = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{file} is not a safetensors file or is cut short: copy it again") from None
    if size < needed:
        raise InputError(f"{file} is cut short: {size} bytes of {needed}; copy it again")
    return found
