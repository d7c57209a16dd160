"""Graphs that differ in some weights: what is the same in all of them stands once."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from chains import WIDTH, call, chain, program, run_step

from trimtab.passes.inherit import inherit
from trimtab.passes.inherit_plan import InheritPlan
from trimtab.passes.partition import partition
from trimtab.passes.versions import versions
from trimtab.program import Call, Program, Segment
from trimtab.weights import weight_bytes


def differing(*blocks: int, length: int = 6, steps: int = 4) -> Program:
    """A denoiser for the first half of the steps, and one whose weights are others in these blocks for the rest."""
    first, second = chain(length), chain(length)
    for block in blocks:
        value = second.graph.initializers[f"W{block}"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() + np.float32(0.5), name=value.name)
    whole = program(first, *[call(first)] * steps)
    task = whole.tasks["t"]
    schedule = task.schedules["s"]
    late = tuple(
        dataclasses.replace(step, calls=(Call("denoiser-2", step.calls[0].inputs, step.calls[0].outputs),))
        if index >= steps // 2
        else step
        for index, step in enumerate(schedule.steps)
    )
    task = dataclasses.replace(task, schedules={"s": dataclasses.replace(schedule, steps=late)})
    segments = {**whole.segments, "denoiser-2": Segment("denoiser-2", second)}
    return dataclasses.replace(whole, segments=segments, tasks={"t": task})


def names(result: Program) -> list[list[str]]:
    return [[c.segment for c in step.calls] for step in result.tasks["t"].schedules["s"].steps]


def drawn(result: Program) -> list[np.ndarray]:
    """What every step gives, each from the same start; features stay from one to the next."""
    x = np.random.default_rng(0).standard_normal((2, 1, WIDTH)).astype(np.float32)
    tensors, results = {"x": x}, []
    for step in result.tasks["t"].schedules["s"].steps:
        run_step(result, step, tensors)
        results.append(tensors["y"])
    return results


def test_what_is_before_and_behind_the_differences_stands_once_and_computes_the_same() -> None:
    whole = differing(2, 4)
    expected = drawn(whole)
    result = partition(whole)
    early, late = ["denoiser.0", "denoiser.1", "denoiser.2"], ["denoiser.0", "denoiser-2.1", "denoiser.2"]
    assert names(result) == [early] * 2 + [late] * 2
    for ours, theirs in zip(drawn(result), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert np.abs(expected[0] - expected[-1]).max() > 0.1
    # Blocks 2 to 4 twice, the other three once.
    one = WIDTH * WIDTH * 4
    assert sum(weight_bytes(segment.model) for segment in result.segments.values()) == 9 * one


def test_a_version_has_only_the_parts_that_its_own_steps_run() -> None:
    skipped = inherit(differing(3, steps=4), InheritPlan(skip=("blocks.3",), full=(0, 1, 2, 3)))
    late = skipped.tasks["t"].schedules["s"].steps
    # The second version inherits from the start what the first one keeps.
    read = {**late[3].calls[0].inputs, "branch3": "denoiser/branch3"}
    kept = {**late[1].calls[0].outputs, "branch3": "denoiser/branch3"}
    steps = [
        dataclasses.replace(late[0], calls=(dataclasses.replace(late[1].calls[0], outputs=kept),)),
        dataclasses.replace(late[3], calls=(dataclasses.replace(late[3].calls[0], inputs=read),)),
    ]
    schedule = dataclasses.replace(skipped.tasks["t"].schedules["s"], steps=tuple(steps))
    task = dataclasses.replace(skipped.tasks["t"], schedules={"s": schedule})
    result = partition(dataclasses.replace(skipped, tasks={"t": task}))
    called = {name for step in names(result) for name in step}
    assert called == result.segments.keys()


def test_a_side_that_holds_too_little_is_not_cut_off() -> None:
    behind = differing(2, 5)
    early, late = ["denoiser.0", "denoiser.1"], ["denoiser.0", "denoiser-2.1"]
    assert names(partition(behind)) == [early] * 2 + [late] * 2
    in_front = differing(0, 2, length=8)
    assert [len(calls) for calls in names(partition(in_front))] == [2] * 4


def test_versions_that_share_too_little_are_not_cut() -> None:
    everywhere = differing(0, 5)
    assert partition(everywhere).segments.keys() == {"denoiser", "denoiser-2"}
    assert names(partition(everywhere)) == [["denoiser"]] * 2 + [["denoiser-2"]] * 2


def test_the_same_weights_in_another_place_are_the_same() -> None:
    nowhere = differing()
    for value in nowhere.segments["denoiser-2"].model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    assert partition(nowhere).segments.keys() == {"denoiser", "denoiser-2"}  # whole graphs are not merged


def test_versions_inherit_and_share_what_is_outside_of_both() -> None:
    skipped = inherit(differing(3, steps=8), InheritPlan(skip=("blocks.2", "blocks.3"), every=2))
    expected = drawn(partition(dataclasses.replace(skipped, segments=apart(skipped.segments))))
    result = partition(skipped)
    for ours, theirs in zip(drawn(result), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    full, lean = names(result)[4], names(result)[5]
    assert [name for name in full if name not in lean] == [n for n in full if n not in lean]
    assert any(name.startswith("denoiser-2.") for name in full)
    assert all(name.startswith("denoiser.") for name in lean)  # what is read in its place lies outside


def test_versions_that_inherit_and_share_nothing_keep_their_own_weights() -> None:
    skipped = inherit(differing(0, 5, steps=8), InheritPlan(skip=("blocks.2", "blocks.3"), every=2))
    expected = drawn(partition(dataclasses.replace(skipped, segments=apart(skipped.segments))))
    result = partition(skipped)
    for ours, theirs in zip(drawn(result), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    late = {name for step in names(result)[4:] for name in step}
    assert all(name.startswith("denoiser-2.") for name in late)


def turned(whole: Program) -> Program:
    """The same with every weight stored the other way round and turned in the graph, as packed ones are decoded."""
    for segment in whole.segments.values():
        graph = segment.model.graph
        for node in [node for node in graph if node.op_type == "MatMul"]:
            weight = node.inputs[1]
            assert weight is not None and weight.const_value is not None
            array = weight.const_value.numpy().T.copy()
            weight.const_value = ir.tensor(array, name=weight.name)
            back = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{weight.name}.turned")
            back.outputs[0].name = back.name
            back.outputs[0].type, back.outputs[0].shape = weight.type, weight.shape
            graph.insert_before(node, back)
            node.replace_input_with(1, back.outputs[0])
    return whole


@pytest.mark.parametrize("every", [1, 2])
def test_a_weight_that_is_computed_from_constants_is_its_versions_own(every: int) -> None:
    plan = InheritPlan(skip=("blocks.2",), every=every)
    plain, skipped = (inherit(differing(2, 4, steps=8), plan) for _ in range(2))
    expected = drawn(partition(dataclasses.replace(plain, segments=apart(plain.segments))))
    result = partition(turned(skipped))
    for ours, theirs in zip(drawn(result), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert any(name.startswith("denoiser.") for name in names(result)[-1])  # and the rest is shared


def apart(segments: dict[str, Segment]) -> dict[str, Segment]:
    """Segments that are no versions of each other, as a value inside has another name in one of them."""
    changed = segments["denoiser-2"].model.clone()
    changed.graph.node("product0").outputs[0].name = "other"
    return {**segments, "denoiser-2": Segment("denoiser-2", changed)}


def test_graphs_of_other_nodes_are_no_versions() -> None:
    first, second = chain(3), chain(3)
    assert versions({"a": first, "b": second}) == [["a", "b"]]
    assert versions({"a": first, "b": chain(4), "c": second}) == [["a", "c"], ["b"]]
    segments = {"denoiser": Segment("denoiser", first), "denoiser-2": Segment("denoiser-2", second)}
    other = apart(segments)["denoiser-2"].model
    assert versions({"a": first, "b": other}) == [["a"], ["b"]]
