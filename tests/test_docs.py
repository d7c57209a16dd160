"""The README and the documentation say what is so."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import pytest

from trimtab.cli import _parser
from trimtab.recipe import Recipe

ROOT = Path(__file__).parent.parent
SOURCES = ("trimtab", "benchmarks", "tests", "samples")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("samples/*/README.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def commands() -> dict[str, argparse.ArgumentParser]:
    """Name of every command -> its options."""
    return next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


@pytest.mark.parametrize("command", commands())
def test_every_command_is_in_the_changelog(command: str) -> None:
    assert re.search(rf"`(trimtab )?{command}`", (ROOT / "CHANGELOG.md").read_text())


def test_every_option_is_in_the_documentation() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    options = {
        option
        for command in commands().values()
        for action in command._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    assert [option for option in sorted(options) if not re.search(rf"{option}(?![\w-])", text)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_source_file_that_a_page_names_is_there(page: Path) -> None:
    """Whole, or from any folder on: `passes/inherit.py`, `few_rows.cu`."""
    quoted = " ".join(re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)))
    for name in re.findall(r"[\w/]+\.(?:py|cu|cpp|cuh)\b", quoted):
        assert any(list((ROOT / place).rglob(name)) for place in SOURCES) or (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_option_of_a_benchmark_that_a_page_names_is_one(page: Path) -> None:
    for script, rest in re.findall(r"(benchmarks/\w+\.py)([^`|]*)`", page.read_text()):
        source = (ROOT / script).read_text()
        for option in re.findall(r"--[a-z][\w-]*", rest):
            assert f'"{option}"' in source, f"{script} has no {option}"


def test_every_key_of_a_recipe_is_on_its_page() -> None:
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs" / "recipe.md").read_text(), re.MULTILINE)
    keys = [key for row in rows for key in re.findall(r"`(\w+)`", row)]
    assert sorted(keys) == sorted(field.name for field in dataclasses.fields(Recipe))
