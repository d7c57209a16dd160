"""Several denoisers in one program."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from chains import call, chain, program, run_step

from trimtab.errors import PassError
from trimtab.passes.calls import map_steps
from trimtab.passes.inherit import inherit
from trimtab.passes.inherit_plan import InheritPlan
from trimtab.passes.partition import partition
from trimtab.passes.switch import switch
from trimtab.program import Call, Program, Segment


def two(count: int = 6) -> tuple[Program, Program]:
    """A whole denoiser of five blocks, and one without the middle one."""
    whole, small = chain(5), chain(5)
    skipped = small.graph.node("x3")
    ir.convenience.replace_all_uses_with(skipped.outputs[0], skipped.inputs[0])
    return program(whole, *[call(whole)] * count), program(small, *[call(small)] * count)


def used(result: Program, schedule: str = "s") -> list[str]:
    return [step.calls[0].segment for step in result.tasks["t"].schedules[schedule].steps]


def test_another_denoiser_takes_over_at_its_share_of_the_steps_and_computes_what_it_would_alone() -> None:
    whole, small = two()
    result = switch(whole, {"small": small}, [("small", 0.5)])
    assert used(result) == ["denoiser"] * 3 + ["denoiser-small"] * 3
    x = np.random.default_rng(0).standard_normal((2, 1, 8)).astype(np.float32)
    for alone, index in ((whole, 0), (small, 5)):
        ours, theirs = {"x": x}, {"x": x}
        run_step(result, result.tasks["t"].schedules["s"].steps[index], ours)
        run_step(alone, alone.tasks["t"].schedules["s"].steps[0], theirs)
        np.testing.assert_array_equal(ours["y"], theirs["y"])


def test_denoisers_may_follow_one_another_and_come_back() -> None:
    whole, small = two()
    result = switch(whole, {"small": small, "own": whole}, [("small", 1 / 3), ("own", 2 / 3)])
    assert used(result) == ["denoiser"] * 2 + ["denoiser-small"] * 2 + ["denoiser-own"] * 2


@pytest.mark.parametrize("part", ["s/from-2", "s/from-1"], ids=["plain", "two evaluations a step"])
def test_a_schedule_that_starts_later_switches_at_the_same_evaluation(part: str) -> None:
    whole, small = two()
    task = whole.tasks["t"]
    late = dataclasses.replace(task.schedules["s"], steps=task.schedules["s"].steps[2:])
    task = dataclasses.replace(task, schedules={**task.schedules, part: late})
    result = switch(dataclasses.replace(whole, tasks={"t": task}), {"small": small}, [("small", 0.5)])
    assert used(result, part) == ["denoiser"] + ["denoiser-small"] * 3


def test_a_program_that_only_starts_from_pictures_is_held_against_another_s_sampler_too() -> None:
    whole, small = two()
    parts = {"s/from-0": whole.tasks["t"].schedules["s"]}
    ours = dataclasses.replace(whole, tasks={"t": dataclasses.replace(whole.tasks["t"], schedules=parts)})
    assert used(switch(ours, {"small": small}, [("small", 0.5)]), "s/from-0")[-1] == "denoiser-small"
    with pytest.raises(PassError, match="was compiled with another s, or with none"):
        switch(ours, {"small": of_another_sampler(small)}, [("small", 0.5)])


def test_a_denoiser_that_takes_over_inherits_nothing_of_the_other() -> None:
    whole, small = two()
    switched = switch(whole, {"small": small}, [("small", 0.5)])
    result = partition(inherit(switched, InheritPlan(skip=("blocks.1",), every=2)))
    segments = [[c.segment for c in s.calls] for s in result.tasks["t"].schedules["s"].steps]
    assert [len(calls) for calls in segments] == [3, 2, 3, 3, 2, 3]
    read = {t for s in result.tasks["t"].schedules["s"].steps for c in s.calls for t in c.inputs.values()}
    assert {"denoiser/branch1", "denoiser-small/branch1"} <= read


def test_denoisers_whose_inputs_differ_are_refused_by_name() -> None:
    whole, small = two()
    small.segments["denoiser"].model.graph.inputs[0].shape = ir.Shape(["n", 1, 9])
    with pytest.raises(
        PassError, match=r"small cannot take over: x0 is FLOAT \[n,1,9\] there and FLOAT \[n,1,8\]"
    ):
        switch(whole, {"small": small}, [("small", 0.5)])
    extra = ir.Value(name="mask", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    small.segments["denoiser"].model.graph.inputs.append(extra)
    with pytest.raises(PassError, match="mask is among the inputs of only one of the two"):
        switch(whole, {"small": small}, [("small", 0.5)])


def test_names_and_shares_that_make_no_sense_are_refused() -> None:
    whole, small = two()
    with pytest.raises(PassError, match="no denoiser 'tiny' to switch to: given are small"):
        switch(whole, {"small": small}, [("tiny", 0.5)])
    with pytest.raises(PassError, match="in rising order"):
        switch(whole, {"small": small}, [("small", 0.5), ("small", 0.2)])
    with pytest.raises(PassError, match="2 slots of the sampler and this program has 1"):
        switch(whole, {"small": dataclasses.replace(small, slots=2)}, [("small", 0.5)])


def of_another_sampler(program: Program) -> Program:
    tasks = map_steps(program.tasks, lambda step: dataclasses.replace(step, constants={"timestep": (7.0,)}))
    return dataclasses.replace(program, tasks=tasks)


def test_a_denoiser_that_was_compiled_for_another_sampler_is_refused() -> None:
    whole, small = two()
    with pytest.raises(PassError, match="was compiled with another s, or with none"):
        switch(whole, {"small": of_another_sampler(small)}, [("small", 0.5)])


def test_a_denoiser_that_no_step_would_call_is_refused() -> None:
    whole, small = two()
    with pytest.raises(PassError, match="no step would call denoiser-small: the schedules s are too short"):
        switch(whole, {"small": small}, [("small", 0.99)])


def with_text(model: ir.Model) -> Program:
    """The program of a denoiser that may read a text, which an encoder makes before the steps."""
    result = program(model, *[call(model, {"text": "hidden"})] * 4)
    task = dataclasses.replace(result.tasks["t"], prologue=(Call("encoder", {"x0": "x"}, {"x1": "hidden"}),))
    segments = {"encoder": Segment("encoder", chain(1)), **result.segments}
    return dataclasses.replace(result, segments=segments, tasks={"t": task})


def test_a_denoiser_that_reads_no_text_any_more_takes_over_and_is_given_none() -> None:
    whole, small = chain(2), chain(2)
    text = ir.Value(name="text", shape=ir.Shape(["n", 1, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    whole.graph.inputs.append(text)
    other = program(small, *[call(small)] * 4)
    result = switch(with_text(whole), {"small": other}, [("small", 0.5)])
    steps = result.tasks["t"].schedules["s"].steps
    assert [sorted(step.calls[0].inputs) for step in steps] == [["text", "x0"]] * 2 + [["x0"]] * 2
    with pytest.raises(PassError, match="text is among the inputs of only one"):
        switch(other, {"small": with_text(whole)}, [("small", 0.5)])


def test_a_denoiser_that_lacks_an_input_of_the_steps_own_is_refused() -> None:
    whole, small = chain(2), chain(2)
    step = ir.Value(name="timestep", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT))
    whole.graph.inputs.append(step)
    ours = program(whole, *[call(whole, {"timestep": "timestep"})] * 4)
    with pytest.raises(PassError, match="timestep is among the inputs of only one"):
        switch(ours, {"small": program(small, *[call(small)] * 4)}, [("small", 0.5)])
