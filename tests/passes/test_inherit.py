"""Feature inheritance: what is skipped, when, and that it computes what it says."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from chains import WIDTH, chain, run_model, whole

import trimtab
from trimtab.bundle import open_bundle
from trimtab.calibration.draft import draft
from trimtab.errors import InputError, PassError
from trimtab.passes.inherit import check_plan, inherit
from trimtab.passes.inherit_plan import InheritPlan, make_plan, save_plan
from trimtab.passes.partition import partition, reach
from trimtab.passes.regions import Region, branches, find_region
from trimtab.passes.removal import RemoveLayers
from trimtab.passes.scopes import SCOPES, module_tree
from trimtab.program import Call, Program, Schedule, Segment, Step, Task, TensorSpec

BundleFolder = Callable[[str], Path]


def looped(evaluations: int, **schedules: int) -> Program:
    """A chain of five blocks, evaluated some times; further schedules by name."""
    model = chain(5)
    for node in model.graph:
        scopes = node.metadata_props["pkg.torch.onnx.name_scopes"].replace("blocks.", "transformer_blocks.")
        node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    step = Step((Call("denoiser", {"x0": "x"}, {"x5": "y"}),))
    named = {name: Schedule((step,) * count) for name, count in ({"s-5": evaluations} | schedules).items()}
    task = Task((TensorSpec("x", "float32", ("batch", 1, WIDTH), {"kind": "noise"}),), (), named)
    return Program({"denoiser": Segment("denoiser", model)}, {"t": task}, (), (), (8, 8), 1, None, 1)


def pattern(program: Program, schedule: str = "s-5") -> str:
    """F for a full evaluation, i for one that inherits."""
    steps = program.tasks["t"].schedules[schedule].steps
    return "".join("i" if len(s.calls[0].inputs) > 1 else "F" for s in steps)


# ---- plans ----


def test_every_second_evaluation_runs_in_full() -> None:
    assert pattern(inherit(looped(7), make_plan(2))) == "FiFiFiF"
    assert pattern(inherit(looped(7), make_plan("3"))) == "FiiFiiF"


def test_every_single_one_in_full_is_the_program_itself() -> None:
    program = looped(7)
    assert inherit(program, make_plan(1)) is program


def test_the_ends_may_be_dense() -> None:
    plan = InheritPlan(every=3, dense_start=3, dense_end=2)
    assert pattern(inherit(looped(10), plan)) == "FFFiiFiiFF"


def test_a_list_names_the_full_evaluations() -> None:
    assert pattern(inherit(looped(6), InheritPlan(full=(0, 1, 4)))) == "FFiiFi"


def test_a_list_without_the_first_evaluation_takes_it_from_a_dense_start() -> None:
    assert pattern(inherit(looped(6), InheritPlan(full=(3,), dense_start=1))) == "FiiFii"


def test_a_schedule_that_starts_later_starts_in_full_and_keeps_the_places_of_the_list() -> None:
    program = inherit(looped(6, **{"s-5/from-2": 4}), InheritPlan(full=(0, 3)))
    assert pattern(program) == "FiiFii"
    assert pattern(program, "s-5/from-2") == "FFii"


def test_a_start_at_a_step_of_two_evaluations_keeps_the_places_of_the_list_and_of_the_choices() -> None:
    heun = looped(7, **{"s-5/from-1": 5, "s-5/from-2": 3})  # four steps, of which the last evaluates once
    program = inherit(heun, InheritPlan(full=(0, 3, 5)))
    assert pattern(program) == "FiiFiFi"
    assert pattern(program, "s-5/from-1") == "FFiFi"
    assert pattern(program, "s-5/from-2") == "FFi"
    choices = {"s-5": ("", *("blocks 1-3", "") * 3)}
    chosen = inherit(heun, InheritPlan(skip=("blocks 1-3",), choices=choices))
    assert pattern(chosen) == "FiFiFiF" and pattern(chosen, "s-5/from-1") == "FiFiF"


def test_a_list_may_name_evaluations_of_the_longest_schedule_and_none_beyond() -> None:
    program = looped(4, **{"s-7": 8, "s-7/from-2": 6})
    check_plan(program, InheritPlan(skip=("blocks 1-3",), full=(0, 7)))
    with pytest.raises(PassError, match="evaluation 8 is to run in full, and the longest schedule has 8"):
        check_plan(program, InheritPlan(skip=("blocks 1-3",), full=(0, 8)))


def test_choices_say_for_every_evaluation_what_is_skipped() -> None:
    skip = ("blocks 1-3", "blocks 2-2")
    plan = InheritPlan(skip=skip, choices={"s-5": ("", skip[0], skip[1], "")})
    program = inherit(looped(4), plan)
    reads = [sorted(s.calls[0].inputs) for s in program.tasks["t"].schedules["s-5"].steps]
    assert reads == [["x0"], ["x0", "x4/added"], ["branch2", "x0"], ["x0"]]
    partition(program)


@pytest.mark.parametrize("refusing", [check_plan, inherit])
@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"s-5": ["", "blocks 1-3"]}, "2 choices for s-5, which has 4 evaluations"),
        ({"s-5": []}, "0 choices for s-5, which has 4 evaluations"),
        ({"other": [""]}, "no choices for the schedule s-5: it has other"),
    ],
)
def test_choices_for_other_schedules_are_refused_before_other_work(
    choices: dict[str, list[str]], message: str, refusing: Callable[[Program, InheritPlan], object]
) -> None:
    with pytest.raises(PassError, match=message):
        refusing(looped(4), make_plan({"skip": "blocks 1-3", "choices": choices}))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "says 0 of them"),
        ({"every": 2, "full": [0]}, "says 2 of them"),
        ({"every": 0}, "every 0 evaluations"),
        ({"full": [-1]}, "whole numbers from 0"),
        ({"speed": 0.5}, "a number above 1"),
        ({"speed": "2"}, "speed = '2': a number above 1"),
        ({"speed": True}, "a number above 1"),
        ({"every": 2, "skip": ""}, r"skip = \[''\]: texts are needed"),
        ({"full": [1, 4]}, r"full = \[1, 4\]: evaluation 0 has nothing to inherit"),
        (
            {"skip": "x", "choices": {"s": ["x", ""]}},
            "the choices of s begin with 'x': evaluation 0 has nothing",
        ),
        ({"skip": "x", "choices": {"s": ["", 1, "y"]}}, "name 1, which is not in skip"),
        ({"every": 2, "prompts": "a cat"}, "the plan asks for no speed"),
        ({"every": 2, "branch": 1}, "has no 'branch'"),
        ({"choices": {"s": ["x"]}}, "name 'x', which is not in skip"),
        ({"every": 2, "skip": 3}, "cannot be understood"),
        ({"every": 2, "skip": [5]}, r"skip = \[5\]: texts are needed"),
        ({"speed": 2, "prompts": ["a cat", 7]}, "prompts = .*: texts are needed"),
        (True, "not a number, a file or a table"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(value)


def test_a_plan_is_read_from_toml_and_from_json(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text('skip = "branch 3"\nevery = 3\ndense_start = 2\n')
    plan = make_plan(tmp_path / "plan.toml")
    assert plan == InheritPlan(skip=("branch 3",), every=3, dense_start=2)
    save_plan(plan, tmp_path / "plan.json")
    assert make_plan(str(tmp_path / "plan.json")) == plan
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        make_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("name", ["none.json", "none.toml", "none"])
def test_a_plan_that_is_not_there_is_said_to_be_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{name}: the file does not exist: a whole number from 1"):
        make_plan(tmp_path / name)


@pytest.mark.parametrize("number", [0, "0", -1, "-1"])
def test_a_number_below_1_is_no_plan(number: int | str) -> None:
    with pytest.raises(InputError, match=f"inherit {number}: a whole number from 1, or a TOML or JSON file"):
        make_plan(number)


# ---- regions ----


def deepcache(branch: int, blocks: int, layers: int) -> Callable[[str], bool]:
    """What DeepCache skips for a cache_branch_id: its rule, for module paths of a U-Net.

    From https://arxiv.org/abs/2312.00858, section 3.3, and the rule as its users set it: block and layer are
    ``divmod(branch, layers + 1)``; on the way down a layer is skipped from that place on, the downsampler counting
    as the last layer; on the way up, counted from the outermost, after that place.
    """
    at_block, at_layer = divmod(branch, layers + 1)

    def skipped(path: str) -> bool:
        if path.startswith("mid_block"):
            return True
        match = re.match(
            r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)", path
        )
        assert match is not None
        block, kind, layer = int(match[2]), match[3], int(match[4])
        if match[1] == "down":
            layer = layers if kind == "downsamplers" else layer
            return block > at_block or (block == at_block and layer >= at_layer)
        block, layer = blocks - 1 - block, 0 if kind == "upsamplers" else layers - layer
        return block > at_block or (block == at_block and layer > at_layer)

    return skipped


def skipped_modules(model: ir.Model, region: Region) -> set[str]:
    """Modules whose feature maps a step that inherits a region does not compute.

    Conditioning that was traced in a module and is shared with others is not held against it.
    """
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    running = reach(model.graph.outputs, {values[name]: None for name in region.values}, set())
    maps = {node for node in running if any(is_map(value) for value in node.outputs)}
    return {path for path, module in module_tree(model.graph).items() if not maps & {*module.nodes}}


def is_map(value: ir.Value) -> bool:
    floating = value.dtype is not None and value.dtype.is_floating_point()
    return floating and value.shape is not None and value.shape.rank() >= 3


def check_branches(program: Program, blocks: int, layers: int) -> None:
    model = program.segments["denoiser"].model
    found = branches(model.graph)
    assert len(found) == blocks * (layers + 1)  # conv_in, every layer, and all downsamplers but the last
    paths = [
        path
        for path in module_tree(model.graph)
        if re.fullmatch(r"(down|up)_blocks\.\d+\.\w+\.\d+|mid_block\.\w+\.\d+", path)
    ]
    for branch in range(len(found)):
        expected = {path for path in paths if deepcache(branch, blocks, layers)(path)}
        skipped = skipped_modules(model, find_region(model, f"branch {branch}"))
        assert skipped & set(paths) == expected, branch


@pytest.mark.parametrize(("family", "blocks"), [("sd15", 3), ("sdxl", 2)])
def test_branches_skip_what_deepcache_skips(bundle_folder: BundleFolder, family: str, blocks: int) -> None:
    check_branches(whole(bundle_folder(family)), blocks, layers=1)


ARCHITECTURES = {
    "sd15": {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
    },
    "sdxl": {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
    },
}
"""The architectures of unet/config.json of Stable Diffusion 1.5 and SDXL, at a width that costs nothing."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "blocks"), [("sd15", 4), ("sdxl", 3)])
def test_branches_of_the_published_architectures_are_deepcaches(name: str, blocks: int) -> None:
    import tiny
    import torch

    from trimtab.export.examples import hidden_example, sample_example, timestep_example
    from trimtab.export.trace import trace
    from trimtab.export.unet_modules import ConditionalUNet

    inputs = {
        "sample": sample_example(4),
        "timestep": timestep_example(),
        "encoder_hidden_states": hidden_example(16),
    }
    torch.manual_seed(0)
    model = trace(ConditionalUNet(tiny.unet(**ARCHITECTURES[name])), inputs, ["prediction"])
    program = dataclasses.replace(looped(1), segments={"denoiser": Segment("denoiser", model)})
    check_branches(program, blocks, layers=2)


