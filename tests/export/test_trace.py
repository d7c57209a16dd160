"""Tracing: what is said of a module that torch cannot export, and what the exporter is spared."""

from __future__ import annotations

import subprocess
import sys

import torch
from onnxscript.rewriter.rules.common import slice_split_rule

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


class Halves(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :2] * x[..., 2:]


def test_the_search_for_pairs_of_slices_is_left_out_of_a_trace_alone() -> None:
    whole = vars(slice_split_rule).copy()
    graph = trace(Halves(), {"x": Example(torch.randn(2, 4), ("n", None))}, ["y"]).graph
    assert [node.op_type for node in graph] == ["Slice", "Slice", "Mul"]
    assert vars(slice_split_rule) == whole
