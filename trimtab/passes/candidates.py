"""What can be taken out of a denoiser with its shapes left whole.

A candidate is a *bypass*: a value of the graph, and another of the same shape that stands in for it. Whatever fed
only the first is then dead. Four kinds are found, by structure alone; module names only name them:

    branch   Add(skip, branch) becomes skip: a ResNet block (its 1x1 shortcut stays), an attention, a feed-forward,
             a whole transformer around its input
    block    several branches that share weights no single one frees: a DiT block with its modulation
    pair     on the way up of a U-Net, a ResNet block with its attention and the skip that feeds them, where the
             running input has the block's channels
    level    everything below a skip: the way down, the middle and the way up again, where the channels are the skip's

The last two are what BK-SDM removes by hand (https://arxiv.org/abs/2305.15798, section 3.1).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from trimtab.errors import PassError, did_you_mean
from trimtab.passes.readers import Bypass, Readers, end_of
from trimtab.passes.scopes import module_tree, scopes

_LINEAR = ("Conv", "MatMul", "Gemm")

_FEATURES = 3
"""Axes of a feature map at least, (rows, tokens, channels): sums of embeddings, of rank 2, are no branches."""


@dataclass(frozen=True)
class Candidate:
    """Something that can be removed.

    Attributes:
        name: The module path; ``+skip`` behind a pair, ``FIRST:LAST`` for a level, and ``SKIP->OUTPUT``, of the
            values' names, in a graph without modules.
        kind: "branch", "block", "pair" or "level".
        parameters: Elements of the weights that nothing else reads.
        bytes: Their bytes.
        inside: Names of the candidates that go with this one. Of two that are equal, the second lies in the first.
    """

    name: str
    kind: str
    parameters: int
    bytes: int
    inside: tuple[str, ...] = ()


class Candidates(Mapping[str, Candidate]):
    """All candidates of a graph, by name, in the order of their kinds and then of the graph.

    Args:
        model: Not changed. Shapes of the values must be known.

    Attributes:
        all_weights: The initializers that the graph reads.
        parameters: Elements of all of them that are weights, as `trimtab.weights.parameter_count` counts.
        bytes: Of all of them.
    """

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._readers = Readers(model.graph)
        self.all_weights = [v for v in model.graph.initializers.values() if v in self._readers.live]
        self.parameters, self.bytes = _sizes(self.all_weights)
        flow = _Flow(model.graph)
        branches = list(_branches(model.graph, flow))
        found = [("branch", b.name, {b.output: b.skip}) for b in branches]
        found += [("block", name, bypass) for name, bypass in self._blocks(branches, flow)]
        found += [("pair", name, bypass) for name, bypass in _pairs(branches)]
        found += [("level", name, bypass) for name, bypass in _levels(model.graph, flow)]
        self._bypass: dict[str, dict[ir.Value, ir.Value]] = {}
        sizes = {}
        for kind, name, bypass in found:
            parameters, count = self._freed(bypass)
            if parameters:
                self._bypass[name] = bypass
                sizes[name] = (kind, parameters, count)
        inside = {name: list(self._inside(name, size[1], sizes)) for name, size in sizes.items()}
        for number, (name, others) in enumerate(inside.items()):
            # A module that another one holds and adds nothing to is its equal: each lies inside of the other, and
            # removing both would be refused twice. The first one stays around.
            before = list(inside)[:number]
            inside[name] = [other for other in others if other not in before or name not in inside[other]]
        self._members = {
            name: Candidate(name, kind, parameters, count, tuple(inside[name]))
            for name, (kind, parameters, count) in sizes.items()
        }

    def __getitem__(self, name: str) -> Candidate:
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    @property
    def fingerprint(self) -> str:
        """A hash of the architecture: the size of the whole, names and sizes of all that can go."""
        table = [self.parameters, [[c.name, c.kind, c.parameters] for c in self.values()]]
        return hashlib.sha256(json.dumps(table).encode()).hexdigest()

    def check(self, names: Iterable[str]) -> None:
        """Raises PassError for the first name that is none of a candidate, with the nearest ones."""
        for name in names:
            if name not in self:
                hint = did_you_mean(name, self, "trimtab score lists what can be")
                raise PassError(f"nothing that can be removed from this graph is called {name}: {hint}")

    def freed(self, names: Iterable[str]) -> tuple[int, int]:
        """Parameters and bytes that nothing reads once all of these are gone; at least the sum over them.

        Raises:
            PassError: No such candidate.
        """
        return self._freed(self.bypass(names))

    def lost(self, names: Iterable[str]) -> set[str]:
        """Names of the weights and results that nothing needs once all of these are gone.

        Raises:
            PassError: No such candidate.
        """
        return {str(value.name) for value in self._readers.dead(self.bypass(names))}

    def bypass(self, names: Iterable[str]) -> dict[ir.Value, ir.Value]:
        """Value -> what stands in for it when all of these are gone; chains are followed to their end.

        Raises:
            PassError: No such candidate.
        """
        names = tuple(names)
        self.check(names)
        # What lies inside of another one has nothing left to say, and must not say it: a whole block ends in the
        # same value as its last branch.
        covered = {inner for name in names for inner in self[name].inside}
        joint = {
            value: stand_in
            for name in names
            if name not in covered
            for value, stand_in in self._bypass[name].items()
        }
        return {value: end_of(joint, stand_in) for value, stand_in in joint.items()}

    def own_bypass(self, name: str) -> Bypass:
        """Value -> what stands in for it when this one alone is gone."""
        return self._bypass[name]

    def weights(self, name: str) -> list[ir.Value]:
        """The initializers that go with one candidate."""
        dead = self._readers.dead(self.bypass([name]))
        return [value for value in self.all_weights if value in dead]

    def _freed(self, bypass: Bypass) -> tuple[int, int]:
        return _sizes(value for value in self._readers.dead(bypass) if value.is_initializer())

    def _inside(self, name: str, parameters: int, sizes: Mapping[str, tuple[str, int, int]]) -> Iterator[str]:
        """Candidates with nothing left to do once ``name`` is gone: their own values are dead or the same."""
        dead = self._readers.dead(self._bypass[name])
        for other, bypass in self._bypass.items():
            if other != name and sizes[other][1] <= parameters and not self._any_lives(bypass, dead):
                yield other

    def _any_lives(self, values: Iterable[ir.Value], dead: Container[ir.Value]) -> bool:
        return any(value in self._readers.live and value not in dead for value in values)

    def _blocks(self, branches: list[_Branch], flow: _Flow) -> Iterator[tuple[str, dict[ir.Value, ir.Value]]]:
        """Modules whose results are their inputs plus branches, and that free more than those one by one.

        What the first block makes for all, of the time alone (PixArt) or of the positions (Flux), stays.
        """
        by_output = {b.output: b for b in branches}
        taken = {b.name for b in branches}
        for path, module in module_tree(self._graph).items():
            inputs, size = set(module.inputs), 0
            bypass: dict[ir.Value, ir.Value] = {}
            for output in module.outputs:
                value = output
                while value not in inputs and value in by_output:
                    size += self._freed({value: by_output[value].skip})[0]
                    value = by_output[value].skip
                if value in inputs and value is not output:
                    bypass[output] = value
            if not bypass or path in taken:
                continue
            others = [
                value
                for value in module.outputs
                if value not in bypass
                and _rank(value) >= _FEATURES
                and any(flow.feeds(stream, value) for stream in bypass.values())
            ]
            if not self._any_lives(others, self._readers.dead(bypass)) and self._freed(bypass)[0] > size:
                yield path, bypass


def _sizes(weights: Iterable[ir.Value]) -> tuple[int, int]:
    """Parameters and bytes, counted as `trimtab.weights` does; shapes are enough."""
    parameters = count = 0
    for value in weights:
        if value.shape is None or value.dtype is None:
            continue
        size = math.prod(value.shape.numpy())
        count += math.ceil(size * value.dtype.itemsize)
        parameters += size if value.dtype.is_floating_point() and size > 1 else 0
    return parameters, count


# ---- what stands in for what ----


class _Flow:
    """What feeds what."""

    def __init__(self, graph: ir.Graph) -> None:
        # Ancestors as the bits of one integer a value: 10,000 nodes take some 10 MB.
        self._bit: dict[ir.Value, int] = {value: 1 << i for i, value in enumerate(graph.inputs)}
        self._before: dict[ir.Value, int] = dict(self._bit)
        for node in graph:
            read = 0
            for value in node.inputs:
                if value is not None:
                    read |= self._before.get(value, 0)
            for output in node.outputs:
                self._bit[output] = 1 << len(self._bit)
                self._before[output] = read | self._bit[output]

    def feeds(self, first: ir.Value, second: ir.Value) -> bool:
        """Whether the second depends on the first."""
        return first is not second and bool(self._before.get(second, 0) & self._bit.get(first, 0))


@dataclass(frozen=True)
class _Branch:
    """Add(skip, branch).

    Attributes:
        name: The module.
        output: Of the Add.
        skip: What stays.
        source: What the branch reads: the skip, what the skip's 1x1 shortcut reads, or x of x + a(x) + b(x).
    """

    name: str
    output: ir.Value
    skip: ir.Value
    source: ir.Value


def _branches(graph: ir.Graph, flow: _Flow) -> Iterator[_Branch]:
    adds: list[tuple[str, ir.Value, ir.Value, ir.Value, ir.Value]] = []
    skips: dict[ir.Value, ir.Value] = {}
    for node in graph:
        output = node.outputs[0]
        if node.op_type != "Add" or _rank(output) < _FEATURES:
            continue
        first, second = node.inputs
        if first is None or second is None or not _same_shape(first, second):
            continue
        home = path[-1] if (path := scopes(node)) else ""
        orders = ((first, second), (second, first))
        found = [(skip, branch, _read_by(skip, branch, flow)) for skip, branch in orders]
        found += [(skip, branch, _beside(skip, branch, skips, flow)) for skip, branch in orders]
        for skip, branch, source in found:
            if source is not None:
                adds.append((home, output, skip, branch, source))
                skips[output] = skip
                break
    homes = [home for home, *_ in adds]
    names: list[str] = []
    for home, _, _, branch, source in adds:
        # A module with one branch gives it its name; where it has several, their own modules do.
        alone = home and homes.count(home) == 1
        names.append(home if alone else _module_of(home, branch, source, flow, whole=False))
    for (home, output, skip, branch, source), name in zip(adds, names, strict=True):
        if not name:
            name = f"{skip.name}->{output.name}"
        elif names.count(name) > 1:  # the two streams of one joint attention
            name = _module_of(home, branch, source, flow, whole=True)
        yield _Branch(name, output, skip, source)


def _read_by(skip: ir.Value, branch: ir.Value, flow: _Flow) -> ir.Value | None:
    """The skip where a branch reads it, or what both read where a shortcut stands in the skip."""
    return skip if flow.feeds(skip, branch) else _before_shortcut(skip, branch, flow)


def _beside(
    skip: ir.Value, branch: ir.Value, skips: Mapping[ir.Value, ir.Value], flow: _Flow
) -> ir.Value | None:
    """x where a skip is x + a(x) and the branch b(x): the second attention of SD3.5's blocks.

    ``skips``: what stays of the sums in front, by their outputs.
    """
    source = skips.get(skip)
    while source is not None and not flow.feeds(source, branch):
        source = skips.get(source)
    return source


def _before_shortcut(skip: ir.Value, branch: ir.Value, flow: _Flow) -> ir.Value | None:
    """What a linear layer on the skip reads, where the branch reads the same and is not linear."""
    ends = []
    for value in (skip, branch):
        node = value.producer()
        if node is not None and node.op_type == "Add":  # a bias
            plain = [v for v in node.inputs if v is not None and not v.is_initializer()]
            node = plain[0].producer() if len(plain) == 1 else None
        ends.append(node.inputs[0] if node is not None and node.op_type in _LINEAR else None)
    source, last = ends
    if source is None or not flow.feeds(source, branch) or last is source:
        return None
    return source


def _module_of(home: str, branch: ir.Value, source: ir.Value, flow: _Flow, whole: bool) -> str:
    """The module below ``home`` that makes a branch: its direct child, or the whole path."""
    prefix = home + "." if home else ""
    value = branch
    while (node := value.producer()) is not None:
        path = scopes(node)
        if path and path[-1] != home and path[-1].startswith(prefix):
            child = prefix + path[-1].removeprefix(prefix).partition(".")[0]
            return path[-1] if whole else child
        # A gate or a reshape stands behind it: go on with the input that depends on what the branch reads.
        before = [v for v in node.inputs if v is not None and flow.feeds(source, v)]
        if not before:
            break
        value = before[0]
    return ""


def _pairs(branches: list[_Branch]) -> Iterator[tuple[str, dict[ir.Value, ir.Value]]]:
    """A ResNet block that reads Concat(running input, skip), with the attention behind it."""
    by_skip = {b.skip: b for b in branches}
    for branch in branches:
        concat = branch.source.producer()
        if branch.skip is branch.source or concat is None or concat.op_type != "Concat":
            continue
        running, output, name = concat.inputs[0], branch.output, branch.name
        if running is None or len(concat.inputs) != 2 or not _same_shape(running, output):
            continue
        while output in by_skip:
            inner = by_skip[output]
            parent = branch.name.rpartition(".")[0].rpartition(".")[0] + "."
            output, name = inner.output, f"{name}+{inner.name.removeprefix(parent)}"
        yield f"{name}+skip", {output: running}


def _levels(graph: ir.Graph, flow: _Flow) -> Iterator[tuple[str, dict[ir.Value, ir.Value]]]:
    """Concat(running input fresh from an upsampler, skip) where the two have one shape."""
    for node in graph:
        if node.op_type != "Concat" or len(node.inputs) != 2:
            continue
        running, skip = node.inputs
        if running is None or skip is None or _rank(skip) < _FEATURES:
            continue
        if not _same_shape(running, skip) or not flow.feeds(skip, running) or not _upsampled(running):
            continue
        first = next(
            n for n, _ in skip.uses() if any(v is running or flow.feeds(v, running) for v in n.outputs)
        )
        ends = [path[-1] if (path := scopes(n)) else "" for n in (first, running.producer()) if n is not None]
        yield ":".join(ends) if all(ends) else f"{skip.name}->{running.name}", {running: skip}


def _upsampled(value: ir.Value) -> bool:
    """Whether a value comes from a Resize, or from a Conv behind one."""
    node = value.producer()
    if node is not None and node.op_type == "Conv" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type in ("Resize", "ConvTranspose")


def _rank(value: ir.Value) -> int:
    return 0 if value.shape is None else value.shape.rank()


def _same_shape(first: ir.Value, second: ir.Value) -> bool:
    """Whether two values are known to have one shape: the same sizes and the same expressions."""
    if first.shape is None or second.shape is None or first.is_initializer() or second.is_initializer():
        return False
    sizes = [[d if isinstance(d, int) else d.value for d in shape] for shape in (first.shape, second.shape)]
    return None not in sizes[0] and sizes[0] == sizes[1]
