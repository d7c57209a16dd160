"""What dies when values are replaced is what a walk back from the outputs no longer meets."""

from __future__ import annotations

import random
from collections.abc import Mapping

import onnx_ir as ir
import pytest

from trimtab.passes.readers import Readers, end_of


def drawn(dice: random.Random) -> ir.Graph:
    """A graph of 40 nodes that read any two values before them, some with two results, some of which nothing reads."""
    values: list[ir.Value] = [ir.Value(name=f"x{i}") for i in range(3)]
    inputs, nodes = list(values), []
    for number in range(40):
        count = dice.choice((1, 1, 2))
        read = [dice.choice(values[-8:]), dice.choice([*values, None])]
        results = [ir.Value(name=f"v{number}.{i}") for i in range(count)]
        nodes.append(ir.Node("", "Any", read, outputs=results))
        values += results
    return ir.Graph(inputs, [values[-1], values[-5]], nodes=nodes)


def reached(graph: ir.Graph, bypass: Mapping[ir.Value, ir.Value]) -> set[ir.Value]:
    found: set[ir.Value] = set()
    todo = [end_of(bypass, value) for value in graph.outputs]
    while todo:
        value = todo.pop()
        node = value.producer()
        if value not in found and node is not None:
            todo += [end_of(bypass, v) for v in node.inputs if v is not None]
        found.add(value)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_what_dies_is_what_the_outputs_no_longer_reach(seed: int) -> None:
    dice = random.Random(seed)
    graph = drawn(dice)
    readers = Readers(graph)
    whole = reached(graph, {})
    assert readers.live == whole
    computed = [value for node in graph for value in node.outputs if value in whole]
    lost = 0
    for count in (1, 1, 2, 4):
        bypass = {}
        for value in dice.sample(computed, count):
            before = reached_from(value) - {value}
            bypass[value] = dice.choice(sorted(before, key=lambda v: str(v.name)))
        dead = readers.dead(bypass)
        assert dead == whole - reached(graph, bypass)
        lost += len(dead) - count
    assert lost > 0
    assert readers.dead({}) == set()


def reached_from(value: ir.Value) -> set[ir.Value]:
    """A value and all that it is computed from."""
    found: set[ir.Value] = set()
    todo = [value]
    while todo:
        node = (value := todo.pop()).producer()
        if value not in found and node is not None:
            todo += [v for v in node.inputs if v is not None]
        found.add(value)
    return found
