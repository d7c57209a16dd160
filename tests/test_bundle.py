"""A bundle is untrusted input: whatever is wrong with it is found before anything is made of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trimtab
from trimtab.bundle import DIGEST, MANIFEST, open_bundle
from trimtab.errors import BundleError, InputError, WrongDevice
from trimtab.manifest import SCHEMA

pytestmark = pytest.mark.xdist_group("dit")


def draw(folder: Path) -> trimtab.Result:
    with trimtab.load(folder) as pipe:
        return pipe(label=1, seed=0, schedule=3)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edits bundle.json and seals it again, as somebody who means harm would."""
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    text = json.dumps(data).encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / DIGEST).write_text(hashlib.sha256(text).hexdigest())


def test_an_untouched_copy_draws_the_same_picture(
    copied_bundle: Path, bundle_folder: Callable[[str], Path]
) -> None:
    assert (draw(copied_bundle).pixels == draw(bundle_folder("dit")).pixels).all()


def test_every_file_but_the_two_seals_is_listed_with_its_hash(copied_bundle: Path) -> None:
    listed = {file.path: file for file in open_bundle(copied_bundle).contents.files}
    found = {p.relative_to(copied_bundle).as_posix() for p in copied_bundle.rglob("*") if p.is_file()}
    assert found == set(listed) | {MANIFEST, DIGEST}
    for path, file in listed.items():
        assert hashlib.sha256((copied_bundle / path).read_bytes()).hexdigest() == file.sha256


def test_every_weight_stands_in_the_bundle_once(bundle_folder: Callable[[str], Path]) -> None:
    bundle = open_bundle(bundle_folder("dit"))
    stored = sum(f.bytes for f in bundle.contents.files if f.path.endswith(".weights"))
    weights = sum(segment.weight_bytes for segment in bundle.contents.segments.values())
    assert stored <= 1.02 * weights


@pytest.mark.parametrize("where", [0, 0.5, 0.999])
def test_a_changed_byte_in_any_file_is_found(copied_bundle: Path, where: float) -> None:
    for path in sorted(p for p in copied_bundle.rglob("*") if p.is_file()):
        original = path.read_bytes()
        index = int(where * len(original))
        path.write_bytes(original[:index] + bytes([original[index] ^ 1]) + original[index + 1 :])
        with pytest.raises(BundleError):
            draw(copied_bundle)
            open_bundle(copied_bundle).verify()
        path.write_bytes(original)
    draw(copied_bundle)


def test_a_missing_file_is_found(copied_bundle: Path) -> None:
    for path in sorted(p for p in copied_bundle.rglob("*") if p.is_file()):
        aside = path.rename(path.with_suffix(".aside"))
        with pytest.raises(BundleError, match=r"missing|holds no"):
            draw(copied_bundle)
        aside.rename(path)


def test_a_cut_file_is_found(copied_bundle: Path) -> None:
    path = next((copied_bundle / "graphs").glob("*.weights"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match="bytes"):
        draw(copied_bundle)


def test_a_newer_schema_asks_for_a_newer_trimtab(copied_bundle: Path) -> None:
    rewrite(copied_bundle, lambda data: data.update(schema=SCHEMA + 1))
    with pytest.raises(BundleError, match="upgrade trimtab"):
        open_bundle(copied_bundle)


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "graphs/../../outside", "a\\b", "C:x", "", "x\0y"]
)
@pytest.mark.parametrize("field", ["files", "engines", "graph"])
def test_a_path_that_leaves_the_folder_is_refused(copied_bundle: Path, field: str, path: str) -> None:
    def change(data: dict[str, Any]) -> None:
        if field == "files":
            data["files"][0]["path"] = path
        elif field == "engines":
            data["segments"][0]["engines"][0]["path"] = path
        else:
            data["segments"][0]["graph"] = path

    rewrite(copied_bundle, change)
    with pytest.raises(BundleError, match="leaves the bundle"):
        open_bundle(copied_bundle)


def test_a_link_that_leaves_the_folder_is_refused(copied_bundle: Path, tmp_path: Path) -> None:
    inside = copied_bundle / "graphs" / "denoiser.onnx"
    outside = shutil.move(inside, tmp_path / "outside.onnx")
    inside.symlink_to(outside)
    with pytest.raises(BundleError, match="leads out"):
        draw(copied_bundle)


def test_weights_that_lie_outside_of_the_folder_are_refused(copied_bundle: Path, tmp_path: Path) -> None:
    import onnx

    path = copied_bundle / "graphs" / "denoiser.onnx"
    model = onnx.load(path, load_external_data=False)
    shutil.copy(copied_bundle / "graphs" / "denoiser.weights", tmp_path / "stolen.weights")
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../stolen.weights"
    path.write_bytes(model.SerializeToString())

    def change(data: dict[str, Any]) -> None:
        for file in data["files"]:
            if file["path"].endswith("denoiser.onnx"):
                file.update(bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())

    rewrite(copied_bundle, change)
    with pytest.raises(BundleError, match="cannot be loaded"):
        draw(copied_bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("tasks"),
        lambda d: d.update(slots="many"),
        lambda d: d["calls"][0].update(segment="nobody"),
        lambda d: d["calls"][0]["inputs"].pop("state"),
        lambda d: d["tasks"][0]["inputs"][0].update(shape=["__import__('os')"]),
        lambda d: d["tasks"][0]["inputs"][1].update(source={"kind": "telepathy"}),
        lambda d: d["tasks"][0]["schedules"][0]["steps"][0].update(calls=[99]),
        lambda d: d["tasks"][0]["inputs"].pop(),
        lambda d: d["segments"][0]["outputs"][0].update(dtype="float16"),
        lambda d: d.update(files=[]),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(copied_bundle: Path, change: Any) -> None:
    rewrite(copied_bundle, change)
    with pytest.raises(BundleError):
        draw(copied_bundle)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"schema": null}', b'{"schema": true}', b"\xff\xfe", b"[" * 9999]
)
def test_a_manifest_that_is_no_manifest_is_refused(copied_bundle: Path, text: bytes) -> None:
    (copied_bundle / MANIFEST).write_bytes(text)
    (copied_bundle / DIGEST).write_text(hashlib.sha256(text).hexdigest())
    with pytest.raises(BundleError, match="damaged"):
        open_bundle(copied_bundle)


def test_a_folder_that_is_no_bundle_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="trimtab compile"):
        trimtab.load(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        trimtab.load(tmp_path / "nothing")


def test_a_target_that_was_not_compiled_for_is_named(copied_bundle: Path) -> None:
    with pytest.raises(WrongDevice, match="it has cpu"):
        trimtab.load(copied_bundle, target="rtx-4090")
