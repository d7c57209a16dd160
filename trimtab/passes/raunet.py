"""Alternatives to a U-Net's values at its outermost levels: HiDiffusion's RAU-Net and the places of its windows.

https://arxiv.org/abs/2311.17528, section 3.2. A downsampler that takes a quarter of the side in the place of a
half, or a pooling inside of a block, hands everything behind it the feature maps of a picture of half the side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from trimtab.errors import PassError
from trimtab.passes.alternatives import Alternatives, behind, relabel
from trimtab.passes.partition import reach
from trimtab.passes.scopes import Module, module_tree, scopes
from trimtab.passes.sizes import canonical
from trimtab.passes.window_attention import window_attention

CONV, POOL = "conv", "pool"
"""The rewrites: the resolution-aware downsampler, and the pooled path."""

WINDOWS = "windows"
"""Input of the denoiser: int64 (windows,), as long as attention has windows along each side; 1 is the plain graph.

Its numbers mean nothing. What decides sizes is a size itself: so it is known wherever the inputs' sizes are, and an
engine of fixed sizes has it as a constant.
"""

SHIFT = "window_shift"
"""Input of the denoiser: int64 (blocks,), the shift of each block's windows in quarters."""

SCOPE = "hidiffusion"


@dataclass(frozen=True)
class Places:
    """Where a U-Net is rewritten.

    Attributes:
        conv: The down block whose downsampler goes to a quarter of the side.
        pool: The down block that is pooled behind its first pair of ResNet and attention, and the up block whose
            features are scaled back behind the last pair that reads pooled skips.
        windows: Blocks whose self-attention is windowed.
    """

    conv: str
    pool: tuple[str, str]
    windows: tuple[str, ...]

    @property
    def upsampler(self) -> str:
        """What goes back to the size that the rewritten downsampler started from."""
        return f"up_blocks.{_level(self.pool[1]) - _level(self.conv)}.upsamplers.0"

    @property
    def pool_level(self) -> int:
        """How often the latents' side is halved where the pooling begins, the rewritten downsampler counted twice.

        Phases pool inside of what that downsampler leads to only where they rewrite it as well.
        """
        return _level(self.pool[0]) + (_level(self.conv) < _level(self.pool[0]))

    @property
    def window_level(self) -> int:
        """The level of the windowed blocks: 0 is the sample's."""
        return _level(self.windows[0])

    @property
    def windows_are_pooled(self) -> bool:
        """Whether some of the windowed blocks lie between the pooling and the way back."""
        return self.pool[0] in self.windows


Swaps = dict[str, dict[str, str]]
"""For `CONV` and `POOL`: value that is read -> value that stands for it."""


def _level(block: str) -> int:
    return int(block.rpartition(".")[2])


def find_places(model: ir.Model) -> Places:
    """Where a denoiser is rewritten: Stable Diffusion 1 and 2 have attention at the top level, SDXL has none.

    Raises:
        PassError: It is no U-Net, or one of too few levels.
    """
    tree = module_tree(model.graph)
    # By the outermost one, which every level's removal leaves: those on the way up keep their numbers.
    blocks = 1 + max(
        (_level(p) for p in tree if p.startswith("up_blocks.") and p.count(".") == 1), default=-1
    )
    if blocks == 0 or "down_blocks.0" not in tree:
        raise PassError("HiDiffusion rewrites U-Nets, and this denoiser has no down_blocks: leave it out")
    pool = ("down_blocks.1", f"up_blocks.{blocks - 2}")
    if "down_blocks.0.attentions.0" in tree:
        places = Places("down_blocks.0", pool, ("down_blocks.0", f"up_blocks.{blocks - 1}"))
    else:
        places = Places("down_blocks.1", pool, pool)
    for path in (f"{places.conv}.downsamplers.0", places.upsampler, *places.pool, *places.windows):
        if path not in tree:
            raise PassError(
                f"HiDiffusion rewrites {path}, and this denoiser of {blocks} levels has none: leave it out"
            )
    return places


