"""Tracing: open sizes, what is said of a module that torch cannot export, and what the exporter is spared."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from graphs import run
from onnxscript import TracedOnnxFunction
from onnxscript.rewriter.rules.common import slice_split_rule
from torch import Tensor, nn

from trimtab.export.trace import Example, trace

SCRIPT = """
import torch
from trimtab.errors import ExportError
from trimtab.export.trace import Example, trace

class Misfit(torch.nn.Module):
    def forward(self, x):
        return x.reshape(x.shape[0], -1) @ torch.zeros(7, 3)

try:
    trace(Misfit(), {"x": Example(torch.randn(2, 4, 5), ("n", None, None))}, ["y"])
except ExportError as error:
    print(error)
"""
"""In a process of its own: torch's handler writes to the stderr that it found when it was imported."""


def test_a_module_that_cannot_be_traced_is_refused_in_one_line_and_torch_logs_nothing() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("torch could not export Misfit: a and b must have same reduction dim")
    assert ran.stdout.count("\n") == 1 and ran.stderr == ""


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :2] * x[..., 2:]


def test_translations_are_read_for_the_first_graph_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    example = Example(torch.randn(2, 4), ("n", None))
    whole = TracedOnnxFunction.function_ir
    first = trace(Gate(), {"x": example}, ["y"])

    def refused(*_: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(inspect, "getsource", refused)
    second = trace(Gate(), {"x": example}, ["y"])
    assert [str(node) for node in first.graph] == [str(node) for node in second.graph]
    assert TracedOnnxFunction.function_ir is whole


def test_the_search_for_pairs_of_slices_is_left_out_of_a_trace_alone() -> None:
    whole = vars(slice_split_rule).copy()
    graph = trace(Gate(), {"x": Example(torch.randn(2, 4), ("n", None))}, ["y"]).graph
    assert [node.op_type for node in graph] == ["Slice", "Slice", "Mul"]
    assert vars(slice_split_rule) == whole


class Turning(nn.Module):
    """Queries (rows, heads, tokens, 4) turned by their positions, which are the same in all rows."""

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[None, :, None] * torch.tensor([1.0, 0.1])
        twice = torch.cat([angles, angles], dim=-1)
        cos, sin = twice.cos()[:, None], twice.sin()[:, None]
        return x * cos + torch.cat([-x[..., 2:], x[..., :2]], dim=-1) * sin


def test_positions_that_rows_share_turn_all_of_them() -> None:
    x = torch.randn(3, 2, 5, 4)
    graph = trace(Turning(), {"x": Example(x, ("rows", None, "tokens", None))}, ["y"])
    expected = Turning()(x).numpy()
    np.testing.assert_allclose(run(graph, {"x": x.numpy()})["y"], expected, atol=1e-6)


class Halves(nn.Module):
    """Halves sides rounded up, then down, and doubles them back: torch.export finds no end among such floors."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Conv2d(1, 1, 3, stride=2, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        half = self.model(sample)
        half = half + nn.functional.interpolate(nn.functional.avg_pool2d(half, 2), scale_factor=2.0)
        return sample + nn.functional.interpolate(half, scale_factor=2.0)


def test_sides_that_halve_at_every_level_are_open_and_inner_sizes_follow_from_them() -> None:
    module = Halves()
    sizes = ("latent_height", "latent_width")
    sample = Example(torch.randn(2, 1, 12, 8), ("rows", None, *sizes), dict.fromkeys(sizes, 4))
    model = trace(module, {"sample": sample}, ["result"])
    assert str(model.graph.inputs[0].shape) == "[rows,1,latent_height,latent_width]"
    assert str(model.graph.outputs[0].shape) == "[rows,1,4*(latent_height//4),4*(latent_width//4)]"
    given = torch.randn(1, 1, 4, 20)
    with torch.no_grad():
        theirs = module(given).numpy()
    assert np.abs(run(model, {"sample": given.numpy()})["result"] - theirs).max() <= 1e-6
