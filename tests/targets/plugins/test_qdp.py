"""The plugins for TensorRT 10.9 and later, against a stand-in that holds them to the documented interface."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from targets.plugins.quick_plugins import Definition, SymInt32, TensorDesc, fake

from trimtab.errors import BundleError, MissingDependency, TargetError
from trimtab.targets.plugins import qdp
from trimtab.targets.plugins.aot import Kernel, write_kernels

KERNELS = (
    Kernel("vq_matmul", 8, 16, 256, 22528, "fp16", ".visible .entry vq_matmul(\n)\n"),
    Kernel("vq_matmul", 64, 32, 128, 25600, "fp16", ".visible .entry vq_matmul(\n) 2\n"),
)
DECODER = Kernel("vq_decode", 256, 16, 128, 2048, "bf16", ".visible .entry vq_decode(\n)\n")


@pytest.fixture
def definitions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    trt, trtp, found = fake()
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", trtp)
    qdp.register()
    qdp.register()  # a second call is no second registration, which TensorRT refuses
    return found


def product(rows: tuple[int, ...] = (2, 50), k: int = 64, n: int = 48) -> list[TensorDesc]:
    shapes = [((*rows, k), "half"), ((n, 4), "int"), ((256, 4), "half"), ((n,), "float"), ((n,), "half")]
    return [TensorDesc(shape, dtype) for shape, dtype in shapes]


def test_both_plugins_have_a_version_in_their_name(definitions: dict[str, Definition]) -> None:
    assert set(definitions) == {"trimtab::TrimtabVQMatMul1", "trimtab::TrimtabVQDecode1"}


def test_a_products_shape_and_type_follow_from_its_inputs(definitions: dict[str, Any]) -> None:
    described = definitions["trimtab::TrimtabVQMatMul1"].describe(*product(), kernels=write_kernels(KERNELS))
    assert described.sizes == (2, 50, 48) and described.dtype == "half"


def test_every_kernel_is_a_tactic_of_the_kernels_type(definitions: dict[str, Any]) -> None:
    text = write_kernels(KERNELS)
    (combination,) = definitions["trimtab::TrimtabVQMatMul1"].combinations(*product(), text, ())
    assert combination.io_types == "FP16, INT32, FP16, FP32, FP16, FP16"
    assert combination.layouts == "LINEAR" and combination.tactics == [1, 2]


@pytest.mark.parametrize(("tactic", "grid", "kernel"), [(0, 13 * 3, 0), (1, 13 * 3, 0), (2, 2 * 2, 1)])
def test_a_tactic_launches_its_kernel(
    definitions: dict[str, Any], tactic: int, grid: int, kernel: int
) -> None:
    implement = definitions["trimtab::TrimtabVQMatMul1"].implement
    name, ptx, launch, extra = implement(*product(), write_kernels(KERNELS), (), tactic)
    assert name == "vq_matmul" and ptx == KERNELS[kernel].ptx
    assert launch.grid_x.value == grid and launch.grid_y.value == launch.grid_z.value == 1
    assert launch.block_x.value == KERNELS[kernel].threads
    assert launch.shared_mem.value == KERNELS[kernel].shared_bytes
    assert [scalar.value for scalar in extra.items] == [100, 48, 64, 4]  # m, n, k, words a row


def test_the_decoder_writes_the_shape_it_is_told(definitions: dict[str, Any]) -> None:
    definition = definitions["trimtab::TrimtabVQDecode1"]
    inputs = [TensorDesc((18, 16), "int"), TensorDesc((256, 2), "bfloat"), TensorDesc((18,), "float")]
    shape = np.array([18, 12, 3, 3], np.int32)
    text = write_kernels((DECODER,))
    assert definition.describe(*inputs, kernels=text, shape=shape).sizes == (18, 12, 3, 3)
    (combination,) = definition.combinations(*inputs, text, ())
    assert combination.io_types == "INT32, BF16, FP32, BF16" and combination.tactics == [1]
    name, _, launch, extra = definition.implement(*inputs, text, shape, (), 1)
    assert name == "vq_decode" and launch.grid_x.value == 2
    assert [scalar.value for scalar in extra.items] == [18, 108, 16, 9]  # n, k, words a row, taps


def test_a_type_is_told_without_sizes(definitions: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SymInt32, "has_builder", False)
    inputs = [
        TensorDesc((1,) * rank, dtype, fake=True) for rank, dtype in ((2, "int"), (2, "half"), (1, "float"))
    ]
    decoder = definitions["trimtab::TrimtabVQDecode1"]
    described = decoder.describe(
        *inputs, kernels=write_kernels((DECODER,)), shape=np.array([18, 12, 3, 3], np.int32)
    )
    assert (
        described.dtype == "half"
        and all(size.is_fake for size in described.shape_expr)
        and described.ndim == 4
    )
    inputs = [TensorDesc((1,) * rank, "half", fake=True) for rank in (3, 2, 2, 1, 1)]
    described = definitions["trimtab::TrimtabVQMatMul1"].describe(*inputs, kernels=write_kernels(KERNELS))
    assert described.dtype == "half" and all(size.is_fake for size in described.shape_expr)


def test_a_tactic_that_no_kernel_has_is_refused() -> None:
    with pytest.raises(BundleError, match="tactic 3 was chosen of 2 kernels"):
        qdp.chosen(write_kernels(KERNELS), 3)


def test_kernels_of_two_types_are_refused() -> None:
    with pytest.raises(BundleError, match=r"compute in \['bf16', 'fp16'\]"):
        qdp.matmul_combination((KERNELS[0], DECODER))


def test_an_older_tensorrt_is_told_to_build_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake("10.3.0")[0])
    with pytest.raises(TargetError, match=r"10\.3\.0 has no plugins that carry their kernels"):
        qdp.register()


def test_without_tensorrt_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match=r"trimtab\[tensorrt\]"):
        qdp.register()
