"""What can be inherited from an earlier step: regions of a denoiser by name, and the tensors that stand for them.

| name | what is not run | what is inherited |
|---|---|---|
| ``branch K`` | a U-Net's blocks deeper than its K-th skip connection | what they hand to the up path |
| ``blocks I-J`` | blocks I to J of a transformer, in running order | what they add to the residual stream |
| ``layers`` | every ResNet block and transformer layer | what each adds |
| ``convolution`` | every ResNet block | what each adds |
| ``self-attention``, ``cross-attention``, ``feed-forward`` | that unit of every transformer block | its output |
| a module's name, ``*`` allowed | the module | its output, or what it adds |

``branch K`` is DeepCache's ``cache_branch_id`` (Ma et al., https://arxiv.org/abs/2312.00858, section 3.3): the skip
connections are counted from the outermost, and up to the K-th both paths run. A layer or transformer block is a
residual branch: to inherit its output would throw away what the step itself made before it, so what is inherited is
what it adds, as in Delta-DiT (https://arxiv.org/abs/2406.01125, section 3.2). Where one Add at the end of the module
says that, its operand is the tensor. Where several Adds lie on the way, the graph is rewritten to
``x + (f(x) - x)``, which rounds once more.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from trimtab.errors import PassError
from trimtab.passes.scopes import SCOPES, Module, module_tree, scopes

UNITS = {
    "self-attention": ("attn1", "attn", "attention"),
    "cross-attention": ("attn2",),
    "feed-forward": ("ff", "ff_context", "act_mlp", "feed_forward"),
}
"""Unit -> the last part of its modules' names in diffusers; `act_mlp` ends what Flux's single blocks have beside their
attention. Beside a joint `attn`, which reads the text too, an `attn2` is a second self-attention (SD3.5)."""

_OURS = repr(["", "inherit"])
"""The scopes of nodes that are added here: no module's, or they would count to other regions of the same blocks."""

_LAYER = re.compile(
    r"^(?:(?:.*\.)?(?:resnets|attentions|transformer_blocks|single_transformer_blocks)|layers)\.\d+$"
)
_RESNET = re.compile(r"^(?:.*\.)?resnets\.\d+$")
_BLOCK = re.compile(r"^(?:(?:single_)?transformer_blocks|layers)\.\d+$")  # Z-Image's are layers

Sources = Mapping[ir.Value, frozenset[ir.Value]]
"""Value -> the inputs of its graph that it follows from."""


@dataclass(frozen=True)
class Region:
    """Something that a step may skip.

    Attributes:
        name: As a plan has it.
        values: Tensors of the graph that are inherited.
    """

    name: str
    values: tuple[str, ...]


def default_region(model: ir.Model) -> str:
    """What is skipped where a plan does not say: the outermost branch, or all blocks but the first and the last.

    Raises:
        PassError: The graph is neither a U-Net nor a transformer of named blocks.
    """
    if branches(model.graph):
        return "branch 0"
    count = len(_blocks(model.graph))
    if count < 3:
        raise PassError(
            "the denoiser has neither up_blocks with skip connections nor three transformer blocks: say in a plan "
            "what to skip"
        )
    return f"blocks 1-{count - 2}"


def find_region(model: ir.Model, name: str) -> Region:
    """The tensors that stand for a region; the graph may be rewritten so that they exist.

    Raises:
        PassError: The graph has no such region.
    """
    graph = model.graph
    found = _places(graph, name)
    if isinstance(found, ir.Value):
        return Region(name, (str(found.name),))
    tree, sources = module_tree(graph), _sources(graph)
    values = [v for paths in found for v in _stands_for(graph, tree, sources, paths)]
    if not values:
        raise PassError(f"{name} is to be inherited, and nothing outside of it reads what it makes")
    return Region(name, tuple(values))


def check_region(model: ir.Model, name: str) -> None:
    """Refuses a name that means nothing in a denoiser, which stays as it is.

    Raises:
        PassError: The graph has no such region.
    """
    _places(model.graph, name)


def _places(graph: ir.Graph, name: str) -> ir.Value | list[list[str]]:
    """What a name means: the feature of a branch, or the paths of modules, in groups that are skipped as one."""
    if match := re.fullmatch(r"branch (\d+)", name):
        found = branches(graph)
        if int(match[1]) >= len(found):
            raise PassError(
                f"{name} is to be inherited and the denoiser has the branches {_span(len(found))}"
            )
        return found[int(match[1])]
    if match := re.fullmatch(r"blocks (\d+)-(\d+)", name):
        blocks, first, last = _blocks(graph), int(match[1]), int(match[2])
        if first > last or last >= len(blocks):
            raise PassError(
                f"{name} are to be inherited and the denoiser has the blocks {_span(len(blocks))}"
            )
        return [blocks[first : last + 1]]
    return [[path] for path in _modules(graph, name)]