@pytest.mark.xdist_group("sd15")
def test_a_region_that_the_denoiser_lacks_is_refused_by_name(bundle_folder: BundleFolder) -> None:
    model = whole(bundle_folder("sd15")).segments["denoiser"].model
    for name, message in [
        ("branch 6", "branch 6 is to be inherited and the denoiser has the branches 0 to 5"),
        ("blocks 0-1", "the denoiser has the blocks none"),
        ("down_blocks.7.*", r"down_blocks.7.\* is to be inherited and the denoiser has no such module"),
    ]:
        with pytest.raises(PassError, match=message):
            find_region(model, name)


@pytest.mark.xdist_group("sd15")
def test_without_its_middle_a_unet_has_nothing_below_the_innermost_skip(bundle_folder: BundleFolder) -> None:
    model = whole(bundle_folder("sd15")).segments["denoiser"].model
    RemoveLayers(["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"])(model)
    find_region(model, "branch 4")
    with pytest.raises(
        PassError, match="branch 5 is to be inherited and the denoiser has the branches 0 to 4"
    ):
        find_region(model, "branch 5")


@pytest.mark.xdist_group("sd15")
def test_a_residual_branch_is_inherited_by_what_it_adds(bundle_folder: BundleFolder) -> None:
    graph = (model := whole(bundle_folder("sd15")).segments["denoiser"].model).graph
    makers = {str(v.name): n for n in graph for v in n.outputs}
    (resnet,) = find_region(model, "down_blocks.0.resnets.0").values
    assert makers[resnet].op_type == "Conv" and "conv2" in str(makers[resnet].metadata_props)
    (attention,) = find_region(model, "*.0.attentions.0.transformer_blocks.0.attn1").values[:1]
    assert "attn1.to_out" in str(makers[attention].metadata_props)
    before = len(list(graph))
    find_region(model, "layers")
    assert len(list(graph)) == before  # one Add says it: nothing is rewritten


