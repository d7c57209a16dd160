"""Weights on disk: those of half precision are mapped in float32, and no others are touched."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import trimtab
from trimtab.errors import InputError, TrimtabError
from trimtab.export import checkpoint
from trimtab.export.checkpoint import Checkpoint, find_checkpoint, widened
from trimtab.export.source import Source

Weights = dict[str, torch.Tensor]


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def encoder(folder: Path, dtype: torch.dtype = torch.float16, **options: Any) -> Weights:
    """A pipeline's text encoder in ``dtype``, on disk; its weights as they are there."""
    model = tiny.clip_text().to(dtype)
    model.save_pretrained(folder / "text_encoder", **options)
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return {name: value.detach() for name, value in model.named_parameters()}


def files_of(found: Checkpoint) -> set[Path]:
    return {weight.file for weight in found.weights}


def mapped_from(tensor: torch.Tensor) -> str:
    """The file whose bytes a tensor is, as Linux names it; empty where it is memory of the process's own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.partition("/")[2]
    raise AssertionError("the tensor lies nowhere")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_what_is_narrower_is_read_in_float32_number_for_number(
    dtype: torch.dtype, scratch: Path, tmp_path: Path
) -> None:
    stored = encoder(tmp_path, dtype)
    loaded = dict(Source(tmp_path, scratch).load("text_encoder").named_parameters())
    assert loaded.keys() == stored.keys()
    for name, value in loaded.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.detach(), stored[name].float(), rtol=0, atol=0)
    assert not list(scratch.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what is mapped on Linux alone")
@pytest.mark.parametrize(
    ("name", "library"), [("transformer", "diffusers"), ("text_encoder", "transformers")]
)
def test_it_is_mapped_and_takes_no_memory_of_the_processs_own(
    name: str,
    library: str,
    scratch: Path,
    pipeline_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(pipeline_folder("pixart_sigma"), tmp_path / "pixart"))
    (stored,) = (folder / name).glob("*.safetensors")
    save_file({key: value.half() for key, value in load_file(stored).items()}, stored, {"format": "pt"})
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 8192)
    capfd.readouterr()
    largest = max(Source(folder, scratch).load(name).parameters(), key=torch.numel)
    assert capfd.readouterr().err == ""  # neither library draws its bar of shards
    assert re.search(rf"{scratch.name}/.*-of-\d+\.safetensors \(deleted\)$", mapped_from(largest))
    largest = max(Source(folder).load(name).parameters(), key=torch.numel)
    assert mapped_from(largest) == ""


def test_shards_hold_as_much_as_memory_shall(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = encoder(tmp_path, max_shard_size="4KB")
    found = find_checkpoint(tmp_path / "text_encoder", "model")
    assert len(files_of(found)) > 2
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 8192)
    with widened(found, scratch) as read:
        sizes = [sum(value.nbytes for value in load_file(file).values()) for file in files_of(read)]
        largest = max(value.nbytes for value in stored.values()) * 2
        assert len(sizes) > 2 and max(sizes) <= max(8192, largest)
        assert sum(sizes) == sum(value.numel() * 4 for value in stored.values())
    for name, value in Source(tmp_path, scratch).load("text_encoder").named_parameters():
        torch.testing.assert_close(value.detach(), stored[name].float(), rtol=0, atol=0)


def test_whole_numbers_and_float32_stay_what_they_are(scratch: Path, tmp_path: Path) -> None:
    weights = {
        "a": torch.tensor([1.5, float("nan")], dtype=torch.float16),
        "b": torch.tensor([1 / 3], dtype=torch.float32),
        "c": torch.tensor([2**40 + 1]),
        "d": torch.tensor(True),
    }
    save_file(weights, tmp_path / "model.fp16.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with widened(find_checkpoint(tmp_path, "model"), scratch) as read:
        assert read.variant is None and (read.folder / "config.json").read_text() == "{}"
        (file,) = files_of(read)
        found = load_file(file)
    assert {name: value.dtype for name, value in found.items()} == {
        "a": torch.float32,
        "b": torch.float32,
        "c": torch.int64,
        "d": torch.bool,
    }
    for name, value in weights.items():
        torch.testing.assert_close(found[name].to(value.dtype), value, rtol=0, atol=0, equal_nan=True)


def test_float32_is_read_where_it_lies(scratch: Path, tmp_path: Path) -> None:
    encoder(tmp_path, torch.float32)
    found = find_checkpoint(tmp_path / "text_encoder", "model")
    with widened(found, scratch) as read:
        assert read is found and not list(scratch.iterdir())


@pytest.mark.parametrize(("half", "twice"), [(False, 0), (True, 1)])
def test_a_disk_without_room_is_found_before_anything_is_exported(
    half: bool,
    twice: int,
    scratch: Path,
    pipeline_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(pipeline_folder("dit"), tmp_path / "dit"))
    sizes = []
    for file in folder.rglob("*.safetensors"):
        weights = load_file(file)
        sizes.append(sum(4 * value.numel() for value in weights.values()))
        save_file({k: v.half() if half else v for k, v in weights.items()}, file, {"format": "pt"})
    needed, free = sum(sizes) + twice * max(sizes), 0
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    free = needed
    Source(folder, scratch).check_weights()
    free = needed - 1
    with pytest.raises(TrimtabError, match=r"the weights take .* MB in float32 .*: make room, or choose"):
        Source(folder, scratch).check_weights()
    told: list[str] = []
    with pytest.raises(TrimtabError, match="make room"):
        trimtab.compile(folder, tmp_path / "out" / "b", steps=2, progress=told.append)
    assert told == [] and not list((tmp_path / "out").iterdir())


def test_weights_that_cannot_be_read_are_one_line_and_nothing_is_left(scratch: Path, tmp_path: Path) -> None:
    encoder(tmp_path)
    file = tmp_path / "text_encoder" / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    file.write_bytes(
        content[:8] + content[8 : 8 + length].replace(b'"F16"', b'"F8_E"', 1) + content[8 + length :]
    )
    with pytest.raises(InputError, match=r"model\.safetensors (cannot be read|is not a safetensors file)"):
        Source(tmp_path, scratch).load("text_encoder")
    assert not list(scratch.iterdir())


@pytest.mark.xdist_group("dit")
def test_a_pipeline_in_half_precision_becomes_the_bundle_of_the_same_numbers_in_float32(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    half, single = (
        Path(shutil.copytree(pipeline_folder("dit"), tmp_path / name)) for name in ("half", "single")
    )
    for file in half.rglob("*.safetensors"):
        narrow = {key: value.half() for key, value in load_file(file).items()}
        save_file(narrow, file, {"format": "pt"})
        wide = {key: value.float() for key, value in narrow.items()}
        save_file(wide, single / file.relative_to(half), {"format": "pt"})
    bundles = [
        trimtab.compile(folder, tmp_path / f"{folder.name}.bundle", steps=2) for folder in (half, single)
    ]
    first, second = ({file.path: file.sha256 for file in bundle.contents.files} for bundle in bundles)
    assert first == second and not [path for path in first if "safetensors" in path]


def test_a_model_without_its_configuration_is_one_line(scratch: Path, tmp_path: Path) -> None:
    encoder(tmp_path)
    (tmp_path / "text_encoder" / "config.json").unlink()
    with pytest.raises(InputError, match="text_encoder cannot be loaded as CLIPTextModel"):
        Source(tmp_path, scratch).load("text_encoder")
