"""What nothing needs any more once some values of a graph are replaced by others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir

Bypass = Mapping[ir.Value, ir.Value]
"""Value -> another one, from which it is computed, that stands in for it."""


class Readers:
    """How many readers every value of a graph has: one that loses the last of them dies, and reads nothing itself.

    So what dies is found in the time that it takes to walk over the dead, and not over the graph.

    Args:
        graph: Not changed, neither here nor later.

    Attributes:
        live: What the graph's outputs depend on.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.live: set[ir.Value] = set()
        self._count: Counter[ir.Value] = Counter(graph.outputs)
        nodes: set[ir.Node] = set()
        todo: list[ir.Value] = list(graph.outputs)
        while todo:
            value = todo.pop()
            if value in self.live:
                continue
            self.live.add(value)
            node = value.producer()
            if node is not None and node not in nodes:
                nodes.add(node)
                read = [v for v in node.inputs if v is not None]
                self._count.update(read)
                todo += read

    def dead(self, bypass: Bypass) -> set[ir.Value]:
        """Of the live values those that the outputs no longer depend on; what is replaced is among them.

        Args:
            bypass: Chains are followed to their end.
        """
        replaced = [value for value in bypass if value in self.live]
        lost: Counter[ir.Value] = Counter()
        for value in replaced:  # its readers read what stands in for it
            lost[end_of(bypass, value)] -= self._count[value]
        dead, gone, todo = set(replaced), set[ir.Node](), replaced
        while todo:
            node = todo.pop().producer()
            if node is None or node in gone or any(o in self.live and o not in dead for o in node.outputs):
                continue
            gone.add(node)
            for given in node.inputs:
                if given is None:
                    continue
                value = end_of(bypass, given)
                lost[value] += 1
                if lost[value] == self._count[value]:
                    dead.add(value)
                    todo.append(value)
        return dead


def end_of(bypass: Bypass, value: ir.Value) -> ir.Value:
    """What stands in for a value at the end of a chain; the value itself where nothing does."""
    while value in bypass:
        value = bypass[value]
    return value
