"""Cutting graphs where calls reach inside them.

A call names the inputs and outputs of a graph. Passes that skip work write calls that name more: values *inside*
of the graph. An inner value among a call's outputs is kept in the tensor that the call says; an inner value among
its inputs is not computed but read from there, and nothing that only it needs is run. So

    a full step         Call("denoiser", inputs, outputs | {v: "denoiser/v"})
    one that inherits   Call("denoiser", inputs | {v: "denoiser/v"}, outputs)
    one that rewrites   Call("denoiser", inputs | {v: "denoiser/w"}, outputs | {w: "denoiser/w"})

say all of feature inheritance, and of phases in which one value stands for another. `partition` turns such calls
into calls of segments. Nodes that run in the same kinds of call may share a segment, every node stands in exactly
one, and the segments are as few as an order without cycles allows: so regions that nest or overlap cost no more
cuts than they need. A tensor that crosses a cut is a buffer with a name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from trimtab.errors import PassError
from trimtab.passes.calls import map_calls, step_calls
from trimtab.passes.segments import local_nodes, segment_at
from trimtab.passes.sizes import LocalizeSizes
from trimtab.passes.versions import differences, region_of_differences, versions
from trimtab.program import Call, PassEntry, Program, Segment

_FRONTIER = 256
"""Orders that the search for the fewest segments keeps at each length; where there are no more it is exact."""


def partition(program: Program) -> Program:
    """Cuts every graph whose inner values calls name, into segments ``NAME.0``, ``NAME.1``, ... in running order.

    Graphs that differ in weights alone (`trimtab.passes.versions`) are cut alike, in front of the differences and
    behind them too: the parts that are the same in all stand once, under the first one's name.

    Exact: the same operators run on the same numbers. Constants and arithmetic on sizes are repeated where they
    are needed; a weight stands in one segment, unless several read it.

    Args:
        program: It stays as it is, and can be cut again: the parts are of edited copies (`LocalizeSizes`) if they can.

    Returns:
        A program whose calls name inputs and outputs only.

    Raises:
        PassError: A call names a value that the graph lacks; the shape of a value at a cut is not known; or a
            schedule reads a tensor before any step wrote it.
    """
    segments: dict[str, Segment] = {}
    cuts: dict[str, _Cut] = {}
    entries: list[PassEntry] = []
    stepped = {call.segment for call in step_calls(program)}
    idle = [[name] for name in program.segments if name not in stepped]
    together = versions({name: program.segments[name].model for name in program.segments if name in stepped})
    for names in sorted([*idle, *together], key=lambda names: list(program.segments).index(names[0])):
        calls = [call for call in step_calls(program) if call.segment in names]
        cut = _Cut({name: program.segments[name].model for name in names}, calls)
        parts = cut.run()
        if not parts:
            segments.update({name: program.segments[name] for name in names})
            continue
        segments.update({part: Segment(part, model) for part, model in parts.items()})
        cuts.update(dict.fromkeys(names, cut))
        entries.append(PassEntry("Partition", names[0], len(parts), 0))

    def expanded(calls: tuple[Call, ...]) -> tuple[Call, ...]:
        return tuple(
            part
            for call in calls
            for part in (cuts[call.segment].calls(call) if call.segment in cuts else (call,))
        )

    result = dataclasses.replace(
        program,
        segments=segments,
        tasks=map_calls(program.tasks, expanded),
        passes=(*program.passes, *entries),
    )
    check_order(result)
    return result


def check_order(program: Program) -> None:
    """Raises PassError where a step reads what only a later one writes."""
    made = {tensor for call in step_calls(program) for tensor in call.outputs.values() if "[" not in tensor}
    for task_name, task in program.tasks.items():
        for name, schedule in task.schedules.items():
            first = [*task.prologue, *schedule.prologue]
            written = {tensor for call in first for tensor in call.outputs.values()}
            written.update(spec.name for spec in task.inputs)
            for index, step in enumerate(schedule.steps):
                for call in step.calls:
                    if early := made & {*call.inputs.values()} - written:
                        raise PassError(
                            f"step {index} of {name} ({task_name}) reads {min(early)} in {call.segment} before "
                            "any step wrote it: let an earlier step run in full"
                        )
                    written.update(call.outputs.values())


@dataclass(frozen=True)
class Kind:
    """What makes two calls of a graph the same to a partition.

    Attributes:
        given: Inner values that are read, each with the inner value of the same call that stands for it, or None
            where it comes from elsewhere.
        kept: Inner values that are written.
    """

    given: tuple[tuple[str, str | None], ...]
    kept: tuple[str, ...]

    @classmethod
    def of(cls, call: Call, inputs: set[str], outputs: set[str]) -> Kind:
        """The kind of a call of a graph with these inputs and outputs."""
        made = {tensor: value for value, tensor in call.outputs.items()}
        given = tuple(sorted((v, made.get(t)) for v, t in call.inputs.items() if v not in inputs))
        return cls(given, tuple(sorted(v for v in call.outputs if v not in outputs)))


class _Cut:
    """One graph, or all versions of one, cut for all the kinds of its calls.

    Args:
        models: Name -> version; `trimtab.passes.versions.versions` found them.
        calls: Of any of them.
    """

    def __init__(self, models: Mapping[str, ir.Model], calls: Sequence[Call]) -> None:
        self.models = models
        self.name, model = next(iter(models.items()))
        graph = model.graph
        self._inputs = {str(value.name) for value in graph.inputs}
        self._outputs = {str(value.name) for value in graph.outputs}
        self.kinds = list(dict.fromkeys(self.kind(call) for call in calls))
        self._used = {(call.segment, self.kind(call)) for call in calls}
        self.inner = {v for kind in self.kinds for v in (*(g for g, _ in kind.given), *kind.kept)}
        self._differing = differences([model.graph for model in models.values()])
        self.parts: dict[str, ir.Model] = {}
        self._runs: dict[Kind, tuple[int, ...]] = {}
        self._tags: dict[Kind, dict[str, int]] = {}

    def kind(self, call: Call) -> Kind:
        return Kind.of(call, self._inputs, self._outputs)

    def run(self) -> dict[str, ir.Model]:
        """The parts, in running order; none where nothing asks for a cut."""
        own = self._differences(_Sources(set(), {}))
        if not (sharing := 0 < len(own) < len(self.models[self.name].graph)) and not self.inner:
            return {}
        whole, self.models = self.models, {name: model.clone() for name, model in self.models.items()}
        for model in self.models.values():
            LocalizeSizes()(model)
        try:
            return self._cut_at(sharing)
        except PassError:
            if any(other for kind in self.kinds for _, other in kind.given):
                raise  # what stands for a value may have another size than the sample's says
        self.models = whole  # a transformer's tail has no tensor with the sample's height but the sample
        return self._cut_at(sharing)

    def _cut_at(self, sharing: bool) -> dict[str, ir.Model]:
        try:
            return self._cut(shared=True)
        except PassError:
            if not sharing:
                raise
            # What versions share is worth a cut, and no refusal where a value's shape is not known.
            return self._cut(shared=False) if self.inner else {}

    def _cut(self, shared: bool) -> dict[str, ir.Model]:
        graph = self.models[self.name].graph
        self.parts = {}
        nodes = list(graph)
        place = {node: index for index, node in enumerate(nodes)}
        values = {str(value.name): value for node in nodes for value in node.outputs}
        for name in sorted(self.inner - values.keys()):
            raise PassError(f"{self.name} is to be cut at {name}, and the graph has no such value")
        given = {kind: {values[v]: values[w] if w else None for v, w in kind.given} for kind in self.kinds}
        # Values that others stand for in some kind of call, and those others.
        swapped = {name for kind in self.kinds for v, w in kind.given if w for name in (v, w)}
        locals_of = {name: local_nodes(model.graph, swapped) for name, model in self.models.items()}
        local = locals_of[self.name]
        needs = {
            kind: reach([*graph.outputs, *(values[v] for v in kind.kept)], given[kind], local)
            for kind in self.kinds
        }
        runs = {
            node: frozenset(kind for kind in self.kinds if node in needs[kind])
            for node in nodes
            if node not in local
        }
        used = [node for node in nodes if runs.get(node)]
        sources = _Sources(local, given)
        region = self._differences(sources) if shared else set(nodes)
        groups = _order(used, {node: (runs[node], node in region) for node in used}, sources)

        home = {value: index for index, group in enumerate(groups) for n in group for value in n.outputs}
        crossing = {
            value
            for index, group in enumerate(groups)
            for node in group
            for value in sources.all(node)
            if value in home and home[value] != index
        }
        leaving = crossing | set(graph.outputs) | {values[v] for kind in self.kinds for v in kind.kept}
        for index, group in enumerate(groups):
            outputs = [str(v.name) for node in group for v in node.outputs if v in leaving]
            self._check_given(f"{self.name}.{index}", group, given, runs)
            places = {place[node] for node in group}
            for name in self.models if group[0] in region else (self.name,):
                part = f"{name}.{index}"
                if group[0] not in region or any((name, kind) in self._used for kind in runs[group[0]]):
                    self.parts[part] = segment_at(places, part, self.models[name], outputs, locals_of[name])
        for kind in self.kinds:
            self._runs[kind] = tuple(i for i, group in enumerate(groups) if kind in runs[group[0]])
        self._tags = _tag(groups, given, self.kinds)
        return self.parts

    def _differences(self, sources: _Sources) -> set[ir.Node]:
        return region_of_differences(self.models[self.name].graph, self._differing, sources.all)

    def _check_given(
        self,
        part: str,
        group: Sequence[ir.Node],
        given: Mapping[Kind, Mapping[ir.Value, ir.Value | None]],
        runs: Mapping[ir.Node, frozenset[Kind]],
    ) -> None:
        """Whoever reads a value that is not always the computed one must not stand beside its maker."""
        made = {value for node in group for value in node.outputs}
        for kind in runs[group[0]]:
            if inside := made & given[kind].keys():
                raise PassError(
                    f"{min(str(v.name) for v in inside)} is read from elsewhere in a step that also computes it, "
                    f"in {part}: what makes it gives other values that the step needs"
                )

    def calls(self, call: Call) -> tuple[Call, ...]:
        """The calls of segments that make one of the whole."""
        kind = self.kind(call)
        tags = self._tags[kind]

        def tensor(value: str) -> str:
            if value in call.outputs:
                return call.outputs[value]
            tag = f"@{tags[value]}" if tags.get(value) else ""
            return f"{self.name}{tag}/{value}"

        result = []
        for index in self._runs[kind]:
            own = f"{call.segment}.{index}"
            part = own if own in self.parts else f"{self.name}.{index}"
            graph = self.parts[part].graph
            inputs = {str(v.name): call.inputs.get(str(v.name)) or tensor(str(v.name)) for v in graph.inputs}
            outputs = {str(v.name): tensor(str(v.name)) for v in graph.outputs}
            result.append(Call(part, inputs, outputs))
        return tuple(result)


def reach(
    wanted: Iterable[ir.Value], given: Mapping[ir.Value, ir.Value | None], local: set[ir.Node]
) -> set[ir.Node]:
    """The nodes that must run for some values.

    Args:
        wanted: The values.
        given: Values that are not computed -> what stands for them, or None for what is there already.
        local: Nodes that are not looked at.
    """
    needed: set[ir.Node] = set()
    stack = list(wanted)
    while stack:
        value = stack.pop()
        source = given.get(value, value)
        node = None if source is None else source.producer()
        if node is not None and node not in needed and node not in local:
            needed.add(node)
            stack.extend(v for v in node.inputs if v is not None)
    return needed


class _Sources:
    """What a node reads, over all kinds of call: its inputs, and what may stand for them."""

    def __init__(self, local: set[ir.Node], given: Mapping[Kind, Mapping[ir.Value, ir.Value | None]]) -> None:
        self._local = local
        self._stands: dict[ir.Value, list[ir.Value]] = {}
        for values in given.values():
            for value, other in values.items():
                if other is not None:
                    self._stands.setdefault(value, []).append(other)

    def all(self, node: ir.Node) -> list[ir.Value]:
        read = [v for v in node.inputs if v is not None and v.producer() not in self._local]
        return [*read, *(other for v in read for other in self._stands.get(v, ()))]


def _order(
    nodes: Sequence[ir.Node], kinds: Mapping[ir.Node, Hashable], sources: _Sources
) -> list[list[ir.Node]]:
    """The fewest groups of nodes of one sort, such as run in the same kinds of call, in an order without cycles.

    A state of the search is the set of nodes that are placed. It goes from the end: a move places all nodes of one
    sort whose readers are placed. Placing more never hurts, so the shortest way is the fewest groups; and what is
    placed from the end lies near its readers, which keeps the tensors at the cuts few.
    """
    number = {node: index for index, node in enumerate(nodes)}
    readers = [0] * len(nodes)
    for node in nodes:
        for value in sources.all(node):
            maker = value.producer()
            if maker in number:
                assert number[maker] < number[node]
                readers[number[maker]] |= 1 << number[node]
    sorts: dict[Hashable, list[int]] = {}
    for node in reversed(nodes):
        sorts.setdefault(kinds[node], []).append(number[node])
    whole = (1 << len(nodes)) - 1
    frontier: dict[int, list[list[int]]] = {0: []}
    while whole not in frontier:
        following: dict[int, list[list[int]]] = {}
        for placed, way in frontier.items():
            for members in sorts.values():
                now, group = placed, []
                for index in members:
                    if not now >> index & 1 and not readers[index] & ~now:
                        now |= 1 << index
                        group.append(index)
                if group:
                    following.setdefault(now, [*way, group])
        best = sorted(following, key=int.bit_count, reverse=True)[:_FRONTIER]
        frontier = {placed: following[placed] for placed in best}
    return [[nodes[index] for index in reversed(group)] for group in reversed(frontier[whole])]


def _tag(
    groups: Sequence[Sequence[ir.Node]],
    given: Mapping[Kind, Mapping[ir.Value, ir.Value | None]],
    kinds: Sequence[Kind],
) -> dict[Kind, dict[str, int]]:
    """Numbers for values that a kind computes from others than the graph says, and that may have other sizes."""
    numbers: dict[frozenset[tuple[ir.Value, ir.Value]], int] = {frozenset(): 0}
    tags: dict[Kind, dict[str, int]] = {}
    for kind in kinds:
        swaps: dict[ir.Value, frozenset[tuple[ir.Value, ir.Value]]] = {}
        for node in (node for group in groups for node in group):
            above: frozenset[tuple[ir.Value, ir.Value]] = frozenset()
            for value in node.inputs:
                if value is None:
                    continue
                other = given[kind].get(value)
                above |= swaps.get(other or value, frozenset())
                if other is not None:
                    above |= {(value, other)}
            swaps.update(dict.fromkeys(node.outputs, above))
        tags[kind] = {
            str(value.name): numbers.setdefault(above, len(numbers)) for value, above in swaps.items()
        }
    return tags
