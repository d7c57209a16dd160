"""A bundle is untrusted input: whatever is wrong with it is found before anything is made of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trimtab
from trimtab.bundle import DIGEST, MANIFEST, open_bundle, update_manifest, write_manifest
from trimtab.cli import main
from trimtab.errors import BundleError, InputError, TargetError, WrongDevice
from trimtab.inspection import inspect
from trimtab.manifest import REMOVAL_PLAN, SCHEMA
from trimtab.storage import read_program

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


def seal(folder: Path, path: str) -> None:
    """Gives a changed file the hash of what it is now."""

    def change(data: dict[str, Any]) -> None:
        content = (folder / path).read_bytes()
        entry = next(file for file in data["files"] if file["path"] == path)
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    rewrite(folder, change)


def _constants(data: dict[str, Any]) -> dict[str, Any]:
    constants: dict[str, Any] = data["tasks"][0]["schedules"][1]["steps"][0]["constants"]
    return constants


def _segment(data: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in data["segments"] if entry["name"] == name)
    return found


def _input(data: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(i for i in _segment(data, "denoiser")["inputs"] if i["name"] == name)
    return found


def _source(data: dict[str, Any], kind: str) -> dict[str, Any]:
    sources = [spec.get("source", {}) for spec in data["tasks"][0]["inputs"]]
    return next(source for source in sources if source.get("kind") == kind)


_PLAN = {
    "removed": ["a"],
    "method": "random",
    "measure": "time",
    "reached": 0.3,
    "joint_loss": 1e-3,
    "predicted_loss": 1e-3,
    "rank_correlation": 0.5,
    "details": {"device": "rtx-4090", "random_sets": 16},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"removed": 3}, "removed is 3 and must be a list"),
        ({"removed": ["a", 3]}, "removed.1. is 3 and must be a text"),
        ({"method": None}, "method is None and must be a text"),
        ({"method": "\x1b[2J"}, r"method is '\\x1b\[2J' and must be a line of text"),
        ({"removed": ["a\nb"]}, r"removed\[0\] is 'a\\nb' and must be a line of text"),
        ({"reached": "much"}, "reached is 'much' and must be a number"),
        ({"joint_loss": [1]}, "joint_loss is .1. and must be a number"),
        ({"predicted_loss": None}, "one is missing"),
        ({"details": {"device": "rtx-4090"}}, "details.random_sets is None and must be a whole number"),
        ({"details": {"random_sets": 16}}, "details.device is None and must be a text"),
    ],
)
def test_a_removal_plan_of_other_keys_or_types_is_one_line(
    changes: dict[str, Any], message: str, copied_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied_bundle / REMOVAL_PLAN

    def add(data: dict[str, Any]) -> None:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        data["files"] = [
            *(file for file in data["files"] if file["path"] != REMOVAL_PLAN),
            {"path": REMOVAL_PLAN, "bytes": len(content), "sha256": digest},
        ]

    path.write_text(json.dumps(_PLAN))
    rewrite(copied_bundle, add)
    assert main(["inspect", str(copied_bundle)]) == 0
    assert "removed 1 layers by random: 30.0% of time on rtx-4090" in capsys.readouterr().out
    path.write_text(json.dumps(_PLAN | changes))
    rewrite(copied_bundle, add)
    with pytest.raises(BundleError, match=message):
        inspect(open_bundle(copied_bundle))


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


def test_a_changed_file_is_the_reason_where_something_fails_while_it_is_hashed(copied_bundle: Path) -> None:
    path = next((copied_bundle / "graphs").glob("*.weights"))
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    bundle = open_bundle(copied_bundle)
    name = path.relative_to(copied_bundle).as_posix()
    with pytest.raises(BundleError, match="was changed"), bundle.verifying([name]):
        raise ValueError("made of wrong numbers")
    with pytest.raises(BundleError, match="was changed"):  # nor is it taken for verified since
        bundle.path(name)


def test_a_cut_file_is_found_before_anything_is_made_of_it(copied_bundle: Path) -> None:
    path = next((copied_bundle / "graphs").glob("*.weights"))
    path.write_bytes(path.read_bytes()[:-1])
    made = []
    with (
        pytest.raises(BundleError, match="bytes"),
        open_bundle(copied_bundle).verifying([path.relative_to(copied_bundle).as_posix()]),
    ):
        made.append("a session")
    assert not made


def test_a_name_that_no_system_takes_is_refused(copied_bundle: Path) -> None:
    rewrite(copied_bundle, lambda d: d["files"][0].update(path="a" * 300))
    with pytest.raises(BundleError, match="cannot be read") as error:
        open_bundle(copied_bundle).verify()
    assert len(str(error.value)) < 1000


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
    seal(copied_bundle, "graphs/denoiser.onnx")
    with pytest.raises(BundleError, match=r"/stolen.weights is not in the list of files"):
        draw(copied_bundle)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "unlisted.weights", "not in the list"),
        ("location", "/etc/passwd", "not in the list"),
        ("location", "../../stolen.weights", "not in the list"),
        ("offset", str(2**40), "beyond the end"),
        ("offset", "-64", "cannot be read as a graph"),
        ("offset", "many", "cannot be read as a graph"),
    ],
)
def test_weights_that_are_none_of_the_bundle_s_are_refused_where_graphs_are_read(
    copied_bundle: Path, key: str, value: str, message: str
) -> None:
    import onnx

    path = copied_bundle / "graphs" / "denoiser.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    kept = [entry for entry in tensor.external_data if entry.key != key]
    del tensor.external_data[:]
    tensor.external_data.extend([*kept, onnx.StringStringEntryProto(key=key, value=value)])
    path.write_bytes(model.SerializeToString())
    seal(copied_bundle, "graphs/denoiser.onnx")
    with pytest.raises(BundleError, match=message):
        read_program(open_bundle(copied_bundle))


@pytest.mark.parametrize("place", ["function", "branch of a function", "default of a function", "list"])
def test_a_file_that_a_graph_names_is_refused_wherever_in_it_its_name_stands(
    copied_bundle: Path, tmp_path: Path, place: str
) -> None:
    import onnx
    from onnx import helper

    secret = tmp_path / "secret"
    secret.write_bytes(bytes(16))
    tensor = onnx.TensorProto(name="t", data_type=onnx.TensorProto.FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=str(secret))
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    if place == "branch of a function":
        branch = helper.make_graph([constant], "branch", [], [])
        constant = helper.make_node("If", ["x"], ["c"], then_branch=branch, else_branch=branch)
    path = copied_bundle / "graphs" / "denoiser.onnx"
    model = onnx.load(path, load_external_data=False)
    if place == "list":
        model.graph.node.append(helper.make_node("Odd", [], ["c"], "odd", tensors=[tensor]))
    else:
        function = model.functions.add(name="Read", domain="odd", output=["c"])
        if place == "default of a function":
            function.attribute_proto.append(helper.make_attribute("value", tensor))
            constant = helper.make_node("Constant", [], ["c"], value_float=0.0)
        function.node.append(constant)
    path.write_bytes(model.SerializeToString())
    seal(copied_bundle, "graphs/denoiser.onnx")
    with pytest.raises(BundleError, match=r"secret is not in the list of files"):
        read_program(open_bundle(copied_bundle))


def test_what_could_not_be_read_back_does_not_take_a_bundle_s_place(copied_bundle: Path) -> None:
    contents = open_bundle(copied_bundle).contents
    for write in (write_manifest, update_manifest):
        with pytest.raises(TypeError, match="'8' is not int"):
            write(copied_bundle, dataclasses.replace(contents, size_multiple="8"))  # type: ignore[arg-type]
    assert open_bundle(copied_bundle).contents == contents


def test_weights_of_two_names_are_refused_where_graphs_are_read_and_draw_all_the_same(
    copied_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "backup").hardlink_to(copied_bundle / "graphs" / "denoiser.weights")
    with pytest.raises(BundleError, match="has another name"):
        read_program(open_bundle(copied_bundle))
    draw(copied_bundle)


@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_graph_that_is_none_is_refused_where_graphs_are_read(copied_bundle: Path, keep: float) -> None:
    path = copied_bundle / "graphs" / "denoiser.onnx"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    seal(copied_bundle, "graphs/denoiser.onnx")
    with pytest.raises(BundleError, match=r"is not the graph|cannot be read as a graph"):
        read_program(open_bundle(copied_bundle))


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
        lambda d: d.update(size=[0, 64]),
        lambda d: d.update(size=[-8, 64]),
        lambda d: d.update(trained_size=[]),
        lambda d: d.update(trained_size=[64]),
        lambda d: d.update(size_multiple=0),
        lambda d: d.update(largest_side=0),
        lambda d: d.update(largest_side="64"),
        lambda d: d.update(slots=-1),
        lambda d: d.update(slots=10**400),
        lambda d: d.update(outputs=[]),
        lambda d: d.update(tasks=[]),
        lambda d: d.update(epilogue=[]),
        lambda d: d["metadata"].update(pipeline="\x1b[2J"),
        lambda d: d["metadata"].update(pipeline="a\nb"),
        lambda d: d["outputs"][0].update(name="nothing"),
        lambda d: d["segments"].append(d["segments"][0]),
        lambda d: d["segments"][0].update(weight_bytes=10**400),
        lambda d: d["segments"][0]["inputs"][0].update(dtype="object"),
        lambda d: d["segments"][0]["inputs"][0].update(dtype="U999999999"),
        lambda d: d["segments"][0]["outputs"][0].update(dtype=[]),
        lambda d: d["segments"][0]["outputs"][0].update(shape=[-1]),
        lambda d: d["segments"][0]["outputs"][0].update(shape=["batch - 9"]),
        lambda d: d["segments"][0]["outputs"][0].update(shape=["Max()"]),
        lambda d: d["segments"][0]["outputs"][0].update(shape=["FloorDiv(1, 0)"]),
        lambda d: d["segments"][0]["outputs"][0].update(shape=["-" * 990 + "1"]),
        lambda d: d["segments"][0]["outputs"][0].update(shape=["1" + "+1" * 9999]),
        lambda d: d["segments"][0]["engines"][0].update(shapes={"state": [2]}),
        lambda d: d["segments"][0]["engines"][0].update(path="graphs/denoiser.weights"),
        lambda d: d["segments"][0]["engines"][0].update(shapes={"nothing": [2]}),
        lambda d: d["tasks"].append(d["tasks"][0]),
        lambda d: d["tasks"][0].update(schedules=[]),
        lambda d: d["tasks"][0].update(guidance=float("nan")),
        lambda d: d["tasks"][0].update(guidance=10**400),
        lambda d: d["tasks"][0].update(strength="1"),
        lambda d: [s.update(least_pixels=2**62) for s in d["tasks"][0]["schedules"]],
        lambda d: _constants(d).update(timestep=[float("inf")]),
        lambda d: _constants(d).update(timestep=[1e39]),
        lambda d: _input(d, "timestep").update(dtype="uint8"),  # 666
        lambda d: _segment(d, "vae_decoder")["outputs"][0].update(shape=[]),
        lambda d: _source(d, "label").pop("classes"),
        lambda d: _source(d, "label").update(classes=float("inf")),
        lambda d: _source(d, "label").update(null=10**400),
        lambda d: _source(d, "label").update(names="[" * 9999),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(copied_bundle: Path, change: Any) -> None:
    rewrite(copied_bundle, change)
    with pytest.raises(BundleError) as error:
        draw(copied_bundle)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_a_size_that_no_memory_holds_is_one_line(copied_bundle: Path) -> None:
    rewrite(copied_bundle, lambda d: d.update(slots=2**62))
    with pytest.raises(TargetError, match="no memory for a tensor"):
        draw(copied_bundle)


@pytest.mark.parametrize("name", [MANIFEST, DIGEST])
def test_a_seal_that_lies_outside_of_the_folder_is_refused(
    copied_bundle: Path, tmp_path: Path, name: str
) -> None:
    outside = shutil.move(copied_bundle / name, tmp_path / name)
    (copied_bundle / name).symlink_to(outside)
    with pytest.raises(BundleError, match="leads out"):
        open_bundle(copied_bundle)


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


@pytest.mark.parametrize("targets", [["orin-nano-8gb"], ["orin-nano-8gb", "agx-thor"]])
def test_what_a_device_has_still_to_build_is_said_once_for_each_target(
    targets: list[str], copied_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(data: dict[str, Any]) -> None:
        for segment in data["segments"]:
            (engine,) = segment["engines"]
            segment["engines"] = [
                engine | {"target": name, "backend": "tensorrt", "built": False} for name in targets
            ]

    rewrite(copied_bundle, change)
    assert main(["run", str(copied_bundle), "--class", "1", "-o", "x.png"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("no engines that this machine can run" in said) == (len(targets) > 1)
    for name in targets:
        assert said.count(f"has no engine of denoiser for {name} yet: run trimtab build") == 1
