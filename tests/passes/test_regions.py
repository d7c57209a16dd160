"""What stands for a block of a transformer: what it adds to its streams, and nothing that other blocks read too."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from chains import add, chain, run_model
from chains import program as program_of

from trimtab.errors import PassError
from trimtab.export.trace import Example, trace
from trimtab.passes.inherit import inherit
from trimtab.passes.inherit_plan import InheritPlan
from trimtab.passes.partition import reach
from trimtab.passes.regions import find_region
from trimtab.passes.scopes import scopes
from trimtab.program import Call

WIDTH = 8
TOKENS = 3


class Block(torch.nn.Module):
    """A layer on text and picture joined (Flux's single blocks), scaled by a time and turned by positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(WIDTH, WIDTH)

    def forward(
        self, text: torch.Tensor, x: torch.Tensor, time: torch.Tensor, made: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not made:  # the exporter makes once, in the first block, what every block says alike
            made.append(time[:, None].expand(-1, 2, -1).reshape(time.shape[0], 2, WIDTH).sin())
            made.append(torch.arange(TOKENS + x.shape[1], dtype=x.dtype)[None, :, None].cos())
        scale, shift = made[0].chunk(2, dim=1)
        joined = torch.cat([text, x], dim=1)
        joined = joined + self.layer(joined * made[1]) * scale + shift
        return joined[:, :TOKENS], joined[:, TOKENS:]


class Blocks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.single_transformer_blocks = torch.nn.ModuleList(Block() for _ in range(4))

    def forward(self, x0: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        x, made = x0, list[torch.Tensor]()
        for block in self.single_transformer_blocks:
            text, x = block(text, x, time, made)
        return x + text.mean(dim=1, keepdim=True)


class Left(Block):
    """What is left of the first block once it is removed: what it made for all."""

    def forward(
        self, text: torch.Tensor, x: torch.Tensor, time: torch.Tensor, made: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        super().forward(text, x, time, made)
        return text, x


def traced(first: torch.nn.Module | None = None) -> ir.Model:
    torch.manual_seed(0)
    blocks = Blocks()
    if first is not None:
        blocks.single_transformer_blocks[0] = first
    examples = {
        "x0": Example(torch.randn(2, 6, WIDTH), ("n", "length", None)),
        "text": Example(torch.randn(2, TOKENS, WIDTH), ("n", None, None)),
        "time": Example(torch.randn(2, WIDTH), ("n", None)),
    }
    return trace(blocks.eval(), examples, ["x"])


def given(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"x0": (2, 5, WIDTH), "text": (2, TOKENS, WIDTH), "time": (2, WIDTH)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_streams_that_a_block_joins_and_parts_are_inherited_by_what_is_added_to_each() -> None:
    model = traced()
    (expected,) = run_model(model, given(0)).values()
    region = find_region(model, "blocks 1-2")
    assert len(region.values) == 2 and all(name.endswith("/added") for name in region.values)
    np.testing.assert_allclose(run_model(model, given(0))["x"], expected, atol=1e-5)
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    running = reach(model.graph.outputs, {values[name]: None for name in region.values}, set())
    paths = {path for node in running if node.op_type in ("MatMul", "Gemm") for path in scopes(node)}
    assert {path for path in paths if path.endswith(".layer")} == {
        "single_transformer_blocks.0.layer",
        "single_transformer_blocks.3.layer",
    }


def test_no_block_inherits_the_time_or_the_positions_that_it_makes_for_all() -> None:
    model = traced()
    region = find_region(model, "blocks 0-1")
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    lengths = {str(values[name].shape) for name in region.values}
    assert len(region.values) == 2 and lengths == {f"[n,{TOKENS},{WIDTH}]", f"[n,length,{WIDTH}]"}


def test_what_a_removed_block_made_for_all_is_no_block() -> None:
    model = traced(Left())
    assert any("single_transformer_blocks.0" in scopes(node) for node in model.graph)
    region = find_region(model, "blocks 0-0")
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    running = reach(model.graph.outputs, {values[name]: None for name in region.values}, set())
    paths = {path for node in running for path in scopes(node) if path.endswith(".layer")}
    assert paths == {f"single_transformer_blocks.{block}.layer" for block in (2, 3)}
    with pytest.raises(PassError, match="the denoiser has the blocks 0 to 2"):
        find_region(model, "blocks 3-3")
    with pytest.raises(PassError, match="no such module"):
        find_region(model, "single_transformer_blocks.0")


def test_positions_that_no_step_keeps_do_not_make_every_step_a_full_one() -> None:
    model = traced()
    one = Call("denoiser", {name: name for name in ("x0", "text", "time")}, {"x": "y"})
    program = inherit(program_of(model, one, one), InheritPlan(skip=("layers",), every=2))
    full, inheriting = (step.calls[0] for step in program.tasks["t"].schedules["s"].steps)
    assert full.inputs == one.inputs and len(inheriting.inputs) > len(one.inputs)


class Apart(torch.nn.Module):
    """A block of two streams of which one never reads the other: SD3's without the attention of its text."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = torch.nn.Linear(WIDTH, WIDTH)
        self.ff_context = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, text: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return text + self.ff_context(text), x + self.ff(x * text.mean(dim=1, keepdim=True))


class TwoStreams(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList(Apart() for _ in range(2))

    def forward(self, x0: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        for block in self.transformer_blocks:
            text, x0 = block(text, x0)
        return x0 + text.mean(dim=1, keepdim=True)


def test_a_stream_that_follows_from_fewer_inputs_than_the_other_is_inherited_too() -> None:
    examples = {
        "x0": Example(torch.randn(2, 6, WIDTH), ("n", "length", None)),
        "text": Example(torch.randn(2, TOKENS, WIDTH), ("n", None, None)),
    }
    model = trace(TwoStreams().eval(), examples, ["x"])
    region = find_region(model, "blocks 0-0")
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    running = reach(model.graph.outputs, {values[name]: None for name in region.values}, set())
    paths = {path for node in running for path in scopes(node)}
    assert len(region.values) == 2
    assert {path for path in paths if ".ff" in path} == {
        f"transformer_blocks.1.{layer}" for layer in ("ff", "ff_context")
    }


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("self-attention", ("joint", "second", "cross_reads")),
        ("cross-attention", ("cross",)),
        ("feed-forward", ("picture", "text", "single")),
    ],
)
def test_units_are_those_of_every_transformer(unit: str, expected: tuple[str, ...]) -> None:
    modules = {
        "joint": "transformer_blocks.0.attn",
        "second": "transformer_blocks.0.attn2",  # SD3.5: of the picture alone
        "picture": "transformer_blocks.0.ff",
        "text": "transformer_blocks.0.ff_context",
        "cross_reads": "transformer_blocks.1.attn1",
        "cross": "transformer_blocks.1.attn2",
        "single": "single_transformer_blocks.0.act_mlp",
    }
    model = chain(1)
    graph = model.graph
    value = graph.outputs.pop()
    for name, path in modules.items():
        value = add(graph, path, "Relu", [value], name)
    graph.outputs.append(add(graph, "norm_out", "Neg", [value], "out"))
    assert find_region(model, unit).values == expected


def test_a_size_that_another_module_reads_is_no_feature() -> None:
    """A convolution on a ResNet block's shortcut, whose sides the attention behind it asks for (DDPM)."""
    model = chain(2)
    product = next(v for node in model.graph for v in node.outputs if v.name == "product0")
    add(model.graph, "blocks.1", "Shape", [product], "sides")
    assert find_region(model, "blocks.0").values == ("branch0",)