def add_alternatives(model: ir.Model, places: Places) -> tuple[Swaps, int]:
    """Adds all alternatives to a denoiser's graph, in place, and gives its attention windows.

    With one window and no swap the graph computes what it computed, bit for bit.

    Args:
        model: Edited.
        places: Where.

    Returns:
        The alternatives, and the number of blocks that have windows.

    Raises:
        PassError: A module is not built as those that the method was made for.
    """
    graph, tree = model.graph, module_tree(model.graph)
    swaps: Swaps = {CONV: {}, POOL: {}}
    _check_told(tree[places.upsampler])
    pooled = _pooled(tree, places)
    blocks = _add_windows(graph, tree, places, pooled, swaps)
    _add_pool(graph, places, pooled, swaps)
    _add_conv(tree, places, swaps)
    return swaps, blocks


def _add_conv(tree: Mapping[str, Module], places: Places, swaps: Swaps) -> None:
    """The downsampler's own kernel with stride 4 and dilation 2: it sees what it would see of half the picture."""
    module = tree[f"{places.conv}.downsamplers.0"]
    conv = next((n for n in module.nodes if n.op_type == "Conv"), None)
    plain = {"strides": [2, 2], "dilations": [1, 1], "kernel_shape": [3, 3]}
    if conv is None or any(
        list(conv.attributes[name].as_ints()) != wanted
        for name, wanted in plain.items()
        if name in conv.attributes
    ):
        raise PassError(
            f"{module.path} is no 3x3 convolution of stride 2, which HiDiffusion rewrites: leave HiDiffusion out"
        )
    output, source = conv.outputs[0], conv.inputs[0]
    assert output.shape is not None and source is not None and source.shape is not None
    assert output.dtype is not None
    rest = {
        name: value for name, value in conv.attributes.items() if name not in ("auto_pad", *plain, "pads")
    }
    assert conv.graph is not None and isinstance(conv.graph, ir.Graph)
    other = Alternatives(conv.graph, conv, f"{SCOPE}/{module.path}").node(
        "Conv",
        conv.inputs,
        rest | {"kernel_shape": [3, 3], "strides": [4, 4], "dilations": [2, 2], "pads": [2, 2, 2, 2]},
        dtype=output.dtype,
        shape=[*output.shape[:2], *(_part(dim, 4) for dim in source.shape[2:])],
    )
    _check_size(source, tree[places.upsampler])
    for path, upsampler in tree.items():
        if path.startswith("up_blocks.") and path.endswith(".upsamplers.0"):
            _resize_to_sizes(upsampler)
    relabel(output, tree[places.upsampler].nodes)
    swaps[CONV][str(output.name)] = str(other.name)


def _check_size(source: ir.Value, upsampler: Module) -> None:
    """Refuses an upsampler that comes back to other sizes than the downsampler left: every other cut hangs on that."""
    values = (source, _resize(upsampler).outputs[0])
    before, after = (v.shape and [canonical(str(dim)) for dim in v.shape[2:]] for v in values)
    if before != after:
        raise _doubles(upsampler)


def _check_told(upsampler: Module) -> None:
    """Refuses an upsampler whose sides are a multiple of their half, and no longer where other halves come up to it."""
    sides = _resize(upsampler).outputs[0].shape or ()
    if any(re.fullmatch(r"\d+\*\(\w+//\d+\)", str(side)) for side in sides):
        raise _doubles(upsampler)


def _doubles(upsampler: Module) -> PassError:
    return PassError(
        f"{upsampler.path} doubles what it reads, and HiDiffusion needs one that is told the size before, as "
        "Stable Diffusion's are: leave HiDiffusion out"
    )


def _resize(upsampler: Module) -> ir.Node:
    node = next((n for n in upsampler.nodes if n.op_type == "Resize"), None)
    if node is None:
        raise PassError(f"{upsampler.path} has no Resize, which HiDiffusion rewrites: leave HiDiffusion out")
    return node


def _resize_to_sizes(upsampler: Module) -> None:
    """Lets an upsampler that doubles say so in sizes, which another factor can come of (`LocalizeSizes`)."""
    node = _resize(upsampler)
    source = node.inputs[0]
    assert source is not None
    if len(node.inputs) > 3:
        return
    factors = ir.convenience.get_const_tensor(node.inputs[2]) if node.inputs[2] is not None else None
    if factors is None or [*factors.numpy()] != [1, 1, 2, 2]:
        raise PassError(
            f"{upsampler.path} does not double, which HiDiffusion rewrites: leave HiDiffusion out"
        )
    assert isinstance(node.graph, ir.Graph)
    nodes = Alternatives(node.graph, source.producer(), f"{SCOPE}/{upsampler.path}")
    doubled = nodes.ints([1, 1, 2, 2])
    sizes = nodes.int_node("Mul", [nodes.int_node("Shape", [source], [4]), doubled], [4])
    node.resize_inputs(4)
    node.replace_input_with(2, None)
    node.replace_input_with(3, sizes)


