"""Inputs that nothing reads go, with whatever ran for them alone."""

from __future__ import annotations

import dataclasses
import logging

import chains
import onnx_ir as ir
import pytest

from trimtab.passes.unread import drop_unread
from trimtab.program import Call, Program, Segment, TensorSpec


def program(read: bool) -> Program:
    """One step of a chain that is given what an encoder makes of another encoder's, and may read it."""
    model = chains.chain(1)
    hidden = ir.Value(
        name="hidden", shape=ir.Shape(["n", 1, chains.WIDTH]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    model.graph.inputs.append(hidden)
    if read:
        chains.add(model.graph, "head", "Add", [model.graph.outputs[0], hidden], "sum")
        model.graph.outputs[0] = next(v for node in model.graph for v in node.outputs if v.name == "sum")
    made = chains.program(model, chains.call(model, {"hidden": "text"}))
    (name, task), encoder = next(iter(made.tasks.items())), chains.chain(1)
    prologue = (
        Call("first", {"x0": "tokens"}, {"x1": "half"}),
        Call("second", {"x0": "half"}, {"x1": "text"}),
    )
    inputs = (*task.inputs, TensorSpec("tokens", "float32", ("batch", 1, chains.WIDTH), {"kind": "noise"}))
    return dataclasses.replace(
        made,
        segments={"first": Segment("first", encoder), "second": Segment("second", encoder), **made.segments},
        tasks={name: dataclasses.replace(task, inputs=inputs, prologue=prologue)},
    )


def test_what_runs_for_an_unread_input_alone_goes_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    before = program(read=False)
    with caplog.at_level(logging.WARNING):
        after = drop_unread(before)
    assert list(after.segments) == ["denoiser"]
    assert [str(v.name) for v in after.segments["denoiser"].model.graph.inputs] == ["x0"]
    task = after.tasks["t"]
    assert task.prologue == () and task.inputs == before.tasks["t"].inputs
    assert [dict(call.inputs) for call in task.schedules["s"].steps[0].calls] == [{"x0": "x"}]
    assert caplog.messages == [
        "first and second left out: nothing that is left reads what comes of it, so that what it is given makes no "
        "difference"
    ]
    assert drop_unread(after) == after


def test_what_the_steps_themselves_give_stays_though_nothing_reads_it() -> None:
    model = chains.chain(1)
    step = ir.Value(name="timestep", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.inputs.append(step)
    before = chains.program(model, chains.call(model, {"timestep": "timestep"}))
    assert drop_unread(before) == before
    assert [str(v.name) for v in model.graph.inputs] == ["x0", "timestep"]


def test_what_is_read_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    before = program(read=True)
    assert drop_unread(before) == before
    assert not caplog.messages


def test_what_only_the_pictures_of_one_schedule_are_given_goes_too() -> None:
    before = program(read=False)
    (name, task), made = next(iter(before.tasks.items())), Call("second", {"x0": "half"}, {"x1": "text"})
    schedule = dataclasses.replace(task.schedules["s"], prologue=(made,))
    moved = dataclasses.replace(task, prologue=task.prologue[:1], schedules={"s": schedule})
    after = drop_unread(dataclasses.replace(before, tasks={name: moved}))
    assert list(after.segments) == ["denoiser"]
    assert after.tasks[name].prologue == () and after.tasks[name].schedules["s"].prologue == ()


def test_what_only_the_decoder_reads_stays() -> None:
    before = program(read=False)
    (name, task), decode = next(iter(before.tasks.items())), Call("first", {"x0": "text"}, {"x1": "picture"})
    schedule = dataclasses.replace(task.schedules["s"], prologue=task.prologue)
    moved = dataclasses.replace(task, prologue=(), schedules={"s": schedule})
    after = drop_unread(dataclasses.replace(before, tasks={name: moved}, epilogue=(decode,)))
    assert after.tasks[name].schedules["s"].prologue == task.prologue
    assert list(after.segments) == ["first", "second", "denoiser"]


def test_an_input_that_is_handed_on_as_a_result_is_read() -> None:
    before = program(read=False)
    graph = before.segments["denoiser"].model.graph
    graph.outputs.append(graph.inputs[1])
    assert drop_unread(before) == before
