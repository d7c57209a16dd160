"""One graph with a switch on everything that can be removed: built once, for any set of removals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from trimtab.errors import CalibrationError
from trimtab.passes.candidates import Candidates
from trimtab.passes.constants import shared_constant
from trimtab.runtime.sessions import OnnxRuntimeSession

Array = npt.NDArray[Any]

GATES = "gates"
"""The input: (candidates,) bool, true where a candidate is there, in the order of `Candidates`."""

OUTPUT = "model_output"
"""The only output: the prediction, (batch, *latent) float32."""


def add_gates(model: ir.Model, candidates: Candidates) -> ir.Model:
    """A copy of a denoiser with a gate on every candidate; weights are shared.

    Exact: with all gates on it computes what the model does, with some off what `RemoveLayers` leaves.

    Args:
        model: With the sampler fused.
        candidates: Of this model.
    """
    names = {name: index for index, name in enumerate(candidates)}
    gated = model.clone()
    graph = gated.graph
    values = {v.name: v for v in graph.inputs} | {v.name: v for node in graph for v in node.outputs}
    gates = ir.Value(name=GATES, shape=ir.Shape([len(names)]), type=ir.TensorType(ir.DataType.BOOL))
    graph.inputs.append(gates)
    order = {v: i for i, v in enumerate(v for node in graph for v in node.outputs)}
    switches: dict[ir.Value, list[tuple[int, str, ir.Value]]] = {}
    for name, candidate in candidates.items():
        for value, stand_in in candidates.own_bypass(name).items():
            place = switches.setdefault(values[value.name], [])
            place.append((candidate.parameters, name, values[stand_in.name]))
    current: dict[ir.Value, ir.Value] = {}
    for value in sorted(switches, key=order.__getitem__):
        node = value.producer()
        assert node is not None
        readers = list(value.uses())
        new: list[ir.Node] = []
        # The largest comes last: what removes most has the last word.
        for _, name, stand_in in sorted(switches[value], key=lambda switch: switch[0]):
            index = shared_constant(graph, f"{GATES}/{names[name]}", np.array(names[name], np.int64))
            gate = ir.node("Gather", [gates, index], {"axis": 0})
            inputs = [gate.outputs[0], current.get(value, value), current.get(stand_in, stand_in)]
            switch = ir.node("Where", inputs)
            switch.outputs[0].shape, switch.outputs[0].type = value.shape, value.type
            current[value] = switch.outputs[0]
            new += [gate, switch]
        graph.insert_after(node, new)
        for reader, position in readers:
            reader.replace_input_with(position, current[value])
        if value.is_graph_output():
            raise CalibrationError(f"{value.name} is an output of the graph: fuse the sampler first")
    graph.outputs[:] = [value for value in graph.outputs if value.name == OUTPUT]
    if not graph.outputs:
        raise CalibrationError(f"the denoiser has no output {OUTPUT}: fuse the sampler first")
    common.RemoveUnusedNodesPass()(gated)
    return gated


class GatedDenoiser:
    """A gated graph, loaded.

    Args:
        graph: The file; its weights lie beside it.
        names: Of the candidates, in the order of the gates.
        threads: For one operator; the same number gives the same bits.
    """

    def __init__(self, graph: Path, names: Sequence[str], threads: int = 1) -> None:
        self._gates = {name: index for index, name in enumerate(names)}
        self._session = OnnxRuntimeSession(graph, threads, lean=True)

    def outputs(self, inputs: Mapping[str, Array], removed: Sequence[Sequence[str]]) -> list[Array]:
        """Predictions (batch, *latent) float32 for one evaluation's inputs, one for each set of removals."""
        gates = np.ones(len(self._gates), np.bool_)
        state = inputs["state"]
        result = np.zeros(state.shape[1:], np.float32)
        run = self._session.bind({**inputs, GATES: gates}, {OUTPUT: result})
        outputs = []
        for names in removed:
            gates[:] = True
            gates[[self._gates[name] for name in names]] = False
            run()
            outputs.append(result.copy())
        return outputs

    def losses(self, inputs: Mapping[str, Array], removed: Sequence[Sequence[str]]) -> list[float]:
        """Mean squared differences from the whole model's prediction, one for each set of removals."""
        whole, *others = self.outputs(inputs, [(), *removed])
        return [float(np.square(other.astype(np.float64) - whole).mean()) for other in others]
