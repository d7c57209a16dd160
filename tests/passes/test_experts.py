"""Convolutions as mixtures by time step: they begin as what they were, and come out as plain ones for every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from chains import run_model

from trimtab.bundle import open_bundle
from trimtab.errors import InputError, PassError
from trimtab.passes.candidates import Candidates
from trimtab.passes.experts import FILE, AddExperts, Experts, convolutions, hats, load_experts
from trimtab.passes.inherit import inherit
from trimtab.passes.inherit_plan import InheritPlan
from trimtab.passes.mix_kernels import mix_kernels
from trimtab.passes.partition import partition
from trimtab.passes.removal import PLAN, RemovalPlan
from trimtab.passes.student import digest, save_weights
from trimtab.program import Program, Segment
from trimtab.storage import read_program
from trimtab.switching import carry_out

BundleFolder = Callable[[str], Path]

FOUR = Experts()

pytestmark = pytest.mark.xdist_group("sd15")


@pytest.fixture
def program(bundle_folder: BundleFolder) -> Program:
    found = read_program(open_bundle(bundle_folder("sd15")))
    ir.external_data.load_to_model(found.segments["denoiser"].model)
    return found


def feeds(model: ir.Model, timestep: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"batch": 1, "rows": 1, "rows*batch": 1, "tokens": 16, "latent_height": 8, "latent_width": 8}
    found = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
        found[str(value.name)] = rng.standard_normal(shape).astype(np.float32)
    return found | {"timestep": np.array(timestep, np.float32)}


def answer(model: ir.Model, timestep: float) -> np.ndarray:
    return run_model(model, feeds(model, timestep))["model_output"]


def trained(model: ir.Model, experts: Experts = FOUR) -> ir.Model:
    """The model with experts that have come to differ."""
    AddExperts(experts)(model)
    rng = np.random.default_rng(1)
    for name, value in model.graph.initializers.items():
        if name.endswith((".experts", ".routing")):
            assert value.const_value is not None
            array = value.const_value.numpy()
            noisy = array + 0.01 * rng.standard_normal(array.shape)
            value.const_value = ir.tensor(noisy.astype(np.float32), name=name)
    return model


def mixtures(program: Program, experts: Experts = FOUR) -> Program:
    """The program with trained experts in its denoiser."""
    model = trained(program.segments["denoiser"].model.clone(), experts)
    return dataclasses.replace(program, segments={**program.segments, "denoiser": Segment("denoiser", model)})


def calls(program: Program, schedule: str = "ddim-20") -> list[str]:
    """What every step of the first task calls, and at which time step."""
    task = next(iter(program.tasks.values()))
    return [call.segment for step in task.schedules[schedule].steps for call in step.calls]


@pytest.mark.parametrize(("count", "ranges"), [(4, 4), (2, 5)])
def test_experts_begin_as_the_convolution_that_they_replace(
    program: Program, count: int, ranges: int
) -> None:
    model = program.segments["denoiser"].model
    before = {t: answer(model, t) for t in (0, 249, 500, 999, 1000)}
    every = convolutions(model)
    result = AddExperts(Experts(count, ranges))(model)
    assert result.applied == tuple(every) and "conv_in" not in every and len(every) > 10
    for timestep, expected in before.items():
        np.testing.assert_array_equal(answer(model, timestep), expected)


def test_a_second_time_nothing_is_left_to_do(program: Program) -> None:
    model = program.segments["denoiser"].model
    first = AddExperts(Experts())(model)
    again = AddExperts(Experts(modules=("down_blocks.*.conv1",)))(model)
    assert first.modified and not again.modified
    assert {refusal.reason for refusal in again.refused} == {
        "its kernel is computed, as that of a mixture is"
    }


def test_hats_give_every_expert_a_time_of_its_own_and_add_up_to_one() -> None:
    np.testing.assert_array_equal(hats(3, 3), np.eye(3))
    np.testing.assert_allclose(hats(5, 3), [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]])
    np.testing.assert_allclose(hats(7, 4).sum(1), 1, rtol=1e-6)


def test_ranges_part_the_time_steps_equally(program: Program) -> None:
    model = trained(program.segments["denoiser"].model)
    kernel = next(node for node in model.graph if node.name == "mid_block.resnets.0.conv1.weight").outputs[0]
    model.graph.outputs.append(kernel)
    at = {t: run_model(model, feeds(model, t))[str(kernel.name)] for t in (0, 249, 251, 499, 751, 999, 1000)}
    for same in ((0, 249), (251, 499), (751, 999), (999, 1000)):
        np.testing.assert_array_equal(at[same[0]], at[same[1]])
    for other in ((249, 251), (499, 751)):
        assert np.abs(at[other[0]] - at[other[1]]).max() > 1e-4


def test_every_step_calls_plain_convolutions_that_are_the_mixture_at_its_time(program: Program) -> None:
    mixed_at_run_time = mixtures(program)
    plain = mix_kernels(mixed_at_run_time)
    names = ["denoiser-mix4", "denoiser-mix3", "denoiser-mix2", "denoiser"]  # of rising time
    assert calls(plain) == [name for name in reversed(names) for _ in range(5)]
    task = next(iter(plain.tasks.values()))
    for step in task.schedules["ddim-20"].steps[::4]:
        (timestep,) = step.constants["timestep"]
        ours = plain.segments[step.calls[0].segment].model
        theirs = mixed_at_run_time.segments["denoiser"].model
        np.testing.assert_allclose(answer(ours, timestep), answer(theirs, timestep), rtol=0, atol=1e-5)
    original = {node.op_type for node in program.segments["denoiser"].model.graph}
    for name in names:
        graph = plain.segments[name].model.graph
        assert len(list(graph)) == len(list(program.segments["denoiser"].model.graph))
        assert {node.op_type for node in graph} == original
        assert graph.initializers.keys() == program.segments["denoiser"].model.graph.initializers.keys()


def test_a_denoiser_that_has_the_name_of_a_mixture_already_keeps_it(program: Program) -> None:
    mixed = mixtures(program)
    other = Segment("denoiser-mix2", program.segments["denoiser"].model.clone())
    result = mix_kernels(dataclasses.replace(mixed, segments={**mixed.segments, other.name: other}))
    assert result.segments[other.name] is other
    assert set(calls(result)) == {"denoiser", "denoiser-mix3", "denoiser-mix4", "denoiser-mix5"}


def test_mixing_twice_or_a_model_without_mixtures_changes_nothing(program: Program) -> None:
    assert mix_kernels(program) is program
    once = mix_kernels(mixtures(program))
    assert mix_kernels(once) is once


def test_steps_that_come_to_the_same_kernels_share_a_denoiser(program: Program) -> None:
    model = program.segments["denoiser"].model.clone()
    AddExperts(Experts())(model)  # untrained: all mixtures are alike
    same = dataclasses.replace(program, segments={**program.segments, "denoiser": Segment("denoiser", model)})
    assert set(calls(mix_kernels(same))) == {"denoiser"}


def test_weights_that_are_no_kernels_are_the_same_tensors_in_every_denoiser(program: Program) -> None:
    plain = mix_kernels(mixtures(program))
    first, last = (plain.segments[name].model.graph.initializers for name in ("denoiser", "denoiser-mix4"))
    shared = {name for name in first if first[name].const_value is last[name].const_value}
    assert {f"{path}.weight" for path in convolutions(plain.segments["denoiser"].model)} == {
        name for name in first.keys() - shared if first[name].const_value.size > 16
    }


def test_what_no_step_holds_constant_is_mixed_at_run_time_and_said(
    program: Program, caplog: pytest.LogCaptureFixture
) -> None:
    program = mixtures(program)

    def moved(step):  # type: ignore[no-untyped-def]
        (call,) = [c for c in step.calls if c.segment == "denoiser"]
        rest = {name: value for name, value in step.constants.items() if name != "timestep"}
        call = dataclasses.replace(call, inputs={**call.inputs, "timestep": "timestep_table[0]"})
        return dataclasses.replace(step, calls=(call,), constants=rest)

    name, task = next(iter(program.tasks.items()))
    schedule = task.schedules["ddim-20"]
    schedule = dataclasses.replace(schedule, steps=tuple(map(moved, schedule.steps)))
    program = dataclasses.replace(
        program, tasks={name: dataclasses.replace(task, schedules={"ddim-20": schedule})}
    )
    result = mix_kernels(program)
    assert result.segments.keys() == program.segments.keys()
    assert result.passes[-1].applied == 0 and result.passes[-1].refused > 10
    assert "timestep is no constant of the steps" in caplog.text


def test_denoisers_of_mixtures_inherit_as_those_that_steps_switch_between(program: Program) -> None:
    result = partition(inherit(mix_kernels(mixtures(program)), InheritPlan(skip=("branch 0",), every=2)))
    steps = next(iter(result.tasks.values())).schedules["ddim-20"].steps
    full = [len(step.calls) for step in steps]
    # Every range of five begins in full, as another denoiser's features are none of its own.
    assert full == [full[0], full[1]] * 2 + [full[0]] + ([full[0], full[1]] * 2 + [full[0]]) * 3
    assert full[0] > full[1]


def test_a_module_that_is_no_convolution_is_refused_with_what_is_near(program: Program) -> None:
    model = program.segments["denoiser"].model
    with pytest.raises(
        PassError, match=r"no convolution is called mid_block.resnets.0.conv9: did you mean .*conv1"
    ):
        AddExperts(Experts(modules=("mid_block.resnets.0.conv9",)))(model)
    model.graph.inputs[:] = [value for value in model.graph.inputs if value.name != "timestep"]
    with pytest.raises(PassError, match="scalar input timestep, and it has none"):
        AddExperts(Experts())(model)


@pytest.mark.parametrize(("count", "ranges"), [(1, 4), (5, 4), (0, 0)])
def test_fewer_than_two_experts_or_more_than_ranges_are_refused(count: int, ranges: int) -> None:
    with pytest.raises(InputError, match=f"{count} experts in {ranges} ranges"):
        Experts(count, ranges)


def test_a_students_weights_go_back_into_mixtures_and_only_there(program: Program, tmp_path: Path) -> None:
    whole = program.segments["denoiser"].model
    RemovalPlan(Candidates(whole).fingerprint, (), "none").save(tmp_path / PLAN)
    FOUR.save(tmp_path)
    student = trained(whole.clone())
    names = [
        name for name in student.graph.initializers if name.endswith((".common", ".experts", ".routing"))
    ]
    weights = {name: student.graph.initializers[name].const_value.numpy() for name in names}
    begun = whole.clone()
    AddExperts(FOUR)(begun)
    save_weights(tmp_path, weights, digest(begun, weights))
    copy = {"denoiser": Segment("denoiser", whole.clone())}
    found = carry_out(dataclasses.replace(program, segments=copy), tmp_path).segments["denoiser"].model
    np.testing.assert_array_equal(answer(found, 400), answer(student, 400))
    (tmp_path / FILE).unlink()
    with pytest.raises(PassError, match="was trained from other weights than this model's"):
        carry_out(program, tmp_path)


def test_experts_are_read_as_they_were_written_and_damage_is_said(tmp_path: Path) -> None:
    assert load_experts(tmp_path) is None
    experts = Experts(3, 7, ("mid_block.*",))
    experts.save(tmp_path)
    assert load_experts(tmp_path) == experts
    for damaged in ("{", '{"schema": 2}', '{"schema": 1, "count": 1, "ranges": 4, "modules": []}'):
        (tmp_path / FILE).write_text(damaged)
        with pytest.raises(InputError, match="says no experts of this version"):
            load_experts(tmp_path)
