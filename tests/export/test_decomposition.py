"""The exporter's second trace is left out where nothing needs it, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from trimtab.export import trace as tracing
from trimtab.export.decomposition import needs_decomposition
from trimtab.export.trace import Example, trace
from trimtab.passes.scopes import SCOPES

AXES = ("rows", None, None)


class Plain(nn.Module):
    """Casts, norms, attention, dropout, views and slices."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.to_qkv = nn.Linear(8, 24)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.to_qkv(self.norm(x.double().float())).unsqueeze(1)
        q, k, v = heads.chunk(3, dim=-1)
        x = x + self.drop(nn.functional.scaled_dot_product_attention(q, k, v)).squeeze(1)
        return torch.cat([x, x.round().to(torch.int64).to(x)], dim=-1).flatten(1).contiguous()


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0].add_(1)
        return y


class InPlaceOfWhatAViewReads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        flat = y.flatten(1)
        return y.add_(x).flatten(1) + flat


class InPlaceOfAView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.transpose(1, 2).add_(x.transpose(1, 2))
        return y


class InPlaceOfAnotherType(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 2).add_(x.double() / 3)


class Unlisted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).swapaxes(0, 1)


def example() -> Tensor:
    return torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))


def exported(module: nn.Module) -> torch.export.ExportedProgram:
    dynamic = {"x": {0: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        return torch.export.export(module.eval(), (), {"x": example()}, dynamic_shapes=dynamic, strict=False)


def traced(module: nn.Module) -> ir.Model:
    return trace(module, {"x": Example(example(), AXES)}, ["y"])


def run(model: ir.Model, x: Tensor) -> Any:
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x.numpy()})[0]


def _refused(*_: Any, **__: Any) -> None:
    raise AssertionError("traced again")


def test_a_plain_module_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = Plain()
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", _refused)
    once = traced(module)
    monkeypatch.undo()
    monkeypatch.setattr(tracing, "decompose_only_if_needed", lambda program: None)
    monkeypatch.setattr(tracing, "TRANSLATIONS", {})
    twice = traced(module)
    for rows in (1, 5):
        x = torch.randn(rows, 2, 8)
        assert np.array_equal(run(once, x), run(twice, x))
        np.testing.assert_allclose(run(once, x), module(x).detach(), atol=1e-6)
    assert all(SCOPES in node.metadata_props for node in once.graph)


@pytest.mark.parametrize(
    "module",
    [InPlace(), InPlaceOfWhatAViewReads(), InPlaceOfAView(), InPlaceOfAnotherType(), Unlisted()],
    ids=lambda m: type(m).__name__,
)
def test_what_has_no_translation_as_it_stands_is_taken_apart(module: nn.Module) -> None:
    assert needs_decomposition(exported(module), {})
    with torch.no_grad():
        assert np.array_equal(run(traced(module), example()), module(example()))


def test_what_the_exporter_s_table_holds_is_taken_apart() -> None:
    program = exported(Plain())
    assert not needs_decomposition(program, {})
    assert needs_decomposition(program, {torch.ops.aten.add.Tensor: torch.add})


def _grid(x: Tensor, indexing: str) -> Tensor:
    axes = (x[:, 0, 0], x[0, 0], x[0, 1, :3])
    return torch.stack(torch.meshgrid(*axes, indexing=indexing), dim=-1)


@pytest.mark.parametrize(
    "computed",
    [
        lambda x: 1 - x,
        lambda x: torch.rsub(x, 0.1, alpha=2),
        lambda x: 1 - x.double(),
        lambda x: 0.1 - x.double() / 3,
        lambda x: 7 - x.to(torch.int64),
        lambda x: torch.outer(x[:, 0, 0], x[0, 0]),
        lambda x: torch.outer(x[:, 0, 0], x[0, 0].double() / 3),
        lambda x: torch.outer(x[:, 0, 0].to(torch.int64), x[0, 0]),
        lambda x: torch.min(x, -x),
        lambda x: torch.min(x, x[:1, :, :1]),
        lambda x: torch.min((9 * x).to(torch.int64), torch.full_like(x, 3, dtype=torch.int64)),
        lambda x: torch.where(x > 0, x, torch.finfo(torch.float32).min),
        lambda x: (x * 3).add_(x),
        lambda x: (x * 3).add_(x[:1], alpha=2),
        lambda x: torch.arange(x.shape[0], dtype=torch.float64).div_(0.1),
        lambda x: (x > 0) & (x < 1),
        lambda x: (9 * x).to(torch.int64) & 3 * torch.ones(8, dtype=torch.int64),
        lambda x: x[:, 0, 0].double().repeat_interleave(2, dim=0),
        lambda x: x.repeat_interleave(3, dim=1),
        lambda x: x.repeat_interleave(2, dim=-1),
        lambda x: x.repeat_interleave(2),
        lambda x: x.repeat_interleave(x.shape[0], dim=0),
        lambda x: _grid(x, "ij"),
        lambda x: _grid(x, "xy"),
    ],
)
def test_operators_of_the_families_are_traced_once_and_exact(
    computed: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Computed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return computed(x)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", _refused)
    model = traced(Computed())
    for rows in (1, 5):
        x = torch.randn(rows, 2, 8)
        ours, theirs = run(model, x), computed(x).numpy()
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


def test_control_flow_is_taken_apart() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    assert needs_decomposition(exported(Branch()), {})


def test_a_cosine_in_fp64_is_a_sine_and_one_in_fp32_stays_one() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 40).double().cos() + x.cos()

    model = traced(Turned())
    cosines = [node.inputs[0] for node in model.graph if node.op_type == "Cos"]
    assert [value and value.dtype for value in cosines] == [ir.DataType.FLOAT]
    with torch.no_grad():
        expected = Turned()(example()).numpy()
    assert run(model, example()).dtype == np.float64
    np.testing.assert_allclose(run(model, example()), expected, rtol=0, atol=1e-6)