def branches(graph: ir.Graph) -> list[ir.Value]:
    """What each skip connection of a U-Net is joined with on the up path, outermost first; empty for others.

    Where the middle is gone the innermost one is joined with itself, and nothing lies deeper: it is none of them. To
    inherit what it is joined with would be to inherit the skip as well.
    """
    joins = [
        node
        for node in graph
        if node.op_type == "Concat"
        and len(node.inputs) == 2
        and node.inputs[0] is not node.inputs[1]
        and node.attributes["axis"].as_int() == 1
        and any(re.fullmatch(r"up_blocks\.\d+", path) for path in scopes(node))
    ]
    return [value for node in reversed(joins) if (value := node.inputs[0]) is not None]


def _is_map(value: ir.Value) -> bool:
    """Whether a value is a feature map or a row of tokens; what has fewer axes is conditioning."""
    floating = value.dtype is not None and value.dtype.is_floating_point()
    return floating and value.shape is not None and value.shape.rank() >= 3


def _span(count: int) -> str:
    return f"0 to {count - 1}" if count else "none"


def _blocks(graph: ir.Graph) -> list[str]:
    """Paths of a transformer's blocks that have a feature of their own, in running order.

    What the first one makes for all outlives it where `--remove` took it, and is no block.
    """
    blocks = {path: module for path, module in module_tree(graph).items() if _BLOCK.match(path)}
    inside = {node for module in blocks.values() for node in module.nodes}
    made = {path: list(filter(_is_map, module.outputs)) for path, module in blocks.items()}
    own = set(_features(_sources(graph), [value for values in made.values() for value in values], inside))
    return [path for path, values in made.items() if not own.isdisjoint(values)]


def _modules(graph: ir.Graph, name: str) -> list[str]:
    """Paths of the modules that a name means, outermost only."""
    paths = dict.fromkeys(module_tree(graph))
    if name == "layers":
        found = [path for path in paths if _LAYER.match(path)]
    elif name == "convolution":
        found = [path for path in paths if _RESNET.match(path)]
    elif name in UNITS:
        found = [path for path in paths if _unit(path, paths) == name]
    else:
        found = [path for path in paths if fnmatch.fnmatchcase(path, name)]
    left = _blocks(graph)
    found = [path for path in found if path in left or not _BLOCK.match(path)]
    found = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    if not found:
        hint = "it has no module names" if not paths else "trimtab compare lists its modules"
        raise PassError(f"{name} is to be inherited and the denoiser has no such module ({hint})")
    return found


def _unit(path: str, paths: Container[str]) -> str | None:
    """The unit that a module is."""
    block, _, last = path.rpartition(".")
    if last == "attn2" and f"{block}.attn" in paths:
        return "self-attention"
    return next((unit for unit, names in UNITS.items() if last in names), None)


def _stands_for(
    graph: ir.Graph, tree: Mapping[str, Module], sources: Sources, paths: Iterable[str]
) -> tuple[str, ...]:
    """The tensors that, if they are known, leave some modules nothing to do; none where layers were removed whole.

    What was rewritten for other modules may lack in ``tree`` and ``sources``: it lies in none, and follows from nothing
    else.
    """
    inside = _with_unnamed(graph, {node for path in paths for node in tree[path].nodes})
    outputs = [
        value
        for node in graph
        if node in inside
        for value in node.outputs
        if _is_map(value) and any(user not in inside and user.op_type != "Shape" for user, _ in value.uses())
    ]
    return tuple(_contribution(graph, value, inside) for value in _features(sources, outputs, inside))


def _with_unnamed(graph: ir.Graph, nodes: set[ir.Node]) -> set[ir.Node]:
    """Some nodes, and those between them that lost their module's name: an optimizer's Split in a layer's middle."""
    inside = set(nodes)
    for node in reversed(graph):
        if SCOPES in node.metadata_props:
            continue
        users = [user for value in node.outputs for user, _ in value.uses()]
        if users and inside.issuperset(users):
            ends = any(value.is_graph_output() for value in node.outputs)
            if not ends and any(value is not None and value.producer() in inside for value in node.inputs):
                inside.add(node)
    return inside


def _sources(graph: ir.Graph) -> Sources:
    found: dict[ir.Value, frozenset[ir.Value]] = {value: frozenset({value}) for value in graph.inputs}
    for node in graph:
        given = () if node.op_type == "Shape" else node.inputs
        read = frozenset[ir.Value]().union(*(found.get(value, ()) for value in given if value is not None))
        found.update(dict.fromkeys(node.outputs, read))
    return found


