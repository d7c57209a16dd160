"""Self-attention in shifted windows: HiDiffusion's MSW-MSA.

https://arxiv.org/abs/2311.17528, section 3.3: each of four windows is half the height and half the width, and all
are shifted by 0 to 3 quarters of a window, drawn anew for every block and step. The cost that grows with the square
of the tokens falls by four.
"""

from __future__ import annotations

import onnx_ir as ir

from trimtab.errors import PassError
from trimtab.passes.alternatives import Alternatives

SHIFTS = 4
"""Shifts that are drawn from: 0, 1, 2 or 3 quarters of a window."""


class WindowOrder:
    """The order of tokens by window, and back, as nodes: indices for Gather, int64 (tokens,).

    Windows are cut from the picture rolled up and left by the shift, and wrap around its edges; no mask.

    Args:
        nodes: Where the nodes go.
        grid: The numbers of the tokens' rows and of their columns, int64 (height,) and (width,): as many as multiples
            of ``windows``.
        windows: Along each side, int64 scalar: with 1, the order is the tokens' own.
        shift: In quarters of a window, int64 scalar; without effect where there is one window.
        tokens: The expression of height * width.
    """

    def __init__(
        self,
        nodes: Alternatives,
        grid: tuple[ir.Value, ir.Value],
        windows: ir.Value,
        shift: ir.Value,
        tokens: str | int,
    ) -> None:
        self._nodes = nodes
        # No Shape: `partition` would take another tensor's that the plain graph says is as large.
        sides = [nodes.int_node("Size", [line], []) for line in grid]
        parts = [self._op("Div", side, windows) for side in sides]
        height, width = parts
        several = self._op("Mul", shift, self._op("Sub", windows, nodes.ints(1)))
        rolls = [self._op("Mul", self._op("Div", part, nodes.ints(SHIFTS)), several) for part in parts]

        # Token [wy, y, wx, x] of the rolled picture, counted in the picture itself, becomes [wy, wx, y, x].
        rows, columns = (
            self._op("Mod", self._op("Add", line, roll), side)
            for line, roll, side in zip(grid, rolls, sides, strict=True)
        )
        picture = self._table(self._op("Mul", rows, sides[1]), columns)
        split = nodes.int_node(
            "Concat",
            [
                nodes.int_node("Unsqueeze", [v, nodes.ints([0])], [1])
                for v in (windows, height, windows, width)
            ],
            [4],
            axis=0,
        )
        apart = nodes.int_node("Reshape", [picture, split], [None] * 4)
        together = nodes.node(
            "Transpose",
            [apart],
            {"perm": [0, 2, 1, 3]},
            dtype=ir.DataType.INT64,
            shape=[None] * 4,
        )
        self.forward = nodes.int_node("Reshape", [together, nodes.ints([-1])], [tokens])

        # Row y of the picture is row (y - roll) mod height of the rolled one; there it is cut into window and rest.
        back = [
            self._op("Mod", self._op("Sub", line, roll), side)
            for line, roll, side in zip(grid, rolls, sides, strict=True)
        ]
        window_y, window_x = (self._op("Div", p, part) for p, part in zip(back, parts, strict=True))
        y, x = (self._op("Mod", p, part) for p, part in zip(back, parts, strict=True))
        area = self._op("Mul", height, width)
        of_row = self._op(
            "Add", self._op("Mul", window_y, self._op("Mul", area, windows)), self._op("Mul", y, width)
        )
        places = self._table(of_row, self._op("Add", self._op("Mul", window_x, area), x))
        self.backward = nodes.int_node("Reshape", [places, nodes.ints([-1])], [tokens])

    def _op(self, op: str, left: ir.Value, right: ir.Value) -> ir.Value:
        shape = next((list(v.shape) for v in (left, right) if v.shape is not None and v.shape.rank()), [])
        return self._nodes.int_node(op, [left, right], shape)

    def _table(self, rows: ir.Value, columns: ir.Value) -> ir.Value:
        """Every row's number plus every column's: int64 (height, width)."""
        column = self._nodes.int_node("Unsqueeze", [rows, self._nodes.ints([1])], [None, 1])
        return self._nodes.int_node("Add", [column, columns], [None, None])


def window_attention(
    nodes: Alternatives,
    attention: ir.Node,
    grid: tuple[ir.Value, ir.Value],
    windows: ir.Value,
    shift: ir.Value,
) -> None:
    """Lets every token of a self-attention look at its own window only, in place.

    The windows stand as further heads: nothing but the tokens' order and the heads' number changes. Exact: equal
    to the whole attention under a mask that hides other windows, and with one window bit for bit what it was.

    Args:
        nodes: Where the nodes go: before the attention.
        attention: With the inputs (rows, heads, tokens, width) of fixed heads and width.
        grid: The numbers of the tokens' rows and of their columns, int64 (height,) and (width,).
        windows: Along each side, int64 scalar.
        shift: int64 scalar, 0 to 3.

    Raises:
        PassError: The attention is of another form.
    """
    read = [value for value in attention.inputs if value is not None]
    shapes = [list(value.shape) if value.shape is not None else [] for value in read]
    fixed = [(s[1], s[3]) if len(s) == 4 else (None, None) for s in shapes]
    sizes = [(heads, width) for heads, width in fixed if isinstance(heads, int) and isinstance(width, int)]
    if len(read) != 3 or len(sizes) != 3 or len({str(s[2]) for s in shapes}) != 1:
        raise PassError(
            f"{attention.name} cannot have windows: it needs queries, keys and values of the same tokens, (rows, "
            "heads, tokens, width) with fixed heads and width, and neither mask nor cache: leave HiDiffusion out"
        )
    dtype, output = read[0].dtype, attention.outputs[0]
    assert dtype is not None and output.shape is not None
    rows, _, tokens, _ = shapes[0]
    order = WindowOrder(nodes, grid, windows, shift, tokens if isinstance(tokens, int) else str(tokens.value))
    squared = nodes.int_node("Mul", [windows, windows], [])

    def reshaped(value: ir.Value, count: ir.Value, width: int) -> ir.Value:
        heads = nodes.int_node("Reshape", [count, nodes.ints([1])], [1])
        target = nodes.int_node(
            "Concat", [nodes.ints([0]), heads, nodes.ints([-1]), nodes.ints([width])], [4], axis=0
        )
        return nodes.node("Reshape", [value, target], dtype=dtype, shape=[rows, None, None, width])

    for index, (value, (heads, width)) in enumerate(zip(read, sizes, strict=True)):
        by_window = nodes.node(
            "Gather", [value, order.forward], {"axis": 2}, dtype=dtype, shape=list(shapes[index])
        )
        count = nodes.int_node("Mul", [squared, nodes.ints(heads)], [])
        attention.replace_input_with(index, reshaped(by_window, count, width))
    heads, width = sizes[0][0], sizes[2][1]
    users = list(output.uses())
    after = Alternatives(nodes.graph, attention, f"{nodes.scope}/back", nodes.module)
    merged = after.node(
        "Reshape", [output, after.ints([0, heads, -1, width])], dtype=dtype, shape=list(output.shape)
    )
    whole = after.node("Gather", [merged, order.backward], {"axis": 2}, dtype=dtype, shape=list(output.shape))
    output.shape = ir.Shape([rows, None, None, width])
    for user, index in users:
        user.replace_input_with(index, whole)
