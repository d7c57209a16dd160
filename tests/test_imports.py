"""What is imported when: the runtime without torch, and the command line at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab
from trimtab.runtime.sessions.check import EXTRAS
from trimtab.toml_file import read_toml

ROOT = Path(trimtab.__file__).parent
HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "tensorrt", "scipy")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "module", ["trimtab", "trimtab.cli", "trimtab.runtime.load", "trimtab.bundle", "trimtab.runtime.bench"]
)
def test_the_runtime_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(sorted(set({HEAVY!r}) & sys.modules.keys()))"
    assert run(code) == "[]\n"


@pytest.mark.parametrize("module", ["trimtab.child", "trimtab.targets.worker", "trimtab.targets.plugins.qdp"])
def test_what_builds_an_engine_leaves_the_memory_to_tensorrt(module: str) -> None:
    code = f"import sys, {module}; print(sorted(set({HEAVY!r}) & sys.modules.keys()))"
    assert run(code) == "[]\n"


def test_a_bundle_runs_where_nothing_of_the_compiler_is_installed(bundle_folder: object) -> None:
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import trimtab
print(trimtab.load({str(bundle_folder("dit"))!r})(label=1, seed=0, schedule=3).images[0].size)  # type: ignore
"""
    assert run(code) == "(64, 64)\n"


def test_without_the_compile_extra_the_command_line_names_it() -> None:
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx_ir", "diffusers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from trimtab.cli import main
print(main(["compile", "x", "-o", "y"]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "1\n" and "pip install 'trimtab[compile]'" in done.stderr


@pytest.mark.parametrize("extra", [*EXTRAS.values(), "jetson"])
def test_an_extra_that_builds_engines_brings_what_fixes_their_sizes(extra: str) -> None:
    extras = read_toml(ROOT.parent / "pyproject.toml")["project"]["optional-dependencies"]
    assert any(package.startswith("onnxscript") for package in extras[extra])


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_module_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_where_engines_are_kept_is_said_once() -> None:
    home = ".cache/trimtab"
    assert [p.name for p in ROOT.rglob("*.py") if home in p.read_text()] == ["place.py"]


STAGES: dict[str, set[str]] = {
    "runtime": set(),
    "passes": set(),
    "export": {"passes"},
    "targets": {"passes", "runtime"},
    "calibration": {"passes", "targets", "runtime"},
}
"""Stage -> those that it may import."""


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_only_those_below_it(stage: str) -> None:
    for path in sorted((ROOT / stage).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        imported = {name.split(".")[1] for name in names if name.startswith("trimtab.")} & STAGES.keys()
        assert imported <= {stage, *STAGES[stage]}, path
