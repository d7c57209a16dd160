"""Bundles with packed weights: compiled, opened, run, and refused when they are too new."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import trimtab
from trimtab.bundle import Bundle, open_bundle, update_manifest
from trimtab.calibration import packing
from trimtab.calibration.codebook_plan import Settings
from trimtab.calibration.draft import draft
from trimtab.calibration.kmeans import make_codebooks
from trimtab.errors import BundleError, PassError
from trimtab.inspection import inspect
from trimtab.passes.codebooks import Codebooks
from trimtab.passes.vq import pack_weights, sites
from trimtab.program import Program
from trimtab.shapes import shape
from trimtab.storage import read_program, with_engines
from trimtab.targets.device import find_device
from trimtab.targets.engines import build_options, builder_for, specialized
from trimtab.targets.finish import build
from trimtab.targets.precision import in_precision

BundleFolder = Callable[[str], Path]


@pytest.fixture(scope="module")
def codebooks(bundle_folder: BundleFolder) -> Codebooks:
    program = read_program(trimtab.load(bundle_folder("dit")).bundle)
    return make_codebooks({"denoiser": program.segments["denoiser"].model}, Settings())


@pytest.fixture(scope="module")
def packed_folder(
    bundle_folder: BundleFolder, codebooks: Codebooks, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    program = pack_weights(read_program(trimtab.load(bundle_folder("dit")).bundle), codebooks)
    draft(program, folder).close()
    return folder


def test_inspect_says_what_was_packed_and_bytes_fall(
    bundle_folder: BundleFolder, codebooks: Codebooks, packed_folder: Path
) -> None:
    before, after = (
        next(s for s in inspect(trimtab.load(f).bundle)["segments"] if s["name"] == "denoiser")
        for f in (bundle_folder("dit"), packed_folder)
    )
    dense = sum(4 * len(layer.codes) * layer.columns for layer in codebooks.layers.values())
    small = codebooks.nbytes
    assert before["weight_bytes"] - after["weight_bytes"] == dense - small > 0
    assert before["parameters"] == after["parameters"]
    entry = inspect(trimtab.load(packed_folder).bundle)["passes"][-1]
    assert entry == {
        "name": "PackWeights",
        "segment": "denoiser",
        "applied": len(codebooks.layers),
        "refused": len(codebooks.kept),
    }


def test_a_packed_bundle_draws_what_the_decoded_weights_draw(
    bundle_folder: BundleFolder, codebooks: Codebooks, packed_folder: Path, tmp_path: Path
) -> None:
    program = read_program(trimtab.load(bundle_folder("dit")).bundle)
    for site in list(sites(program.segments["denoiser"].model)):
        if site.name in codebooks.layers:
            decoded = site.laid_out(codebooks.layers[site.name].rows())
            site.value.const_value = ir.Tensor(decoded, name=site.name)
    options: dict[str, Any] = {"label": 1, "seed": 0, "schedule": 3}
    with draft(program, tmp_path) as dense:
        expected = dense(**options).pixels
    for fast in (False, True):
        with trimtab.load(packed_folder, fast=fast) as pipe:
            assert np.abs(pipe(**options).pixels - expected).max() <= 1e-5


@pytest.mark.parametrize("fast", [False, True])
def test_weights_are_decoded_at_load_where_it_is_to_be_fast_and_nowhere_else(
    packed_folder: Path, codebooks: Codebooks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fast: bool
) -> None:
    """What ONNX Runtime makes of the graph at load is looked at: codes that are left are decoded at every run."""

    def keeping(graph: Path, options: Any, **more: Any) -> Any:
        options.optimized_model_filepath = str(tmp_path / graph.name)
        return session(graph, options, **more)

    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", keeping)
    with trimtab.load(packed_folder, fast=fast) as pipe:
        pipe(label=1, seed=0, schedule=3)
    (made,) = tmp_path.glob("denoiser*.onnx")
    codes = [name for name in ir.load(made).graph.initializers if name.endswith(".codes")]
    assert len(codes) == (0 if fast else len(codebooks.layers))


def test_a_lowered_graph_holds_nothing_that_it_does_not_read(packed_folder: Path) -> None:
    """Its size says what an engine loads: a weight in pieces was counted whole beside them."""
    engine = trimtab.load(packed_folder).bundle.contents.segments["denoiser"].engines[0]
    graph = ir.load(packed_folder / engine.path).graph
    assert engine.packed and [n for n, value in graph.initializers.items() if not value.uses()] == []


def test_a_bundle_with_newer_operators_is_refused_when_it_is_opened(
    packed_folder: Path, tmp_path: Path
) -> None:
    manifest = json.loads((packed_folder / "bundle.json").read_text())
    segment = next(s for s in manifest["segments"] if s["name"] == "denoiser")
    assert segment["domains"] == {"trimtab": 1}
    segment["domains"]["trimtab"] = 2
    text = json.dumps(manifest).encode()
    (tmp_path / "bundle.json").write_bytes(text)
    (tmp_path / "bundle.sha256").write_text(hashlib.sha256(text).hexdigest())
    with pytest.raises(
        BundleError, match="denoiser has version 2 of trimtab's operators and this trimtab knows 1"
    ):
        trimtab.load(tmp_path)


def _weight_file(bundle: Bundle) -> int:
    return next(f.bytes for f in bundle.contents.files if f.path == "graphs/denoiser.weights")


def test_compile_packs_on_request(
    pipeline_folder: Callable[[str], Path], bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    from trimtab.cli import main

    output = tmp_path / "small.bundle"
    rule = ["--vq-rule", "transformer_blocks.0.attn1.*=keep"]
    books = tmp_path / "books"
    store = ["--vq-minutes", "0.05", "--vq-codebooks", str(books)]
    arguments = ["compile", str(pipeline_folder("dit")), "--vq", "3", *rule, *store, "--steps", "3"]
    arguments += ["-o", str(output)]
    assert main(arguments) == 0
    bundle = trimtab.load(output).bundle
    (entry,) = [p for p in bundle.contents.passes if p.name == "PackWeights"]
    assert entry.applied > 0 and bundle.contents.segments["denoiser"].domains == {"trimtab": 1}
    assert (books / "calibrated" / "parameters").is_file()
    kept = read_program(bundle).segments["denoiser"].model.graph.initializers
    assert "transformer_blocks.0.attn1.to_q.weight.T" in kept
    dense = trimtab.load(bundle_folder("dit")).bundle
    assert _weight_file(bundle) < _weight_file(dense), "the file still holds what was packed"
    with trimtab.load(output) as pipe:
        assert np.isfinite(pipe(label=1, seed=0).pixels).all()


def test_a_jetson_s_bundle_holds_the_graphs_that_it_builds_from_and_none_that_calibration_ran(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("cuda.bindings")
    options: dict[str, Any] = {"targets": "orin-nano-8gb", "vq": 2, "precision": "fp16", "steps": 2}
    bundle = trimtab.compile(pipeline_folder("dit"), tmp_path / "b", **options, cache=None)
    bundle.verify()
    graphs = {file.path for file in bundle.contents.files if file.path.endswith(".onnx")}
    segments = bundle.contents.segments.values()
    lowered = {engine.path for segment in segments for engine in segment.engines}
    open_forms = {segment.graph for segment in segments} | {
        segment.graph.replace(".onnx", ".fp16.onnx") for segment in segments
    }
    assert graphs == lowered | open_forms


@pytest.mark.xdist_group("ddpm")
def test_a_model_that_is_asked_for_nothing_is_calibrated(bundle_folder: BundleFolder, tmp_path: Path) -> None:
    program = read_program(open_bundle(bundle_folder("ddpm")))
    told: list[str] = []
    done = packing.packed(program, Settings(), tmp_path, minutes=0.02, progress=told.append)
    assert any(line.startswith("assigned ") for line in told)
    assert any(entry.name == "PackWeights" and entry.applied for entry in done.passes)


@pytest.mark.xdist_group("ddpm")
def test_what_torch_cannot_train_is_refused_before_k_means(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    program = read_program(open_bundle(bundle_folder("ddpm")))
    (model,) = (s.model for name, s in program.segments.items() if name.startswith("denoiser"))
    next(node for node in model.graph if node.op_type == "Sigmoid").op_type = "Mish"
    told: list[str] = []
    with pytest.raises(PassError, match="Mish cannot be run by torch"):
        packing.packed(program, Settings(), tmp_path, minutes=0.02, progress=told.append)
    assert not told, "work was done before"


def test_build_makes_the_form_for_onnxruntime_where_it_is_missing(
    packed_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(packed_folder, tmp_path / "b"))
    whole = open_bundle(folder).contents
    (engine,) = whole.segments["denoiser"].engines
    assert engine.path != engine.graph and engine.packed
    (folder / engine.path).unlink()
    bare = with_engines(
        dataclasses.replace(whole, files=tuple(f for f in whole.files if f.path != engine.path)),
        {
            name: [dataclasses.replace(e, path=e.graph, built=False) for e in segment.engines]
            for name, segment in whole.segments.items()
        },
    )
    update_manifest(folder, bare)
    report = build(folder, cache=None)
    assert {made.segment for made in report.made} == set(whole.segments)
    bundle = open_bundle(folder)
    bundle.verify()
    assert bundle.contents.segments["denoiser"].engines == (engine,)
    options: dict[str, Any] = {"label": 1, "seed": 0, "schedule": 3}
    with trimtab.load(folder) as ours, trimtab.load(packed_folder) as theirs:
        assert np.array_equal(ours(**options).pixels, theirs(**options).pixels)


@pytest.fixture(scope="module")
def packed(bundle_folder: BundleFolder, codebooks: Codebooks) -> Program:
    """Packed, its blocks' embedders equal as in the published DiT."""
    program = read_program(trimtab.load(bundle_folder("dit")).bundle)
    weights = program.segments["denoiser"].model.graph.initializers
    for name in [name for name in weights if ".norm1.emb." in name]:
        first = weights[re.sub(r"blocks\.\d+", "blocks.0", name)].const_value
        assert first is not None
        weights[name].const_value = ir.Tensor(first.numpy(), name=name)
    return pack_weights(program, codebooks)


