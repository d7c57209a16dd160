"""Cutting graphs: few segments, each node in one of them, the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from chains import Tensors, add, call, chain, program, run_model, run_step
from graphs import model as graph_of
from graphs import value as open_value

from trimtab.errors import PassError
from trimtab.export.trace import Example, trace
from trimtab.passes.partition import partition, reach
from trimtab.passes.scopes import SCOPES
from trimtab.passes.sizes import LocalizeSizes
from trimtab.passes.symbols import own_symbols
from trimtab.program import Program
from trimtab.shapes import evaluate


def inputs(rows: int = 3) -> Tensors:
    return {"x": np.random.default_rng(1).standard_normal((rows, 1, 8)).astype(np.float32)}


def segments(cut: Program) -> list[list[str]]:
    return [
        [str(node.outputs[0].name) for node in s.model.graph]
        for name, s in cut.segments.items()
        if name.startswith("denoiser")
    ]


def test_a_program_that_names_no_inner_values_is_left_as_it_is() -> None:
    whole = program(chain(2), call(chain(2)))
    cut = partition(whole)
    assert cut.segments == whole.segments and cut.tasks == whole.tasks and cut.passes == ()


def test_partitioned_equals_whole_bit_for_bit_and_inheriting_from_the_same_step_equals_it() -> None:
    model = chain(5)
    expected = run_model(model, {"x0": inputs()["x"]})["x5"]
    full, inheriting = call(model, kept={"branch2": "denoiser/b"}), call(model, {"branch2": "denoiser/b"})
    cut = partition(program(model, full, inheriting))
    tensors = inputs()
    for step in cut.tasks["t"].schedules["s"].steps:
        run_step(cut, step, tensors)
        np.testing.assert_array_equal(tensors.pop("y"), expected)


def test_one_region_makes_three_segments_and_a_step_that_inherits_calls_two() -> None:
    model = chain(5)
    cut = partition(program(model, call(model, kept={"x4": "f"}), call(model, {"x4": "f"})))
    steps = cut.tasks["t"].schedules["s"].steps
    # x4 hides everything before it; the last block needs nothing else.
    assert [len(s.calls) for s in steps] == [2, 1]
    assert len(segments(cut)) == 2
    model = chain(5)
    cut = partition(program(model, call(model, kept={"branch3": "f"}), call(model, {"branch3": "f"})))
    assert [len(s.calls) for s in cut.tasks["t"].schedules["s"].steps] == [3, 2]
    assert segments(cut)[1] == ["product3", "branch3"]


@pytest.mark.parametrize(
    ("regions", "count"),
    [
        ((["branch1"], ["branch1", "branch3"]), 5),  # a second region beside the first
        ((["branch1", "branch3"],), 5),  # two that always go together are of one kind, yet apart in the graph
        ((["branch1"], ["x3"]), 4),  # x3 holds branch1: nested
        (
            (["branch1", "branch2"], ["branch2", "branch3"]),
            7,
        ),  # overlapping: three branches, four sums between
    ],
)
def test_regions_that_nest_or_overlap_give_the_fewest_segments(
    regions: tuple[list[str], ...], count: int
) -> None:
    model = chain(5)
    kept = {v: f"denoiser/{v}" for region in regions for v in region}
    calls = [call(model, kept=kept)]
    calls += [call(model, {v: f"denoiser/{v}" for v in region}) for region in regions]
    cut = partition(program(model, *calls))
    assert len(segments(cut)) == count


@pytest.mark.parametrize("seed", range(8))
def test_no_other_order_of_a_random_graph_has_fewer_segments(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = chain(1)
    graph, values = model.graph, list(model.graph.outputs)
    for k in range(9):
        first, second = (values[int(i)] for i in rng.integers(0, len(values), 2))
        values.append(add(graph, "", "Add", [first, second], f"v{k}"))
    ends = [v for v in values if not list(v.uses())]
    last = ends[0]
    for k, value in enumerate(ends[1:]):
        last = add(graph, "", "Add", [last, value], f"end{k}")
    graph.outputs[:] = [last]
    chosen = [str(v.name) for v in rng.choice(np.array(values[1:-1], object), 2, replace=False)]
    calls = [call(model, kept={v: v for v in chosen}), *(call(model, {v: v}) for v in chosen)]
    needs = [reach(graph.outputs, {v: None for v in values if v.name == name}, set()) for name in chosen]
    sort = {str(n.outputs[0].name): tuple(n in need for need in needs) for n in graph}
    makers = {str(n.outputs[0].name): {str(v.name) for v in n.inputs if v and v.producer()} for n in graph}

    def fewest() -> int:
        ways, count = {frozenset[str]()}, 0
        while frozenset(sort) not in ways:
            ways = {done for way in ways for kind in set(sort.values()) if (done := grown(way, kind)) != way}
            count += 1
        return count

    def grown(way: frozenset[str], kind: tuple[bool, ...]) -> frozenset[str]:
        while ready := {n for n in sort if n not in way and sort[n] == kind and makers[n] <= way}:
            way |= ready
        return way

    expected = fewest()
    assert len(segments(partition(program(model, *calls)))) == expected


def test_every_node_and_every_weight_stands_in_exactly_one_segment() -> None:
    model = chain(6)
    names = [str(node.outputs[0].name) for node in model.graph]
    calls = [
        call(model, kept={"branch1": "a", "x4": "b"}),
        call(model, {"branch1": "a"}),
        call(model, {"x4": "b"}),
    ]
    cut = partition(program(model, *calls))
    assert sorted(n for part in segments(cut) for n in part) == sorted(names)
    weights = [name for s in cut.segments.values() for name in s.model.graph.initializers]
    assert sorted(weights) == [f"W{k}" for k in range(6)]


def test_what_is_computed_from_constants_stands_with_its_reader_and_does_not_cross() -> None:
    model = chain(3)
    graph = model.graph
    codes = ir.Value(
        name="codes",
        shape=ir.Shape([8, 8]),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(np.ones((8, 8), np.float32), name="codes"),
    )
    graph.register_initializer(codes)
    node = ir.node("Neg", [codes], name="decoded")
    node.outputs[0].name = "decoded"
    graph.insert_before(graph.node(0), node)
    graph.node("product1").replace_input_with(1, node.outputs[0])
    cut = partition(program(model, call(model, kept={"branch1": "f"}), call(model, {"branch1": "f"})))
    assert segments(cut)[1] == ["decoded", "product1", "branch1"]
    assert [v.name for v in cut.segments["denoiser.1"].model.graph.inputs] == ["x1"]


def test_a_value_may_stand_for_another_and_gets_a_tensor_of_its_own_downstream() -> None:
    model = chain(3)
    graph = model.graph
    other = ir.node("Neg", [graph.node("x1").outputs[0]], name="other")
    output = other.outputs[0]
    output.name, output.type, output.shape = "other", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", 1, 8])
    graph.insert_after(graph.node("x1"), other)
    plain, swapped = call(model), call(model, {"branch1": "denoiser/other"}, {"other": "denoiser/other"})
    cut = partition(program(model, plain, swapped))
    tensors, steps = inputs(), cut.tasks["t"].schedules["s"].steps
    run_step(cut, steps[0], tensors)
    np.testing.assert_array_equal(tensors["y"], run_model(chain(3), {"x0": tensors["x"]})["x3"])
    run_step(cut, steps[1], tensors)
    x1 = run_model(chain(1), {"x0": tensors["x"]})["x1"]
    w2 = graph.initializers["W2"].const_value
    assert w2 is not None
    x2 = x1 - x1
    np.testing.assert_allclose(tensors["y"], x2 + np.maximum(x2 @ w2.numpy(), 0), atol=1e-6)
    # The tail is one segment for both.
    assert [c.segment for c in steps[0].calls][-1] == [c.segment for c in steps[1].calls][-1]


def test_a_cut_at_a_value_that_the_graph_lacks_is_refused_by_name() -> None:
    model = chain(2)
    with pytest.raises(PassError, match="cut at nowhere, and the graph has no such value"):
        partition(program(model, call(model, kept={"nowhere": "f"})))


def test_a_schedule_that_reads_a_feature_before_any_step_wrote_it_is_refused_by_name() -> None:
    model = chain(3)
    calls = [call(model, {"branch1": "denoiser/b"}), call(model, kept={"branch1": "denoiser/b"})]
    with pytest.raises(PassError, match=r"step 0 of s \(t\) reads denoiser/b in denoiser.2 before any step"):
        partition(program(model, *calls))


def test_a_value_whose_shape_is_not_known_is_refused_by_name() -> None:
    model = chain(3)
    model.graph.node("branch1").outputs[0].shape = None
    calls = [call(model, kept={"branch1": "f"}), call(model, {"branch1": "f"})]
    with pytest.raises(PassError, match="cut at branch1, and its type is FLOAT and its shape None"):
        partition(program(model, *calls))


def test_the_sizes_of_a_part_follow_from_its_own_inputs() -> None:
    model = chain(3)
    for node in model.graph:
        for value in node.outputs:
            value.shape = ir.Shape(["n*(m//2)", 8])
    model.graph.inputs[0].shape = ir.Shape(["n*(m//2)", 8])
    cut = partition(program(model, call(model, kept={"branch1": "f"}), call(model, {"branch1": "f"})))
    for segment in cut.segments.values():
        assert [str(v.shape) for v in segment.model.graph.outputs] == ["[size_0,8]"] * len(
            segment.model.graph.outputs
        )


class Patches(torch.nn.Module):
    """2x2 patches, two layers with positions, and patches back: what a transformer does with open sizes.

    Args:
        positions: "computed" from the sizes, in every layer (Flux), or "cropped" once from a table (SD3).
    """

    def __init__(self, positions: str) -> None:
        super().__init__()
        self.positions = positions
        self.table = torch.nn.Parameter(torch.randn(1, 16, 16, 12))
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(12, 12) for _ in range(2))

    def forward(self, x0: torch.Tensor) -> torch.Tensor:
        rows, channels, height, width = x0.shape
        x = x0.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(rows, (height // 2) * (width // 2), 12)
        down = torch.arange(height // 2)[:, None].expand(-1, width // 2)
        computed = down.reshape(-1, 1).to(x.dtype).sin()
        if self.positions == "cropped":
            x = x + self.table[:, : height // 2, : width // 2].reshape(1, -1, 12)
        for block in self.blocks:
            x = x + block(x * computed if self.positions == "computed" else x)
        x = x.reshape(rows, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(rows, channels, height, width)


@pytest.mark.parametrize("positions", ["computed", "cropped"])
def test_a_transformer_s_tail_without_a_tensor_of_its_sizes_takes_them_from_the_sample(
    positions: str,
) -> None:
    torch.manual_seed(0)
    module = Patches(positions).eval()
    example = Example(torch.randn(2, 3, 12, 10), ("n", None, "h", "w"))
    model = trace(module, {"x0": example}, ["x"])
    layer = [node for node in model.graph if "blocks.0" in node.metadata_props.get(SCOPES, "")]
    kept = {str(layer[-1].outputs[0].name): "f"}
    whole = program(model, call(model, kept=kept), call(model, kept))
    assert (
        partition(whole).segments.keys() == partition(whole).segments.keys()
    )  # a search cuts for itself first
    cut = partition(whole)
    full, tail = cut.tasks["t"].schedules["s"].steps
    assert [len(full.calls), len(tail.calls)] == [3, 2]
    tensors: Tensors = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 14)).astype(np.float32)}
    expected = module(torch.from_numpy(tensors["x"])).detach().numpy()
    for step in (full, tail):
        run_step(cut, step, tensors)
        np.testing.assert_allclose(tensors.pop("y"), expected, atol=1e-5)
    holders = [name for name, s in cut.segments.items() if "table" in s.model.graph.initializers]
    assert len(holders) == (positions == "cropped")


def test_a_size_that_is_named_in_a_part_takes_no_name_that_another_has() -> None:
    first, second = open_value("first", ["n*(m//2)", 8]), open_value("second", ["size_0", 8])
    nodes = [ir.node("Neg", [first]), ir.node("Neg", [second])]
    for node, value in zip(nodes, (first, second), strict=True):
        node.outputs[0].name, node.outputs[0].type = f"{value.name} negated", value.type
        node.outputs[0].shape = value.shape
    graph = graph_of([first, second], nodes, [node.outputs[0] for node in nodes]).graph
    own_symbols("part", graph)
    assert [str(value.shape) for value in graph.inputs] == ["[size_1,8]", "[size_0,8]"]
    assert [str(value.shape) for value in graph.outputs] == ["[size_1,8]", "[size_0,8]"]


def test_what_a_convolution_pads_by_itself_says_nothing_of_its_sizes() -> None:
    def part(**attributes: Any) -> ir.Graph:
        x, weight = open_value("x", ["n", 1, "h", "w"]), open_value("weight", [1, 1, 3, 3])
        node = ir.node("Conv", [x, weight], {"strides": [2, 2], **attributes})
        node.outputs[0].name, node.outputs[0].type = "y", x.type
        node.outputs[0].shape = ir.Shape(["n", 1, "down(h)", "down(w)"])
        return graph_of([x, weight], [node], node.outputs).graph

    plain = part()
    own_symbols("part", plain)
    assert evaluate(str(plain.outputs[0].shape[2]), {"h": 64}) == 31
    with pytest.raises(PassError, match="nothing that it reads says that"):
        own_symbols("part", part(auto_pad="SAME_UPPER"))


def test_a_resize_of_some_axes_keeps_its_sizes() -> None:
    text = """
        <ir_version: 10, opset_import: ["": 23]>
        g (float[n, 3, h, w] x) => (float[n, 3, a, b] y) <int64[1] two = {2}> {
            shape = Shape <start = 2> (x)
            sizes = Mul (shape, two)
            y = Resize <axes = [2, 3], mode = "nearest"> (x, , , sizes)
        }
    """
    model = ir.from_onnx_text(text)
    next(node for node in model.graph if node.op_type == "Mul").outputs[0].dtype = ir.DataType.INT64
    result = LocalizeSizes()(model)
    assert not result.modified
    assert [refusal.reason for refusal in result.refused] == ["its sizes are those of some axes alone"]


def test_a_join_is_as_long_as_its_parts_however_their_sum_is_written() -> None:
    """A picture's tokens that are filled up to groups, with a text's behind them: Z-Image's stream."""
    picture, text = open_value("picture", ["n", "w*h + PythonMod(-w*h, 8)"]), open_value("text", ["n", "t"])
    join = ir.node("Concat", [picture, text], {"axis": 1})
    join.outputs[0].name, join.outputs[0].type = "joined", picture.type
    join.outputs[0].shape = ir.Shape(["n", "t + w*h + (PythonMod(-w*h, 8))"])
    graph = graph_of([picture, text], [join], join.outputs).graph
    own_symbols("part", graph)
    assert [str(given.shape) for given in graph.inputs] == ["[n,size_0]", "[n,t]"]
    assert graph.outputs[0].shape is not None
    sizes = {"n": 2, "size_0": 40, "t": 7}
    assert [evaluate(str(size), sizes) for size in graph.outputs[0].shape] == [2, 47]


@pytest.mark.parametrize(
    ("read", "doubled"),
    [("(n - 1)//2 + 1", "2*((n - 1)//2) + 2"), ("2*(n//8)", "4*(n//8)"), ("2*(n//8) + 2", "4*(n//8) + 4")],
)
def test_a_size_that_was_doubled_and_multiplied_out_follows_from_the_one_that_it_is_twice(
    read: str, doubled: str
) -> None:
    model = chain(3)
    for value in (model.graph.inputs[0], *(v for node in model.graph for v in node.outputs)):
        # As the exporter writes the size behind an upsampler.
        value.shape = ir.Shape([doubled if value.name == "x3" else read, 1, 8])
    cut = partition(program(model, call(model, kept={"branch1": "f"}), call(model, {"branch1": "f"})))
    last = list(cut.segments.values())[-1].model.graph
    (given, *_), (made,) = ([str(v.shape) for v in values] for values in (last.inputs, last.outputs))
    assert given == "[size_0,1,8]"
    size = made.removeprefix("[").removesuffix(",1,8]")
    assert [evaluate(size, {"size_0": half}) for half in (4, 8)] == [8, 16]