def test_several_blocks_are_inherited_by_what_they_add_together_and_only_once_rewritten() -> None:
    model = looped(1).segments["denoiser"].model
    assert find_region(model, "blocks 1-3").values == ("x4/added",)
    count = len(list(model.graph))
    assert find_region(model, "blocks 1-3").values == ("x4/added",)
    assert len(list(model.graph)) == count == 17


# ---- numbers ----


@pytest.mark.parametrize(
    "regions", [("1-3", "1-2"), ("1-3", "2-4"), ("2-4", "1-3"), ("1-3", "2-3"), ("2-3", "1-3", "3-3", "1-3")]
)
def test_regions_that_share_blocks_skip_the_blocks_that_they_name(regions: tuple[str, ...]) -> None:
    model = chain(6)
    for node in model.graph:
        node.metadata_props[SCOPES] = node.metadata_props[SCOPES].replace("blocks", "transformer_blocks")
    feeds = {"x0": np.random.default_rng(1).standard_normal((3, 1, 8)).astype(np.float32)}
    (expected,) = run_model(model, feeds).values()
    found = [find_region(model, f"blocks {region}") for region in regions]
    (result,) = run_model(model, feeds).values()
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    for region, name in zip(found, regions, strict=True):
        running = reach(model.graph.outputs, {values[v]: None for v in region.values}, set())
        first, last = map(int, name.split("-"))
        products = {node.name for node in model.graph if node.op_type == "MatMul" and node not in running}
        assert products == {f"product{index}" for index in range(first, last + 1)}


