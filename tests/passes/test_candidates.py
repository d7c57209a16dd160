"""What can be removed: found by structure, named by module, and counted exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import residual
import torch
from chains import run_model
from diffusers import UNet2DConditionModel

from trimtab.errors import PassError
from trimtab.export.examples import hidden_example, pooled_example, sample_example, timestep_example
from trimtab.export.trace import Example, trace
from trimtab.export.unet_modules import ConditionalUNet, XLUNet
from trimtab.passes.candidates import Candidates
from trimtab.passes.removal import RemoveLayers
from trimtab.passes.scopes import SCOPES


def test_branches_carry_the_names_of_their_modules() -> None:
    candidates = Candidates(residual.denoiser())
    assert list(candidates) == ["blocks.0", "blocks.1", "blocks.2"]
    assert [c.parameters for c in candidates.values()] == [2 * 6 * 4, 2 * 6 * 8, 2 * 6 * 12]
    assert candidates["blocks.1"].bytes == 4 * candidates["blocks.1"].parameters


def test_a_graph_without_module_names_has_the_same_branches() -> None:
    named, bare = Candidates(residual.denoiser()), Candidates(residual.denoiser(named=False))
    assert [c.parameters for c in bare.values()] == [c.parameters for c in named.values()]
    assert all("->" in name for name in bare)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(PassError, match=r"called block\.1: did you mean .*blocks\.1"):
        Candidates(residual.denoiser()).check(["block.1"])


def test_the_fingerprint_is_of_the_architecture_and_not_of_the_weights() -> None:
    model, other = residual.denoiser(), residual.denoiser((4, 8, 13))
    before = Candidates(model).fingerprint
    value = model.graph.initializers["blocks.0.first.weight"]
    assert value.const_value is not None
    value.const_value = ir.tensor(2 * value.const_value.numpy(), name=value.name)
    assert Candidates(model).fingerprint == before != Candidates(other).fingerprint


def wrapped() -> ir.Model:
    """Two branches with a weight in common, in a module that another one holds and adds nothing to."""
    model = residual.denoiser((4, 4))
    nodes = list(model.graph)
    shared = model.graph.initializers["blocks.0.second.weight"]
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is not None and value.name == "blocks.1.second.weight":
                node.replace_input_with(index, shared)
        text = node.metadata_props.get(SCOPES, "")
        if "blocks" in text:
            node.metadata_props[SCOPES] = text.replace("'blocks'", "'outer', 'blocks'", 1)
    return model


def test_of_two_candidates_with_one_bypass_one_lies_inside_of_the_other() -> None:
    candidates = Candidates(wrapped())
    inside = {name: c.inside for name, c in candidates.items() if c.kind == "block"}
    assert inside == {"outer": ("blocks.0", "blocks.1", "blocks"), "blocks": ("blocks.0", "blocks.1")}
    assert candidates.freed(inside) == candidates.freed(["outer"]) == candidates.freed(["blocks"]) > (0, 0)


def test_removing_both_of_two_candidates_with_one_bypass_removes_them() -> None:
    model = wrapped()
    assert RemoveLayers(["blocks", "outer"])(model).applied == ("outer",)
    assert not model.graph.initializers.keys() & {"blocks.0.first.weight", "blocks.1.first.weight"}


class Beside(torch.nn.Module):
    """x + a(x) + b(x), both scaled by a modulation: the two attentions of SD3.5's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.attn, self.attn2 = (torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor, time: torch.Tensor, made: list[torch.Tensor]) -> torch.Tensor:
        if not made:  # the exporter makes once, in the first block, what every block says alike
            made.append(time[:, None].expand(-1, 2, -1).sin())
        scale, shift = made[0].chunk(2, dim=1)
        gate, read = self.modulation(time)[:, None], x * scale + shift
        return x + gate * self.attn(read) + gate * self.attn2(read)


