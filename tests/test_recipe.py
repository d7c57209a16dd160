"""Recipes: from keywords and from TOML, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import InputError
from trimtab.recipe import Recipe, make_recipe, parse_size
from trimtab.toml_file import read_toml


def test_loose_values_become_a_recipe() -> None:
    recipe = make_recipe({"steps": 4, "targets": ["cpu"], "size": "64x32", "scheduler": None})
    assert recipe == Recipe(targets=("cpu",), steps=(4,), size=(64, 32))


def test_a_toml_file_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('steps = [20, 4]\nscheduler = "dpm++"\nsize = [64, 32]\n')
    assert make_recipe(read_toml(path)) == Recipe(steps=(20, 4), scheduler="dpm++", size=(64, 32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 4}, "no 'step'"),
        ({"steps": []}, "from 1"),
        ({"steps": [0]}, "from 1"),
        ({"steps": "many"}, "from 1"),
        ({"steps": [4, 4]}, "twice"),
        ({"targets": []}, "at least one"),
        ({"tasks": ["painting"]}, "there is no task painting: choose of text-to-image, class-to-image"),
        ({"tasks": [1]}, "a text is needed"),
        ({"tasks": ["editing", "editing"]}, "a task is given twice"),
        ({"size": "64"}, "WIDTHxHEIGHT"),
        ({"size": [64, -1]}, "not a width"),
        ({"size": [64]}, "not a width"),
        ({"precision": "fp4"}, "fp4"),
        ({"eta": 2}, "0 to 1"),
        ({"guidance": "much"}, "a number is needed"),
        ({"guidance": float("nan")}, "the guidance scale nan is not a finite number"),
        ({"remove": 0.3, "remove_by": "luck"}, "no method luck: choose one of output-loss,"),
        ({"remove_by": "random"}, "how to choose is given, and no share to remove"),
        ({"drifts": "file", "inherit": 2}, "no plan of inheritance asks for a speed"),
        ({"vq": 2, "vq_minutes": 0}, "more than 0 are needed"),
        ({"eta": "much"}, "eta = 'much' in a recipe: a number"),
        ({"eta": True}, "a number is needed"),
        ({"remove": "0.3"}, "a number is needed"),
        ({"hidiffusion": "no"}, "true or false is needed"),
        ({"hidiffusion": 1}, "true or false is needed"),
        ({"vq": 2, "vq_scale": "no"}, "true or false is needed"),
        ({"vq": 2, "vq_codebooks": 3}, "a path is needed"),
        ({"vq": 2.0}, "2, 3 or 4 is needed"),
        ({"vq": 2, "vq_rules": 3}, "PATTERN=BITS"),
        ({"vq": 2, "vq_rules": [["a", 2, 3]]}, "PATTERN=BITS"),
        ({"targets": [["cpu"]]}, "a text is needed"),
        ({"scheduler": 3}, "a text is needed"),
        ({"keep": [1], "remove": 0.3}, "a text is needed"),
        ({"switch": 3}, "PATH@SHARE"),
        ({"switch": [["a"]]}, "PATH@SHARE"),
        ({"switch": ["a@0.5", "b@0.25"]}, "take over at 0.5, 0.25: shares in rising order are needed"),
    ],
)
def test_what_is_wrong_is_said(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_recipe(values)


@pytest.mark.parametrize("text", ["x", "12", "0x5", "5x-1", "5x5x5", "ax5"])
def test_a_text_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="WIDTHxHEIGHT"):
        parse_size(text)


def test_further_sizes_are_buckets() -> None:
    recipe = make_recipe({"size": "64x64", "buckets": ["128x64", [64, 128]]})
    assert recipe.size == (64, 64) and recipe.buckets == ((128, 64), (64, 128))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"size": "64x64", "buckets": "64x64"}, "a size is given twice"),
        ({"buckets": "64x64"}, "without the native one"),
        ({"size": "64x64", "buckets": [64]}, "is not a width and a height"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(values: dict[str, object], found: str) -> None:
    with pytest.raises(InputError, match=found):
        make_recipe(values)
