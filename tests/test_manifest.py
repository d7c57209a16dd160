"""What bundle.json says of engines: there and back, and nothing of it believed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.bundle import open_bundle
from trimtab.calibration.draft import draft
from trimtab.manifest import Contents, Engine, SegmentEntry, from_json, to_json
from trimtab.storage import read_program

ENGINE = Engine(
    target="orin-nano-8gb",
    backend="tensorrt",
    path="engines/orin-nano-8gb/denoiser.engine",
    bytes=9,
    graph="graphs/denoiser.tensorrt-10.3.fp16.onnx",
    version="10.3.0.30",
    sm="8.7",
    precision="fp16",
    shapes={"state": (1, 1, 4, 8, 8)},
    plugins=("plugins/ours.so",),
    activation_bytes=4096,
)


def data(engine: Engine = ENGINE) -> dict[str, Any]:
    segment = SegmentEntry("denoiser", "graphs/denoiser.onnx", 1, 4, (), (), (engine,))
    contents = Contents({}, (), (), {"denoiser": segment}, (8, 8), 8, None, 1, {}, {})
    return dict(json.loads(json.dumps(to_json(contents) | {"files": []})))


@pytest.mark.parametrize(
    "engine", [ENGINE, Engine("cpu", "onnxruntime", "graphs/a.onnx", 4, "graphs/a.onnx", built=False)]
)
def test_an_engine_comes_back_as_it_was(engine: Engine) -> None:
    assert from_json(data(engine)).segments["denoiser"].engines == (engine,)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target", 1),
        ("backend", None),
        ("path", "../outside.engine"),
        ("path", "/etc/passwd"),
        ("path", "C:x.engine"),
        ("path", ""),
        ("bytes", "9"),
        ("bytes", True),
        ("graph", "engines/../../graph.onnx"),
        ("graph", None),
        ("built", 1),
        ("version", None),
        ("sm", 8.7),
        ("precision", None),
        ("shapes", {"state": [0]}),
        ("shapes", {"state": [-1, 4]}),
        ("shapes", {"state": ["batch"]}),
        ("shapes", {"state": [True]}),
        ("shapes", {"state": 4}),
        ("shapes", [1, 2]),
        ("plugins", ["../ours.so"]),
        ("plugins", [1]),
        ("plugins", None),
        ("activation_bytes", "4096"),
        ("activation_bytes", 1.5),
    ],
)
def test_a_field_that_cannot_be_is_refused(field: str, value: object) -> None:
    changed = data()
    changed["segments"][0]["engines"][0][field] = value
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        from_json(changed)


@pytest.mark.parametrize("field", sorted(vars(ENGINE)))
def test_a_field_that_is_missing_is_refused(field: str) -> None:
    changed = data()
    del changed["segments"][0]["engines"][0][field]
    with pytest.raises(KeyError):
        from_json(changed)


@pytest.mark.xdist_group("dit")
def test_the_size_that_a_model_was_trained_for_comes_back(
    bundle_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    program = read_program(open_bundle(bundle_folder("dit")))
    assert program.trained_size is None
    draft(dataclasses.replace(program, trained_size=(32, 48)), tmp_path).close()
    assert read_program(open_bundle(tmp_path)).trained_size == (32, 48)
