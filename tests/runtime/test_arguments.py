"""Loose arguments: which of them fit together."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from trimtab.errors import BundleError, InputError
from trimtab.program import Schedule, Task, TensorSpec, first_step
from trimtab.runtime.arguments import (
    all_labels,
    all_negatives,
    all_seeds,
    all_texts,
    check_count,
    choose_schedule,
    guidance_scale,
    plain,
    whole_size,
)

KINDS = {"tokens": TensorSpec("tokens", "int64", ("rows*batch", 77), {"kind": "tokens"})}


def test_negative_prompts_follow_their_prompts() -> None:
    assert all_negatives(KINDS, "x", 6, 2) == all_negatives(KINDS, ["x"], 6, 2) == ("x",) * 6
    assert all_negatives(KINDS, ["x", "y", "z"], 6, 2) == ("x", "x", "y", "y", "z", "z")
    assert all_negatives(KINDS, list("uvwxyz"), 6, 2) == tuple("uvwxyz")


@pytest.mark.parametrize("guided", [True, False])
def test_where_a_negative_prompt_makes_no_difference_a_warning_says_so(
    guided: bool, caplog: pytest.LogCaptureFixture
) -> None:
    mix = TensorSpec("mix", "float32", ("rows",), {"kind": "mix", "classifier_free": guided})
    assert all_negatives({**KINDS, "mix": mix}, "x", 1, 1) == ("x",)
    assert ("the negative prompt makes no difference" in caplog.text) is not guided


def test_pictures_that_are_more_than_memory_are_refused_by_arithmetic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 1_000_000, "SC_PAGE_SIZE": 4096}.__getitem__)
    check_count(1000, (512, 512))
    message = "1000000000 pictures of 512x512 take 3,145,728 GB, and this machine has 4: ask for fewer"
    with pytest.raises(InputError, match=message):
        check_count(10**9, (512, 512))


@pytest.mark.parametrize("negatives", [[], ["x", "y"], ["x"] * 4])
def test_negative_prompts_that_fit_no_prompts_are_refused(negatives: list[str]) -> None:
    # Two negatives for six pictures would each go to a prompt and a half.
    with pytest.raises(InputError, match=f"{len(negatives)} negative prompts were given for 6 pictures"):
        all_negatives(KINDS, negatives, 6, 2)


@pytest.mark.parametrize("none", [None, 0.0, 1.0])
def test_a_model_without_guidance_takes_what_asks_for_none(none: float | None) -> None:
    assert guidance_scale(Task((), (), {}), {}, none) == (1.0, 1)


@pytest.mark.parametrize("scale", [1.5, float("nan")])
def test_a_model_without_guidance_refuses_a_scale(scale: float) -> None:
    with pytest.raises(
        InputError, match=f"of {scale} was given and this model has no guidance: leave it out"
    ):
        guidance_scale(Task((), (), {}), {}, scale)


@pytest.mark.parametrize(
    ("source", "rows"),
    [
        ({}, {-1.0: 1, 0.0: 1, 0.5: 1, 1.0: 1, 1.5: 2}),
        ({"unguided": 0}, {-1.0: 1, 0.0: 1, 0.5: 2, 1.0: 2, 1.5: 2}),
        ({"below": True}, {-1.0: 2, 0.0: 2, 0.5: 2, 1.0: 1, 1.5: 2}),
    ],
)
def test_guidance_takes_rows_from_the_scale_that_changes_nothing_and_below_it_where_the_bundle_says_so(
    source: dict[str, Any], rows: dict[float, int]
) -> None:
    mix = TensorSpec("mix", "float32", ("rows",), {"kind": "mix", "classifier_free": True, **source})
    task = Task((), (), {}, guidance=3.5)
    assert {scale: guidance_scale(task, {"mix": mix}, scale)[1] for scale in rows} == rows


def test_numbers_may_be_numpys() -> None:
    kinds = {"label": TensorSpec("label", "int64", ("rows*batch",), {"kind": "label"})}
    assert all_labels(kinds, np.int64(3), 2) == all_labels(kinds, np.array([3, 3]), 1) == (3, 3)
    assert all_seeds(np.array([1, 2]), 2) == (1, 2) and all_seeds(np.int64(7), 2) == (7,)
    assert whole_size([np.int64(64), 32]) == (64, 32) and whole_size(None) is None
    check_count(np.int64(2), (64, 64))
    settings = [plain(value) for value in (np.int64(3), np.array([3, 4]), [np.int64(3), "cat"], "cat", None)]
    assert json.dumps(settings) == '[3, [3, 4], [3, "cat"], "cat", null]'


@pytest.mark.parametrize("value", [1.5, "one", [1.0, 2.0], object(), np.array(3), b"12"])
def test_seeds_and_sizes_that_are_no_whole_numbers_are_refused_in_one_line(value: Any) -> None:
    with pytest.raises(InputError, match="is no whole number: give one, or one for each picture"):
        all_seeds(value, 2)
    with pytest.raises(InputError, match="is not a width and a height in pixels"):
        whole_size(value)


@pytest.mark.parametrize(
    "value", [5, b"cat", [b"cat"], ["cat", None], ["cat", ["dog"]], iter(["cat"]), object()]
)
def test_prompts_that_are_no_texts_are_refused_in_one_line(value: Any) -> None:
    with pytest.raises(InputError, match=r"the prompt .* is no text: give one, or one for each picture"):
        all_texts(KINDS, value, 1)
    with pytest.raises(InputError, match=r"the negative prompt .* is no text"):
        all_negatives(KINDS, value, 1, 1)


@pytest.mark.parametrize("value", ["caf\udce9", ["cat", "caf\udce9"]])
def test_a_prompt_that_is_no_unicode_is_refused_whether_or_not_it_is_read(value: Any) -> None:
    with pytest.raises(InputError, match=r"the prompt 'caf\\udce9' is not valid Unicode: give it in UTF-8"):
        all_texts(KINDS, value, 1)
    with pytest.raises(InputError, match=r"the negative prompt .* is not valid Unicode"):
        all_negatives(KINDS, value, 2, 1)


@pytest.mark.parametrize("value", ["high", [1, 2], 10**400, object()])
def test_what_is_no_number_is_refused_in_one_line(value: Any) -> None:
    task = Task((), (), {"ddim-2": Schedule(())}, guidance=7.5, strength=0.8)
    with pytest.raises(InputError, match=r"the guidance scale .* is no number: give one"):
        guidance_scale(task, {}, value)
    with pytest.raises(InputError, match=r"the strength .* is no number: give one"):
        choose_schedule(["ddim-2"], task, None, value)


@pytest.mark.parametrize("value", [2.0, "2", None, [1]])
def test_a_count_that_is_no_whole_number_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises(InputError, match=r"the count .* is no whole number"):
        check_count(value, (64, 64))


def test_a_class_that_is_neither_number_nor_name_is_refused_in_one_line() -> None:
    kinds = {"label": TensorSpec("label", "int64", ("rows*batch",), {"kind": "label"})}
    with pytest.raises(InputError, match=r"the class 1\.5 is neither a whole number nor a name"):
        all_labels(kinds, 1.5, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["x", "x-y", pytest.param("x-" + "9" * 400, id="x-9...")])
def test_a_schedule_that_says_no_number_of_steps_cannot_be_cut(name: str) -> None:
    task = Task((), (), {}, strength=0.5)
    with pytest.raises(BundleError, match=r"^the schedule x.{,60} says no number of steps"):
        choose_schedule([name], task, None, 0.3)


def started(steps: int, starts: Iterable[int], rounds_up: bool = False) -> Task:
    loops = {f"euler-{steps}/from-{start}": Schedule(()) for start in starts}
    return Task((), (), loops, strength=0.6, strength_rounds_up=rounds_up)


@pytest.mark.parametrize("rounds_up", [True, False])
@pytest.mark.parametrize("steps", [20, 30, 75, 100])
@pytest.mark.parametrize("strength", [0.001, 0.01, 0.35, 0.5049, 0.9999])
def test_the_strength_that_is_named_in_the_place_of_another_works(
    steps: int, strength: float, rounds_up: bool
) -> None:
    task = started(steps, range(0, steps, 5), rounds_up)
    if f"euler-{steps}/from-{first_step(steps, strength, rounds_up)}" in task.schedules:
        return
    with pytest.raises(InputError, match=r"use strength ([\d.]+)$") as refused:
        choose_schedule([f"euler-{steps}"], task, None, strength)
    named = float(str(refused.value).rpartition(" ")[2])
    assert choose_schedule([f"euler-{steps}"], task, None, named) in task.schedules


@pytest.mark.parametrize(("strength", "start"), [(1.0, 0), (0.8, 10), (0.58, 22), (0.08, 46)])
def test_an_lcm_s_strength_is_a_share_of_the_steps_that_it_was_distilled_from(
    strength: float, start: int
) -> None:
    loops = {f"lcm-4/from-{k}": Schedule(()) for k in range(47)}
    task = Task((), (), loops, strength=0.8, strength_steps=50)
    assert choose_schedule(["lcm-4"], task, None, strength) == f"lcm-4/from-{start}"
    with pytest.raises(
        InputError, match=r"the strength 0.05 leaves too few of 50 steps: use strength 0\.08$"
    ):
        choose_schedule(["lcm-4"], task, None, 0.05)