@pytest.fixture(scope="module")
def in_fp16(packed: Program) -> Program:
    return in_precision(packed, "fp16", {name: {} for name in packed.segments})


def test_packed_weights_in_fp16_draw_what_they_draw_in_fp32(
    packed: Program, in_fp16: Program, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"label": 1, "seed": 0, "schedule": 3}
    with draft(packed, tmp_path / "fp32") as pipe:
        expected = pipe(**options).pixels
    draft(in_fp16, tmp_path / "fp16").close()
    for fast in (False, True):
        with trimtab.load(tmp_path / "fp16", fast=fast) as pipe:
            assert np.abs(pipe(**options).pixels - expected).max() <= 2 / 255


def test_a_jetson_s_kernels_and_an_rtx_s_engine_keep_weights_packed_and_embedders_once(
    in_fp16: Program, codebooks: Codebooks, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("tensorrt_rtx")
    model = in_fp16.segments["denoiser"].model
    sizes = {"batch": 1, "rows": 2}
    shapes = {
        value.name: shape([d if isinstance(d, int) else str(d.value) for d in value.shape], sizes)
        for value in model.graph.inputs
    }
    fixed = specialized(model, shapes)
    for name in ("orin-nano-8gb", "rtx-4090"):
        device = find_device(name)
        builder = builder_for(device)
        lowered = builder.lower(fixed, device)
        embedders = [n for n in lowered.graph.initializers if n.endswith("timestep_embedder.linear_1.weight")]
        assert len(embedders) == 1
        nodes = [node.op_type for node in lowered.graph if node.domain == "trimtab"]
        assert nodes == (["TrimtabVQMatMul1"] * len(codebooks.layers) if name == "orin-nano-8gb" else [])
    options = build_options(device, shapes, "fp16", packed=True)
    builder.build(lowered, device, options, tmp_path / "engine", lambda text: None)
    engine = (tmp_path / "engine").read_bytes()
    for layer in codebooks.layers.values():
        assert (layer.codes.astype(np.int16) - 128).astype(np.int8).tobytes() in engine


def cpu_target(folder: Path) -> Path:
    """A file with a device like the CPU by another name."""
    file = folder / "devices.toml"
    file.write_text('[desk]\ntitle = "a desk\'s CPU"\nbackend = "onnxruntime"\n')
    return file


def test_another_cpu_s_engine_is_the_one_that_is_there(packed_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed_folder, tmp_path / "b"))
    before = {path: path.read_bytes() for path in (folder / "graphs").iterdir()}
    build(folder, ["desk"], device_file=cpu_target(tmp_path), cache=None)
    open_bundle(folder).verify()
    first, second = open_bundle(folder).contents.segments["denoiser"].engines
    assert (second.target, second.path, second.built) == ("desk", first.path, True)
    assert {path: path.read_bytes() for path in (folder / "graphs").iterdir()} == before


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"another")])
def test_a_form_for_the_cpu_that_is_missing_or_damaged_is_made_again(
    packed_folder: Path, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    folder = Path(shutil.copytree(packed_folder, tmp_path / "b"))
    (engine,) = open_bundle(folder).contents.segments["denoiser"].engines
    whole = (folder / engine.path).read_bytes()
    damage(folder / engine.path)
    report = build(folder, cache=None)
    assert [(made.segment, made.reason) for made in report.made] == [
        ("denoiser", "its file was missing or damaged")
    ]
    open_bundle(folder).verify()
    assert (folder / engine.path).read_bytes() == whole
    assert not build(folder, cache=None).made
