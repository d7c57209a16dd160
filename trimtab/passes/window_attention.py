"""Self-attention in four shifted windows: HiDiffusion's MSW-MSA.

https://arxiv.org/abs/2311.17528, section 3.3: each window is half the height and half the width, and all are
shifted by 0 to 3 quarters of a window, drawn anew for every block and step. The cost that grows with the square
of the tokens falls by four.
"""

from __future__ import annotations

import onnx_ir as ir

from trimtab.passes.alternatives import Alternatives

WINDOWS = 4
"""Two along each side."""

SHIFTS = 4
"""Shifts that are drawn from: 0, 1, 2 or 3 quarters of a window."""


class WindowIndex:
    """Which token stands where once they are sorted by window, as nodes.

    Windows are cut from the picture rolled by ``-shift``, and wrap around its edges; no mask.

    Args:
        nodes: Where the nodes go.
        grid: (height, width) of the tokens, float32 (2,): both even.
        shift: The shift in quarters of a window, int64 scalar.
        tokens: The expression of height * width.
    """

    def __init__(self, nodes: Alternatives, grid: ir.Value, shift: ir.Value, tokens: str | int) -> None:
        self._nodes = nodes
        one, two, quarter = nodes.ints(1), nodes.ints(2), nodes.ints(SHIFTS)
        sizes = nodes.int_node("Cast", [grid], [2], to=int(ir.DataType.INT64))
        self._height, self._width = (nodes.int_node("Gather", [sizes, nodes.ints(i)], [], axis=0) for i in (0, 1))
        halves = [nodes.int_node("Div", [side, two], []) for side in (self._height, self._width)]
        shifts = [
            nodes.int_node("Mul", [nodes.int_node("Div", [half, quarter], []), shift], []) for half in halves
        ]
        zero = nodes.ints(0)

        def along(side: ir.Value) -> ir.Value:
            return nodes.int_node("Range", [zero, side, one], ["side"])

        def column(value: ir.Value) -> ir.Value:
            return nodes.int_node("Unsqueeze", [value, nodes.ints([1])], ["height", 1])

        # Sorted by window: row (window, y) of the sorted picture is row window * half + y + shift of the picture,
        # so the rows are only rolled, and the columns likewise; then [wy, y, wx, x] becomes [wy, wx, y, x].
        rows, columns = (
            nodes.int_node("Mod", [nodes.int_node("Add", [along(side), by], ["side"]), side], ["side"])
            for side, by in zip((self._height, self._width), shifts, strict=True)
        )
        table = nodes.int_node(
            "Add", [nodes.int_node("Mul", [column(rows), self._width], ["height", 1]), columns], ["height", "width"]
        )
        split = nodes.int_node(
            "Concat",
            [
                nodes.ints([2]),
                nodes.int_node("Unsqueeze", [halves[0], nodes.ints([0])], [1]),
                nodes.ints([2]),
                nodes.int_node("Unsqueeze", [halves[1], nodes.ints([0])], [1]),
            ],
            [4],
            axis=0,
        )
        windows = nodes.node(
            "Transpose",
            [nodes.int_node("Reshape", [table, split], [2, "half_height", 2, "half_width"])],
            {"perm": [0, 2, 1, 3]},
            dtype=ir.DataType.INT64,
            shape=[2, 2, "half_height", "half_width"],
        )
        self.forward = nodes.int_node("Reshape", [windows, nodes.ints([-1])], [tokens])

        # And back: the place of picture's row y among the sorted is ((y - shift) mod height), cut in two.
        back = [
            nodes.int_node(
                "Mod", [nodes.int_node("Sub", [along(side), by], ["side"]), side], ["side"]
            )
            for side, by in zip((self._height, self._width), shifts, strict=True)
        ]
        window_y, window_x = (
            nodes.int_node("Div", [place, half], ["side"]) for place, half in zip(back, halves, strict=True)
        )
        inner_y, inner_x = (
            nodes.int_node("Mod", [place, half], ["side"]) for place, half in zip(back, halves, strict=True)
        )
        area = nodes.int_node("Mul", halves, [])
        of_row = nodes.int_node(
            "Add",
            [
                nodes.int_node("Mul", [window_y, nodes.int_node("Mul", [area, two], [])], ["side"]),
                nodes.int_node("Mul", [inner_y, halves[1]], ["side"]),
            ],
            ["side"],
        )
        of_column = nodes.int_node(
            "Add", [nodes.int_node("Mul", [window_x, area], ["side"]), inner_x], ["side"]
        )
        places = nodes.int_node("Add", [column(of_row), of_column], ["height", "width"])
        self.backward = nodes.int_node("Reshape", [places, nodes.ints([-1])], [tokens])


def add_window_attention(
    nodes: Alternatives, attention: ir.Node, grid: ir.Value, shift: ir.Value
) -> ir.Value | str:
    """Adds what one Attention gives when every token looks at its own window only.

    The windows stand as further heads: nothing but the tokens' order and the heads' number changes. Exact: equal
    to the whole attention under a mask that hides other windows.

    Args:
        nodes: Where the nodes go: behind the attention.
        attention: Self-attention with the inputs (rows, heads, tokens, width) of fixed heads and width.
        grid: (height, width) of the tokens, float32 (2,).
        shift: int64 scalar, 0 to 3.

    Returns:
        What stands for the attention's output, or why there is nothing.
    """
    queries, keys, values = attention.inputs[:3]
    assert queries is not None and keys is not None and values is not None
    if len([v for v in attention.inputs if v is not None]) > 3:
        return "its attention has a mask or a cache"
    shapes = [list(v.shape) if v.shape is not None else [] for v in (queries, keys, values)]
    if any(len(s) != 4 or not isinstance(s[1], int) or not isinstance(s[3], int) for s in shapes):
        return "its attention does not read (rows, heads, tokens, width) with fixed heads and width"
    if len({str(s[2]) for s in shapes}) != 1:
        return "its attention is between different tokens"
    dtype = queries.dtype
    assert dtype is not None
    rows, heads, tokens, _ = shapes[0]
    text = tokens if isinstance(tokens, int) else str(tokens.value)
    index = WindowIndex(nodes, grid, shift, text)
    part = text // WINDOWS if isinstance(text, int) else f"({text})//{WINDOWS}"
    windowed = []
    for value, shape in zip((queries, keys, values), shapes, strict=True):
        sorted_ = nodes.node("Gather", [value, index.forward], {"axis": 2}, dtype=dtype, shape=shape)
        target = nodes.ints([0, WINDOWS * shape[1], -1, shape[3]])
        windowed.append(
            nodes.node(
                "Reshape", [sorted_, target], dtype=dtype, shape=[rows, WINDOWS * shape[1], part, shape[3]]
            )
        )
    width = shapes[2][3]
    inside = nodes.node(
        "Attention",
        windowed,
        dict(attention.attributes),
        dtype=dtype,
        shape=[rows, WINDOWS * heads, part, width],
    )
    merged = nodes.node(
        "Reshape", [inside, nodes.ints([0, heads, -1, width])], dtype=dtype, shape=[rows, heads, tokens, width]
    )
    return nodes.node(
        "Gather", [merged, index.backward], {"axis": 2}, dtype=dtype, shape=[rows, heads, tokens, width]
    )