class TwoBeside(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList(Beside() for _ in range(2))

    def forward(self, sample: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        made: list[torch.Tensor] = []
        for block in self.transformer_blocks:
            sample = block(sample, time, made)
        return sample.tanh()


def test_branches_side_by_side_and_the_block_that_makes_the_time_for_all_can_go() -> None:
    torch.manual_seed(0)
    whole, (sample, time) = TwoBeside().eval(), (torch.randn(2, 6, 8), torch.randn(2, 8))
    examples = {
        "sample": Example(sample, ("n", "length", None)),
        "time": Example(time, ("n", None)),
    }
    model = trace(whole, examples, ["prediction"])
    found = Candidates(model)
    branches = [f"transformer_blocks.{block}.{name}" for block in (0, 1) for name in ("attn", "attn2")]
    blocks = ["transformer_blocks.0", "transformer_blocks.1"]
    assert list(found) == branches + blocks
    assert found[blocks[0]].parameters == found[blocks[1]].parameters == 3 * (8 * 8 + 8)
    for removed in ([branches[1]], branches[:2], blocks[:1]):
        pruned = model.clone()
        RemoveLayers(removed)(pruned)
        left = copy.deepcopy(whole)
        silent = branches[:2] if removed == blocks[:1] else removed
        with torch.no_grad():
            for name in silent:
                left.get_parameter(f"{name}.weight").zero_()
                left.get_parameter(f"{name}.bias").zero_()
            expected = left(sample, time).numpy()
        (result,) = run_model(pruned, {"sample": sample.numpy(), "time": time.numpy()}).values()
        np.testing.assert_allclose(result, expected, atol=1e-6)


def test_a_dit_block_frees_its_modulation_only_as_a_whole(bundle_folder: Callable[[str], Path]) -> None:
    candidates = Candidates(ir.load(bundle_folder("dit") / "graphs" / "denoiser.onnx"))
    assert {c.kind for c in candidates.values()} == {"branch", "block"}
    block = candidates["transformer_blocks.0"]
    assert block.inside == ("transformer_blocks.0.attn1", "transformer_blocks.0.ff")
    assert block.parameters > sum(candidates[name].parameters for name in block.inside)
    assert candidates.freed(block.inside) == candidates.freed([block.name])


@pytest.mark.xdist_group("sdxl")
def test_an_up_block_goes_with_its_skip_where_the_channels_allow(
    bundle_folder: Callable[[str], Path],
) -> None:
    candidates = Candidates(ir.load(bundle_folder("sdxl") / "graphs" / "denoiser.onnx"))
    pairs = [name for name, c in candidates.items() if c.kind == "pair"]
    # The first block of the last level takes 16 channels and gives 8: it stays.
    assert pairs == [
        "up_blocks.0.resnets.0+attentions.0+skip",
        "up_blocks.0.resnets.1+attentions.1+skip",
        "up_blocks.1.resnets.1+skip",
    ]
    inside = candidates[pairs[0]].inside
    assert {"up_blocks.0.resnets.0", "up_blocks.0.attentions.0"} <= set(inside)


# ---- BK-SDM ----

PUBLISHED = {"whole": 859_520_964, "bk-sdm-base": 579_384_964, "bk-sdm-tiny": 323_384_964}
"""Parameters of Stable Diffusion 1.4's U-Net and of two students (https://arxiv.org/abs/2305.15798, table 1)."""


def stable_diffusion(kind: str, width: int) -> UNet2DConditionModel:
    """The U-Net of Stable Diffusion 1.4, or of a BK-SDM student as its configuration says; 320 is the real width."""
    levels = 3 if kind == "bk-sdm-tiny" else 4
    down = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[width, 2 * width, 4 * width, 4 * width][:levels],
        down_block_types=down[:levels],
        up_block_types=up[-levels:],
        layers_per_block=2 if kind == "whole" else 1,
        mid_block_type=None if kind in ("bk-sdm-small", "bk-sdm-tiny") else "UNetMidBlock2DCrossAttn",
        cross_attention_dim=768,
        attention_head_dim=width // 40,
        norm_num_groups=width // 10,
    )
    return model.eval()


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def traced(unet: UNet2DConditionModel, wrapper: torch.nn.Module, inputs: dict[str, Example]) -> Candidates:
    """Of a U-Net's graph of fixed sizes, in which every parameter is an initializer of its own."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # equal tensors, such as fresh norms, are one initializer
        for parameter in unet.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    examples = {"sample": sample_example(4), "timestep": timestep_example(), **inputs}
    fixed = {name: Example(example.tensor) for name, example in examples.items()}  # traced in half the time
    candidates = Candidates(trace(wrapper, fixed, ["prediction"]))
    assert set(dict(unet.named_parameters())) <= {parameter_of(v.name or "") for v in candidates.all_weights}
    return candidates


def parameter_of(initializer: str) -> str:
    return initializer.removesuffix(".T")


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_configurations_are_those_of_the_published_counts(kind: str) -> None:
    with torch.device("meta"):
        assert parameters(stable_diffusion(kind, 320)) == PUBLISHED[kind]


def test_handcrafted_choices_leave_exactly_the_students_of_bk_sdm() -> None:
    from trimtab.calibration.choice import by_hand

    width = 40
    unet = stable_diffusion("whole", width)
    candidates = traced(unet, ConditionalUNet(unet), {"encoder_hidden_states": hidden_example(768)})
    whole = parameters(unet)
    for kind in ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"):
        removed = candidates.freed(by_hand(candidates, kind))[0]
        assert whole - removed == parameters(stable_diffusion(kind, width)), kind


# ---- SDXL ----

SDXL = 2_567_463_684
"""Parameters of its U-Net (https://arxiv.org/abs/2307.01952, table 1, says 2.6 B)."""


def sdxl(width: int) -> UNet2DConditionModel:
    """SDXL's U-Net as its configuration says; 320 is the real width."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=[width, 2 * width, 4 * width],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048 if width == 320 else 32,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
        norm_num_groups=width // 10,
    ).eval()


def test_sdxl_is_counted_without_its_weights() -> None:
    with torch.device("meta"):
        assert parameters(sdxl(320)) == SDXL


@pytest.mark.slow
def test_half_of_sdxl_can_go_and_leaves_a_billion_and_a_quarter() -> None:
    """What goes is found in a narrow graph of the same structure, and counted at the real width by name."""
    from trimtab.calibration.choice import Wish, by_chance, by_loss
    from trimtab.calibration.measures import Measure

    narrow = sdxl(40)
    inputs = {"encoder_hidden_states": hidden_example(32), "text_embeds": pooled_example(2816 - 6 * 256)}
    candidates = traced(narrow, XLUNet(narrow, 8), inputs)
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in sdxl(320).named_parameters()}

    def freed(names: Iterable[str]) -> int:
        return sum(sizes.get(parameter_of(name), 0) for name in candidates.lost(names))

    real = Measure("parameters", "parameters", sum(sizes.values()), freed)
    assert real.total == SDXL
    generator = np.random.default_rng(0)
    losses = {name: float(10 ** generator.uniform(-8, 0)) for name in candidates}
    for removed in (
        by_loss(candidates, Wish(0.5), losses, real),
        by_chance(candidates, Wish(0.5), 0, real),
    ):
        assert 1.2e9 < SDXL - freed(removed) <= SDXL / 2
    assert SDXL - freed(by_loss(candidates, Wish(0.5), losses, real)) > 1.27e9


def test_a_level_may_begin_with_any_output_of_a_node() -> None:
    text = """
    g (float[N,4,8,8] x) => (float[N,8,8,8] y)
    <float[4] scales = {1, 1, 0.5, 0.5}, float[4] twice = {1, 1, 2, 2}, float[4,2,1,1] w = {1, 2, 3, 4, 5, 6, 7, 8},
     float[N,4,8,8] skip, float[N,2,8,8] a, float[N,2,8,8] b, float[N,2,4,4] down,
     float[N,2,8,8] up, float[N,4,8,8] running> {
        skip = Tanh (x)
        a, b = Split <axis = 1, num_outputs = 2> (skip)
        down = Resize (b, , scales)
        up = Resize (down, , twice)
        running = Conv (up, w)
        y = Concat <axis = 1> (running, skip)
    }
    """
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 23]>\n{text}')
    assert [c.kind for c in Candidates(model).values()] == ["level"]