def _part(side: int | ir.SymbolicDim, divisor: int) -> int | str:
    """A side divided and rounded up."""
    return -(-side // divisor) if isinstance(side, int) else f"(({side.value}) - 1)//{divisor} + 1"


def _add_pool(graph: ir.Graph, places: Places, pooled_part: tuple[ir.Value, ir.Value], swaps: Swaps) -> None:
    """Pooling behind the first pair, and bicubic scaling back to the size that the features had before."""
    down, up = places.pool
    first, last = pooled_part
    assert first.shape is not None and last.shape is not None
    assert first.dtype is not None and last.dtype is not None
    read = behind(graph, first, f"{SCOPE}/{down}/first")
    pooled = Alternatives(graph, read.producer(), f"{SCOPE}/{down}").node(
        "AveragePool",
        [first],
        {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1},
        dtype=first.dtype,
        shape=[*first.shape[:2], *(_part(dim, 2) for dim in first.shape[2:])],
    )
    # Halved so often, each time rounded up.
    sizes = [f"-(-latent_{side}//{2**places.pool_level})" for side in ("height", "width")]
    back = behind(graph, last, f"{SCOPE}/{up}/last")
    nodes = Alternatives(graph, back.producer(), f"{SCOPE}/{up}")
    rows = nodes.int_node("Shape", [last], [2], start=0, end=2)
    sides = _halved(nodes, _sides(graph, nodes), places.pool_level)
    resized = nodes.node(
        "Resize",
        [last, None, None, nodes.int_node("Concat", [rows, sides], [4], axis=0)],
        {"mode": "cubic", "cubic_coeff_a": -0.75, "coordinate_transformation_mode": "half_pixel"},
        dtype=last.dtype,
        shape=[*last.shape[:2], *sizes],
    )
    producer = back.producer()
    assert producer is not None
    relabel(read, [producer])
    back.shape = last.shape
    swaps[POOL] |= {str(read.name): str(pooled.name), str(back.name): str(resized.name)}


def _pooled(tree: Mapping[str, Module], places: Places) -> tuple[ir.Value, ir.Value]:
    """What is pooled, behind the first pair of ResNet and attention, and what is scaled back: the running features that
    meet the first skip which is not pooled, or leave the block. So layers may be missing.

    Raises:
        PassError: The first pair is missing, or no pooled skip is read where the features are to be scaled back.
    """
    down, up = places.pool
    ends = (
        _feature(tree[path]) for kind in ("attentions", "resnets") if (path := f"{down}.{kind}.0") in tree
    )
    first = next((value for value in ends if value is not None), None)
    if first is None:
        raise PassError(
            f"HiDiffusion pools behind {down}.resnets.0 and {down}.attentions.0, and this denoiser has neither: keep "
            "one of them, or leave HiDiffusion out"
        )
    joins = [n for n in tree[up].nodes if n.op_type == "Concat" and _is_feature(n.outputs[0])]
    plain = [node for node in joins if not _needs(node.inputs[1], first)]
    # An upsampler may read another feature map too, for its sizes.
    leaving = [node for node in tree[f"{up}.upsamplers.0"].nodes if node.op_type == "Resize"]
    last = next((node.inputs[0] for node in (*plain, *leaving)), None)
    if len(plain) == len(joins) or last is None or not _needs(last, first):
        raise PassError(
            f"HiDiffusion scales features back in {up}, and no layer there reads a skip of {down}: keep one of "
            f"{up}.resnets, or leave HiDiffusion out"
        )
    return first, last


def _needs(value: ir.Value | None, other: ir.Value) -> bool:
    """Whether a value is another one, or is computed from it."""
    return value is other or (value is not None and other.producer() in reach([value], {}, set()))


def _is_feature(value: ir.Value) -> bool:
    """Whether it is a feature map: (rows, channels, height, width)."""
    floating = value.dtype is not None and value.dtype.is_floating_point()
    return floating and value.shape is not None and value.shape.rank() == 4


def _feature(module: Module) -> ir.Value | None:
    """A module's result; None where the layer was removed, and at most sizes are left that others read."""
    return next((value for value in reversed(module.outputs) if _is_feature(value)), None)


def _add_windows(
    graph: ir.Graph,
    tree: Mapping[str, Module],
    places: Places,
    pooled: tuple[ir.Value, ir.Value],
    swaps: Swaps,
) -> int:
    """Window attention in the windowed blocks, and the inputs that steer it. Gives their number."""
    attentions = {
        path: attention
        for path in tree
        if path.endswith(".attn1") and any(path.startswith(f"{block}.") for block in places.windows)
        if (attention := _attention(tree[path])) is not None
    }
    int64 = ir.TensorType(ir.DataType.INT64)
    counted = ir.Value(name=WINDOWS, shape=ir.Shape([WINDOWS]), type=int64)
    graph.inputs.append(counted)
    start = Alternatives(graph, None, f"{SCOPE}/{WINDOWS}")
    length = start.int_node("Shape", [counted], [1], start=0, end=1)
    windows = start.int_node("Squeeze", [length, start.ints([0])], [])
    shifts = ir.Value(name=SHIFT, shape=ir.Shape([len(attentions)]), type=int64)
    graph.inputs.append(shifts)
    whole = inside = _grid(graph, places.window_level, "grid")
    if places.windows_are_pooled:
        inside = _grid(graph, places.window_level, "pooled_grid")
        half = _grid(graph, places.window_level + 1, "half_grid")
        swaps[POOL] |= {str(a.name): str(b.name) for a, b in zip(inside, half, strict=True)}
    first, last = pooled
    between = {
        path
        for path, attention in attentions.items()
        if _needs(attention.outputs[0], first) and _needs(last, attention.outputs[0])
    }
    for index, (path, attention) in enumerate(attentions.items()):
        # A part of the attention: whoever skips the module skips its windows.
        nodes = Alternatives(graph, _before(attention), f"{SCOPE}/{path}", scopes(attention))
        shift = nodes.int_node("Gather", [shifts, nodes.ints(index)], [], axis=0)
        grid = inside if path in between else whole
        window_attention(nodes, attention, grid, windows, shift)
    return len(attentions)


def _attention(module: Module) -> ir.Node | None:
    """The operator that is given windows; None where the layer was removed.

    Raises:
        PassError: The attention is there, in other operators.
    """
    operators = {node.op_type: node for node in module.nodes}
    if "Attention" not in operators and "Softmax" in operators:
        raise PassError(
            f"{module.path} has no Attention operator, which HiDiffusion windows: export it again"
        )
    return operators.get("Attention")


def _before(node: ir.Node) -> ir.Node:
    """The node that stands before another in its graph."""
    assert node.graph is not None
    nodes = list(node.graph)
    return nodes[nodes.index(node) - 1]


def _grid(graph: ir.Graph, level: int, name: str) -> tuple[ir.Value, ir.Value]:
    """The numbers of a level's rows and of its columns: int64 (height,) and (width,).

    Arithmetic on sizes alone is repeated by `partition` wherever it is needed, and cannot be swapped. These can, and
    who reads them knows the sizes from theirs.
    """
    nodes = Alternatives(graph, None, f"{SCOPE}/{name}")
    sides = _halved(nodes, _sides(graph, nodes), level)
    zero, one = nodes.ints(0), nodes.ints(1)

    def numbers(axis: int, side: str) -> ir.Value:
        count = nodes.int_node("Gather", [sides, nodes.ints(axis)], [], axis=0)
        # "+ 0": a size of its own, as what `relabel` names.
        return nodes.int_node("Range", [zero, count, one], [f"-(-(latent_{side} + 0)//{2**level})"])

    return numbers(0, "height"), numbers(1, "width")


def _sides(graph: ir.Graph, nodes: Alternatives) -> ir.Value:
    """Height and width of the latents: int64 (2,)."""
    state = next(value for value in graph.inputs if value.name == "state")
    return nodes.int_node("Shape", [state], [2], start=3, end=5)


def _halved(nodes: Alternatives, sides: ir.Value, times: int) -> ir.Value:
    """Sides halved so often, each time rounded up."""
    one, two = nodes.ints([1]), nodes.ints([2])
    for _ in range(times):
        less = nodes.int_node("Sub", [sides, one], [2])
        sides = nodes.int_node("Add", [nodes.int_node("Div", [less, two], [2]), one], [2])
    return sides
