"""The samples do what their pages say."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trimtab
from trimtab.runtime.noise import NoiseGenerator

SAMPLE = Path(__file__).parents[1] / "samples" / "02_own_runtime"

BundleFolder = Callable[[str], Path]


def own_runtime() -> Any:
    spec = importlib.util.spec_from_file_location("own_runtime", SAMPLE / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_runtime_of_one_s_own_has_nothing_of_trimtab_in_it() -> None:
    source = (SAMPLE / "run.py").read_text()
    imports = re.findall(r"^\s*(?:from|import) (\w+)", source, re.MULTILINE)
    assert {"numpy", "onnxruntime", "tokenizers"} <= set(imports) and "trimtab" not in imports
    assert len(source.splitlines()) < 200


@pytest.mark.parametrize(
    ("family", "asked"),
    [
        ("sd15", {"prompt": "a red cat", "negative": "dog", "guidance": 5.0}),
        ("sd15", {"prompt": "a red cat", "guidance": 1.0}),
        ("dit", {"label": 3}),
        ("lcm", {"prompt": "a red cat"}),  # reads the scale, and draws noise in its steps
        ("ddpm", {}),
    ],
)
def test_given_the_same_noise_it_draws_what_trimtab_draws(
    family: str, asked: dict[str, Any], bundle_folder: BundleFolder
) -> None:
    noise = NoiseGenerator(7)
    found = own_runtime().Bundle(bundle_folder(family)).draw(noise.normal, **asked)
    given = {"negative_prompt" if name == "negative" else name: value for name, value in asked.items()}
    with trimtab.load(bundle_folder(family)) as pipe:
        np.testing.assert_allclose(found, pipe(seed=7, **given).pixels[0], atol=1e-6)


@pytest.mark.parametrize("family", ["sd15"])
def test_passes_need_not_a_line_of_it(family: str, pipeline_folder: BundleFolder, tmp_path: Path) -> None:
    trimtab.compile(
        pipeline_folder(family), tmp_path / "b", steps=6, tasks="text-to-image", inherit=2, hoist=True, vq=2
    )
    found = own_runtime().Bundle(tmp_path / "b").draw(NoiseGenerator(7).normal, prompt="a red cat")
    with trimtab.load(tmp_path / "b") as pipe:
        assert len([name for name in pipe.bundle.contents.segments if name.startswith("denoiser.")]) > 1
        np.testing.assert_allclose(found, pipe("a red cat", seed=7).pixels[0], atol=1e-5)


def test_the_commands_of_its_page_run(sample_bundle: BundleFolder, tmp_path: Path) -> None:
    page = (SAMPLE / "README.md").read_text()
    compiled, drawn = re.findall(r"^(trimtab compile .*|python samples.*)$", page, re.MULTILINE)
    assert compiled == "trimtab compile samples/01_shapes/models/shapes-sd -o shapes.bundle"
    words = shlex.split(drawn.replace("shapes.bundle", str(sample_bundle("shapes-sd"))))
    words[0], words[-1] = sys.executable, str(tmp_path / words[-1])
    done = subprocess.run(words, cwd=SAMPLE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "circle.png").is_file()
