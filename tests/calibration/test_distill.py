"""Distillation: it learns, goes on after an interruption, and its weights return to the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import residual

import trimtab.calibration.distill as distill_module
from trimtab.calibration.batches import Batch, Trajectories
from trimtab.calibration.distill import Budget, Student, block_outputs
from trimtab.calibration.trajectories import Sample
from trimtab.errors import CalibrationError, InputError, PassError
from trimtab.passes.candidates import Candidates
from trimtab.passes.removal import RemovalPlan, RemoveLayers
from trimtab.passes.student import WEIGHTS, put_back, save_weights


def plan(model: ir.Model, *names: str) -> RemovalPlan:
    return RemovalPlan(Candidates(model).fingerprint, names, "by hand")


def samples(count: int = 12, seed: int = 0) -> list[Sample]:
    numbers = range(seed, seed + count)
    return [Sample(i % 3, "denoiser", residual.inputs(seed=i), np.zeros((1, 6, 5))) for i in numbers]


def distill(
    model: ir.Model, plan: RemovalPlan, samples: list[Sample], budget: Budget, **options: Any
) -> Student:
    """On what the teacher's own trajectories are made of."""
    return distill_module.distill(model, plan, Trajectories(model, samples), budget, **options)


def answers(model: ir.Model) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return np.stack([session.run(["model_output"], residual.inputs(seed=i))[0] for i in range(12)])


@pytest.mark.parametrize("features", ["normalized", "plain", "none"])
def test_the_student_comes_nearer_to_the_teacher_in_the_graph_that_ships(
    features: str, tmp_path: Path
) -> None:
    teacher = residual.denoiser()
    budget = Budget(steps=60, batch=8, rate=3e-2, features=features)
    student = distill(teacher, plan(teacher, "blocks.1"), samples(), budget)
    assert student.steps == 60 and student.losses[1] < student.losses[0]
    smaller = residual.denoiser()
    RemoveLayers(["blocks.1"])(smaller)
    before = np.square(answers(smaller) - answers(teacher)).mean()
    save_weights(tmp_path, student.weights, student.teacher)
    after = np.square(answers(put_back(smaller, tmp_path)) - answers(teacher)).mean()
    assert after < 0.5 * before


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = residual.denoiser()
    chosen = plan(teacher, "blocks.1")
    through = distill(teacher, chosen, samples(), Budget(steps=8, batch=4), checkpoint=tmp_path / "a")

    taken = []

    def stop(share: float, _: float) -> None:
        taken.append(share)
        if len(taken) == 5:  # four steps lie in the checkpoint, the fifth is lost
            raise KeyboardInterrupt

    monkeypatch.setattr(distill_module, "_SAVE_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        distill(
            teacher, chosen, samples(), Budget(steps=8, batch=4), checkpoint=tmp_path / "b", progress=stop
        )
    resumed = distill(teacher, chosen, samples(), Budget(steps=8, batch=4), checkpoint=tmp_path / "b")
    assert resumed.steps == 8
    for name, array in through.weights.items():
        assert np.array_equal(resumed.weights[name], array), name


def test_a_checkpoint_cut_short_or_of_another_run_is_refused(tmp_path: Path) -> None:
    teacher = residual.denoiser()
    path = tmp_path / "checkpoint"
    distill(teacher, plan(teacher, "blocks.1"), samples(), Budget(steps=2, batch=4), checkpoint=path)
    with pytest.raises(CalibrationError, match="of another plan"):
        distill(teacher, plan(teacher, "blocks.2"), samples(), Budget(steps=4, batch=4), checkpoint=path)
    with pytest.raises(
        CalibrationError, match="of another plan"
    ):  # as many, of other prompts or another guidance
        distill(
            teacher, plan(teacher, "blocks.1"), samples(seed=1), Budget(steps=4, batch=4), checkpoint=path
        )
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CalibrationError, match="no whole checkpoint"):
        distill(teacher, plan(teacher, "blocks.1"), samples(), Budget(steps=4, batch=4), checkpoint=path)


def test_a_target_of_the_data_is_what_the_student_learns() -> None:
    teacher = residual.denoiser()

    class Data(Trajectories):
        def of(self, seed: int, step: int, size: int) -> Batch:
            batch = super().of(seed, step, size)
            return Batch(batch.inputs, np.zeros((size, 6, 5), np.float32))

    budget = Budget(steps=60, batch=8, rate=3e-2, features="none")
    students = [
        distill_module.distill(teacher, plan(teacher, "blocks.1"), batches(teacher, samples()), budget)
        for batches in (Trajectories, Data)
    ]
    sizes = []
    for student in students:
        smaller = residual.denoiser()
        RemoveLayers(["blocks.1"])(smaller)
        for name, array in student.weights.items():
            smaller.graph.initializers[name].const_value = ir.tensor(array, name=name)
        sizes.append(np.square(answers(smaller)).mean())
    # Halfway to the teacher, and halfway to the data, which say 0.
    assert sizes[1] < 0.6 * sizes[0]