@pytest.mark.parametrize(
    ("family", "skip"),
    [
        ("sd15", "branch 0"),
        ("sd15", "branch 3"),
        ("sd15", "layers"),
        ("sd15", "cross-attention"),
        ("dit", "layers"),
        ("dit", "feed-forward"),
        ("controlnet", "branch 0"),
        *(
            (family, skip)
            for family in ("sd3", "flux", "pixart_sigma", "sana", "z_image")
            for skip in ("layers", "self-attention", "blocks 0-0")
        ),
    ],
)
def test_inheriting_from_the_same_step_equals_the_full_pass(
    bundle_folder: BundleFolder, tmp_path: Path, family: str, skip: str
) -> None:
    program = inherit(whole(bundle_folder(family)), InheritPlan(skip=(skip,), every=2))
    name, task = next(iter(program.tasks.items()))
    key, schedule = (
        list(task.schedules.items())[-1] if family == "dit" else next(iter(task.schedules.items()))
    )
    first, second = schedule.steps[:2]

    assert len(second.calls[0].inputs) > len(first.calls[0].inputs)

    def apart(call: Call, result: str) -> Call:
        return dataclasses.replace(
            call,
            inputs={**call.inputs, **first.calls[0].inputs},
            outputs={**call.outputs, "next_sample": "aside", "model_output": result},
        )

    steps = (
        dataclasses.replace(first, calls=(apart(first.calls[0], "full"),)),
        # The second's way of calling, with the first's numbers.
        dataclasses.replace(first, calls=(apart(second.calls[0], "again"),)),
    )
    task = dataclasses.replace(task, schedules={key: Schedule(steps, schedule.prologue)})
    epilogue = tuple(dataclasses.replace(c, inputs={"latents": "aside"}) for c in program.epilogue)
    program = partition(dataclasses.replace(program, tasks={name: task}, epilogue=epilogue))
    options: dict[str, Any] = {"label": 1} if family == "dit" else {"prompt": "a"}
    if family in ("flux", "z_image"):
        options["size"] = (64, 64)
    if family == "controlnet":
        options["control"] = np.full((64, 64, 3), 0.5, np.float32)
    with draft(program, tmp_path) as pipe:
        request, plan, _ = pipe.prepare(seed=0, **options)
        plan.run(request)
        full, again = (plan.buffers[key] for key in ("full", "again"))
        assert np.abs(full).max() > 0
        np.testing.assert_array_equal(again, full)
        weights = plan.steps[1].calls[0].inputs["sample_weights"]
        np.testing.assert_array_equal(weights, np.eye(len(weights))[0])


@pytest.mark.xdist_group("ddpm")
def test_a_bundle_is_compiled_with_inheritance_and_its_weights_do_not_grow(
    bundle_folder: BundleFolder, pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from trimtab.inspection import inspect

    trimtab.compile(pipeline_folder("ddpm"), tmp_path / "b", steps=4, inherit=2)
    plain, ours = (inspect(open_bundle(path)) for path in (bundle_folder("ddpm"), tmp_path / "b"))
    calls = ours["schedules"][0]["calls"]
    assert [len(step) for step in calls] == [3, 2, 3, 2]
    assert all(name.startswith("denoiser.") for step in calls for name in step)

    def weights(bundle: dict[str, Any]) -> int:
        return sum(f["bytes"] for f in bundle["files"] if f["path"].endswith(".weights"))

    assert weights(ours) <= weights(plain)
    with trimtab.load(tmp_path / "b") as pipe:
        assert np.isfinite(pipe(seed=0).pixels).all()
