"""Removing layers: exact, refused with a reason, and once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import residual

from trimtab.errors import InputError, PassError
from trimtab.passes.candidates import Candidates
from trimtab.passes.removal import RemovalPlan, RemoveLayers, load_plan, remove_layers
from trimtab.program import Program, Segment
from trimtab.weights import parameter_count


def unoptimised(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(model: ir.Model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    session = unoptimised(model)
    known = {value.name for value in session.get_inputs()}
    return session.run(["model_output"], {k: v for k, v in inputs.items() if k in known})[0]


def with_factors(model: ir.Model, candidates: Candidates) -> tuple[ir.Model, list[str]]:
    """The model with every branch multiplied by an element of the input ``factors``."""
    branches = [name for name, c in candidates.items() if c.kind == "branch"]
    model = model.clone()
    graph = model.graph
    factors = ir.Value(name="factors", shape=ir.Shape([len(branches)]), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(factors)
    values = {v.name: v for node in graph for v in node.outputs} | {v.name: v for v in graph.inputs}
    for index, name in enumerate(branches):
        ((output, skip),) = candidates.own_bypass(name).items()
        add = values[output.name].producer()
        assert add is not None and add.op_type == "Add"
        position = 1 if add.inputs[0] is values[skip.name] else 0
        number = ir.Value(
            name=f"number/{index}",
            shape=ir.Shape([]),
            type=ir.TensorType(ir.DataType.INT64),
            const_value=ir.tensor(np.array(index), name=f"number/{index}"),
        )
        graph.register_initializer(number)
        factor = ir.node("Gather", [factors, number], {"axis": 0})
        scaled = ir.node("Mul", [add.inputs[position], factor.outputs[0]])
        graph.insert_before(add, [factor, scaled])
        add.replace_input_with(position, scaled.outputs[0])
    return model, branches


def example_inputs(model: ir.Model) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    sizes = {"batch": 1, "rows": 2, "rows*batch": 2, "tokens": 5, "latent_height": 8, "latent_width": 8}
    inputs = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None and value.name
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
        array = generator.normal(size=shape)
        if not value.dtype.is_floating_point():
            array = np.abs(array * 100) % 10
        inputs[value.name] = np.asarray(array, value.dtype.numpy())
    return inputs | {"timestep": np.array(400.0, np.float32)}


@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow), "dit"])
def test_every_branch_removed_equals_that_branch_times_zero(
    family: str, bundle_folder: Callable[[str], Path]
) -> None:
    path = bundle_folder(family) / "graphs" / "denoiser.onnx"
    model = ir.load(path)
    ir.external_data.load_to_model(model)
    candidates = Candidates(model)
    inputs = example_inputs(model)
    scaled, branches = with_factors(model, candidates)
    # Optimised, the two graphs may be laid out differently and then round differently.
    session = unoptimised(scaled)
    assert len(branches) >= 4
    whole = session.run(["model_output"], {**inputs, "factors": np.ones(len(branches), np.float32)})[0]
    for index, name in enumerate(branches):
        factors = np.ones(len(branches), np.float32)
        factors[index] = 0.0
        expected = session.run(["model_output"], {**inputs, "factors": factors})[0]
        removed = model.clone()
        RemoveLayers([name])(removed)
        assert parameter_count(removed) == candidates.parameters - candidates[name].parameters
        error = np.abs(run(removed, inputs) - expected).max() / np.abs(expected).max()
        assert error <= 1e-6, name
        assert not np.array_equal(expected, whole), name


def test_what_fed_only_the_branch_goes_with_it() -> None:
    model = residual.denoiser()
    result = RemoveLayers(["blocks.1"])(model)
    assert result.applied == ("blocks.1",) and not result.refused
    assert not [name for name in model.graph.initializers if str(name).startswith("blocks.1.")]
    assert not [node for node in model.graph if "blocks.1" in str(node.metadata_props)]


def test_neighbours_can_go_together() -> None:
    model = residual.denoiser()
    RemoveLayers(["blocks.0", "blocks.1", "blocks.2"])(model)
    inputs = residual.inputs(rows=1)
    inputs["mix"] = np.float32([1.0])
    expected = np.tanh(np.tanh(inputs["state"][0]))
    assert np.abs(run(model, inputs) - expected).max() <= 1e-6


def test_removing_twice_changes_nothing_more_and_says_so() -> None:
    model = residual.denoiser()
    RemoveLayers(["blocks.1"])(model)
    before = ir.to_proto(model).SerializeToString()
    again = RemoveLayers(["blocks.1"])(model)
    assert not again.modified and [r.reason for r in again.refused] == ["it is already gone"]
    assert ir.to_proto(model).SerializeToString() == before


def test_what_lies_inside_of_another_is_not_counted_twice(bundle_folder: Callable[[str], Path]) -> None:
    model = ir.load(bundle_folder("dit") / "graphs" / "denoiser.onnx")
    result = RemoveLayers(["transformer_blocks.0", "transformer_blocks.0.ff"])(model)
    assert result.applied == ("transformer_blocks.0",)
    assert [refusal.where for refusal in result.refused] == ["transformer_blocks.0.ff"]


# ---- plans ----


def program(model: ir.Model) -> Program:
    return Program({"denoiser": Segment("denoiser", model)}, {}, (), (), (64, 64), 8, None, 2)


def plan(model: ir.Model, *names: str) -> RemovalPlan:
    return RemovalPlan(Candidates(model).fingerprint, names, "by hand", parameters=(288, 240))


def test_a_plan_is_carried_out_and_noted() -> None:
    model = residual.denoiser()
    done = remove_layers(program(model), plan(model, "blocks.0"))
    assert [(e.name, e.segment, e.applied) for e in done.passes] == [("RemoveLayers", "denoiser", 1)]
    assert "blocks.0" not in Candidates(done.segments["denoiser"].model)


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = plan(residual.denoiser(), "blocks.0")
    written.save(tmp_path / "removal.json")
    assert load_plan(tmp_path) == load_plan(tmp_path / "removal.json") == written


def test_a_plan_of_another_model_is_refused() -> None:
    other = plan(residual.denoiser((4, 8, 13)), "blocks.0")
    with pytest.raises(PassError, match="made for another model"):
        remove_layers(program(residual.denoiser()), other)


def test_a_program_whose_denoiser_was_cut_is_refused() -> None:
    model = residual.denoiser()
    cut = dataclasses.replace(program(model), segments={"denoiser.outer": Segment("denoiser.outer", model)})
    with pytest.raises(PassError, match="remove before anything cuts it"):
        remove_layers(cut, plan(model, "blocks.0"))


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', '{"schema": 9, "removed": []}', "{}"])
def test_a_file_that_is_no_plan(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match="no removal plan"):
        load_plan(tmp_path / "x.json")


def test_names_that_are_none(tmp_path: Path) -> None:
    data = {"schema": 1, **dataclasses.asdict(plan(residual.denoiser())), "removed": [1]}
    (tmp_path / "x.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="no removal plan"):
        load_plan(tmp_path / "x.json")
    with pytest.raises(InputError, match=r"none\.json does not exist: give a removal plan"):
        load_plan(tmp_path / "none.json")
