"""How long a study will take, told before anything of it has run."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from trimtab.runtime.sessions import OnnxRuntimeSession
from trimtab.targets.cost import node_costs

_SIDE = 1024
"""Of the product that is timed: three matrices of 4 MB, as large as a layer's and larger than most caches of a core."""

_SECONDS = 0.5


def least_seconds(model: ir.Model, shapes: Mapping[str, Sequence[int]], threads: int) -> float:
    """Seconds of one run at least: its multiplications at the rate of one product of matrices on this machine.

    Nothing runs faster than that product. Stable Diffusion 1.5's U-Net took 1.5 times as long (docs/removal.md).

    Args:
        model: The graph.
        shapes: Graph input -> sizes.
        threads: For one operator; 0 for one a core.
    """
    macs = sum(cost.macs for cost in node_costs(model, shapes).values())
    return macs / _rate(threads)


def _rate(threads: int) -> float:
    """Multiplications a second of a product of two matrices in ONNX Runtime."""
    kind, sizes = ir.TensorType(ir.DataType.FLOAT), ir.Shape([_SIDE, _SIDE])
    factor = ir.Value(name="factor", shape=sizes, type=kind)
    node = ir.node("MatMul", [factor, factor])
    (product,) = node.outputs
    product.name, product.shape, product.type = "product", sizes, kind
    graph = ir.Graph([factor], [product], nodes=[node], opset_imports={"": 20}, name="product")
    arrays = {"factor": np.ones((_SIDE, _SIDE), np.float32), "product": np.zeros((_SIDE, _SIDE), np.float32)}
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        path = Path(folder) / "product.onnx"
        ir.save(ir.Model(graph, ir_version=10), path)
        session = OnnxRuntimeSession(path, threads)
    with contextlib.closing(session):
        run = session.bind({"factor": arrays["factor"]}, {"product": arrays["product"]})
        run()  # memory is touched
        count, start = 0, time.monotonic()
        while (passed := time.monotonic() - start) < _SECONDS:
            run()
            count += 1
    return count * _SIDE**3 / passed