def _features(sources: Sources, values: Sequence[ir.Value], inside: set[ir.Node]) -> list[ir.Value]:
    """Those of a module's outputs that are its own, and no conditioning of other modules.

    The first block that needs the time's embedding or the positions makes them for all (PixArt, Flux). They follow
    from fewer of the model's inputs than what a block makes of the sample, and inherited they would tell the blocks
    that run the time of an earlier step. Positions follow from none: a part repeats them, and no step keeps them.
    What is added to a stream is a feature whatever it follows from: without the attention between text and picture,
    which `--remove` may have taken, each follows from its own.
    """
    most = [sources[value] for value in values]

    def is_own(value: ir.Value) -> bool:
        fewer = any(sources[value] < other for other in most)
        return bool(sources[value]) and not (fewer and _residual(value, inside) is None)

    return [value for value in values if is_own(value)]


def _contribution(graph: ir.Graph, value: ir.Value, inside: set[ir.Node]) -> str:
    node = value.producer()
    assert node is not None
    for here, other in ((0, 1), (1, 0)):
        if _is_sum(node) and _is_shortcut(node.inputs[other], inside):
            return str(_not_none(node.inputs[here]).name)
    source = _residual(value, inside)
    if source is None:
        return str(value.name)
    return _as_difference(graph, value, source)


def _is_sum(node: ir.Node) -> bool:
    return node.op_type == "Add" and not any(v is None or v.is_initializer() for v in node.inputs)


def _is_shortcut(value: ir.Value | None, inside: set[ir.Node]) -> bool:
    node = _not_none(value).producer()
    return node not in inside or any(path.endswith(".conv_shortcut") for path in scopes(node))


def _residual(value: ir.Value, inside: set[ir.Node]) -> ir.Value | None:
    """The value from outside that reaches this one through Adds alone, and what joins two streams and parts them."""
    stack, known = [value], {value}
    while stack:
        item = stack.pop()
        node = item.producer()
        if node not in inside or node is None:
            return item
        nearer = _joined(node, inside) if node.op_type == "Slice" else _summands(node)
        stack += (nearer := [v for v in nearer if v not in known and v.shape == value.shape])
        known.update(nearer)
    return None


def _summands(node: ir.Node) -> list[ir.Value]:
    return [_not_none(value) for value in node.inputs] if _is_sum(node) else []


def _joined(node: ir.Node, inside: set[ir.Node]) -> list[ir.Value]:
    """What a Slice takes back of Concats that reach it through Adds: Flux's single blocks join text and picture."""
    start = node.inputs[1]
    constant = None if start is None else start.const_value
    end = 0 if constant is not None and not constant.numpy().any() else -1
    stack, known, found = [_not_none(node.inputs[0])], set[ir.Value](), list[ir.Value]()
    while stack:
        item = stack.pop()
        maker = item.producer()
        if maker is None or maker not in inside or item in known:
            continue
        known.add(item)
        stack += _summands(maker)
        if maker.op_type == "Concat":
            found.append(_not_none(maker.inputs[end]))
    return found


def _as_difference(graph: ir.Graph, value: ir.Value, source: ir.Value) -> str:
    """Rewrites ``value`` to ``source + (value - source)``, and gives the name of the difference."""
    earlier = _differences(value)
    if source in earlier:
        return str(earlier[source].name)
    difference = f"{value.name}/added" + (f"/{source.name}" if earlier else "")
    users = list(value.uses())
    sub = ir.node("Sub", [value, source], name=difference)
    add = ir.node("Add", [source, sub.outputs[0]], name=difference.replace("/added", "/restored"))
    for node in (sub, add):
        node.metadata_props[SCOPES] = _OURS
        output = node.outputs[0]
        output.name, output.type, output.shape = node.name, value.type, value.shape
    maker = value.producer()
    assert maker is not None
    graph.insert_after(maker, [sub, add])
    for user, index in users:
        user.replace_input_with(index, add.outputs[0])
    return difference


def _differences(value: ir.Value) -> dict[ir.Value, ir.Value]:
    """Source -> the difference, of earlier rewrites of a value: one behind the other."""
    found: dict[ir.Value, ir.Value] = {}
    stack = [value]
    while stack:
        for sub in (user for user, _ in stack.pop().uses() if user.metadata_props.get(SCOPES) == _OURS):
            if sub.op_type == "Sub":
                found[_not_none(sub.inputs[1])] = sub.outputs[0]
                stack += [add.outputs[0] for add, _ in sub.outputs[0].uses()]
    return found


def _not_none(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