def test_numbers_that_are_not_finite_stop_the_run() -> None:
    teacher = residual.denoiser()
    broken = samples()
    for sample in broken:
        sample.inputs["state"][:] = np.nan
    with pytest.raises(CalibrationError, match="not finite at step 0"):
        distill(teacher, plan(teacher, "blocks.1"), broken, Budget(steps=2))


@pytest.mark.parametrize(
    ("budget", "message"),
    [({}, "a budget"), ({"steps": 0}, "above 0"), ({"steps": 1, "features": "some"}, "no features 'some'")],
)
def test_a_budget_that_is_none(budget: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget(**budget)


def test_blocks_are_found_with_and_without_module_names() -> None:
    model = residual.denoiser()
    assert len(block_outputs(model)) == 3
    assert len(block_outputs(residual.denoiser(named=False))) == 3


# ---- assembly ----


def test_a_module_starts_from_the_weights_of_another_that_the_student_lacks() -> None:
    teacher = residual.denoiser((4, 8, 8))
    budget = Budget(steps=1, rate=1e-12)
    chosen = plan(teacher, "blocks.1")
    student = distill(teacher, chosen, samples(), budget, starts={"blocks.2": "blocks.1"})
    plain = distill(teacher, chosen, samples(), budget)
    assert student.teacher == plain.teacher and student.weights.keys() == plain.weights.keys()
    for name, array in student.weights.items():
        source = name.replace("blocks.2", "blocks.1")
        value = teacher.graph.initializers[source].const_value
        assert value is not None
        np.testing.assert_allclose(array, value.numpy(), atol=1e-6)
        assert (source != name) == (not np.allclose(array, plain.weights[name], atol=1e-6))


def test_an_assembled_student_goes_back_into_the_graph(tmp_path: Path) -> None:
    teacher = residual.denoiser((4, 8, 8))
    starts = {"blocks.2": "blocks.1"}
    student = distill(
        teacher, plan(teacher, "blocks.1"), samples(), Budget(steps=1, rate=1e-12), starts=starts
    )
    save_weights(tmp_path, student.weights, student.teacher)
    smaller = residual.denoiser((4, 8, 8))
    RemoveLayers(["blocks.1"])(smaller)
    value = put_back(smaller, tmp_path).graph.initializers["blocks.2.first.weight"].const_value
    expected = teacher.graph.initializers["blocks.1.first.weight"].const_value
    assert value is not None and expected is not None
    np.testing.assert_allclose(value.numpy(), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (
            {"blocks.0": "blocks.2"},
            r"blocks\.0\.first\.weight is \[4, 6\] and blocks\.2\.first\.weight is \[12, 6\]",
        ),
        ({"blocks.0": "blocks.9"}, r"blocks\.9\.first\.weight is none of the teacher's weights"),
        ({"block.0": "blocks.2"}, r"no module block\.0 with weights of its own: did you mean .*blocks\.0"),
        ({"blocks.1": "blocks.2"}, "no module blocks.1 with weights of its own"),  # it was removed
    ],
)
def test_modules_that_are_not_alike_are_refused_by_name(starts: dict[str, str], message: str) -> None:
    teacher = residual.denoiser()
    with pytest.raises(PassError, match=message):
        distill(teacher, plan(teacher, "blocks.1"), samples(), Budget(steps=1), starts=starts)


# ---- the weights' file ----


@pytest.fixture
def student(tmp_path: Path) -> tuple[Path, ir.Model]:
    """A folder with weights, and the graph that they belong to."""
    teacher = residual.denoiser()
    trained = distill(teacher, plan(teacher, "blocks.1"), samples(), Budget(steps=1))
    save_weights(tmp_path, trained.weights, trained.teacher)
    RemoveLayers(["blocks.1"])(teacher)
    return tmp_path, teacher


def test_weights_do_not_go_into_a_graph_they_were_not_trained_from(student: tuple[Path, ir.Model]) -> None:
    folder, model = student
    value = model.graph.initializers["blocks.0.first.weight"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * 2, name=value.name)
    with pytest.raises(PassError, match="trained from other weights"):
        put_back(model, folder)
    with pytest.raises(PassError, match="trained from other weights"):
        put_back(residual.denoiser((4,)), folder)


def test_a_weights_file_cut_short_is_refused(student: tuple[Path, ir.Model]) -> None:
    folder, model = student
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="cut short"):
        put_back(model, folder)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    teacher = residual.denoiser()
    trained = distill(teacher, plan(teacher, "blocks.1"), samples(), Budget(steps=1))
    broken = {name: np.full_like(array, np.nan) for name, array in trained.weights.items()}
    save_weights(tmp_path, broken, trained.teacher)
    RemoveLayers(["blocks.1"])(teacher)
    with pytest.raises(InputError, match="not finite"):
        put_back(teacher, tmp_path)
