"""Kernels compiled without a GPU: every SM, tensor cores, and nothing in the PTX that a launch would miss."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from trimtab.errors import BuildFailed, BundleError, MissingDependency, UnsupportedOp
from trimtab.targets.device import Device, find_device
from trimtab.targets.engines import check_targets
from trimtab.targets.plugins.aot import (
    PTX_VERSIONS,
    Kernel,
    decode_kernel,
    matmul_kernels,
    read_kernels,
    trimmed,
    write_kernels,
)
from trimtab.targets.plugins.tiles import SHARED_LIMIT, SMS, STATIC_LIMIT, fuses, tiles

TENSOR_CORES = {90: "wgmma.mma_async", 110: "tcgen05.mma"}
ROWS = (1, 16, 64, 128, 256, 1024)
SIZES = ((640, 320), (1152, 4608))
"""Of weights. The first is one that every SM multiplies as it decodes it, with all of these rows; few rows keep the
codes of a program in registers, and the second has many."""


def assemble(kernel: Kernel, sm: int, folder: Path) -> str:
    """What ptxas says of a kernel; Triton brings one."""
    from triton.backends.nvidia.compiler import get_ptxas

    source = folder / "kernel.ptx"
    source.write_text(kernel.ptx)
    arch = f"sm_{sm}{'a' if sm >= 90 else ''}"
    command = [get_ptxas(sm).path, "-v", f"-arch={arch}", str(source), "-o", str(folder / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def check(sm: int, rows: int, folder: Path) -> None:
    fused = [size for size in SIZES if fuses(sm, rows, *size)]
    assert SIZES[0] in fused
    for size in fused:
        kernels = matmul_kernels(sm, rows, *size, limit=SHARED_LIMIT[sm] * 1024)
        assert 0 < len(kernels) == len(set(kernels)) <= len(tiles(sm, rows, size[1]))
        for kernel in kernels:
            said = assemble(kernel, sm, folder)
            assert "0 bytes spill stores" in said
            assert kernel.ptx.startswith(f".version {PTX_VERSIONS.get(sm, 80) / 10}\n")
            parameters = re.findall(r"\.param \.(u64|u32)", kernel.ptx)
            assert parameters == ["u64"] * 5 + ["u32"] * 4 + ["u64"]
            assert kernel.ptx.count("mma.sync") or kernel.ptx.count(TENSOR_CORES.get(sm, "mma.sync"))
        if rows > 64 and sm in TENSOR_CORES:
            assert kernels[0].ptx.count(TENSOR_CORES[sm])
        assert all(kernel.shared_bytes <= STATIC_LIMIT for kernel in matmul_kernels(sm, rows, *size))


@pytest.mark.parametrize(("sm", "rows"), [(87, 1), (87, 256), (90, 64), (110, 256)])
def test_a_kernel_assembles_and_uses_tensor_cores(sm: int, rows: int, tmp_path: Path) -> None:
    check(sm, rows, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("sm", "rows"), [(sm, rows) for sm in SMS for rows in ROWS])
def test_every_kernel_assembles_on_every_sm(sm: int, rows: int, tmp_path: Path) -> None:
    check(sm, rows, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize(("d", "bits", "dtype"), [(2, 6, "fp16"), (2, 8, "bf16"), (4, 8, "bf16")])
def test_every_format_assembles_on_every_sm(sm: int, d: int, bits: int, dtype: str, tmp_path: Path) -> None:
    for rows in (1, 128):
        kernels = matmul_kernels(sm, rows, 321, 333, d=d, bits=bits, dtype=dtype)
        assert {kernel.dtype for kernel in kernels} == {dtype}
        for kernel in kernels:
            assert f"'{kernel.entry}' for 'sm_{sm}" in assemble(kernel, sm, tmp_path)
    decoder = decode_kernel(sm, (321, 111, 3), d=d, bits=bits, dtype=dtype)
    assert decoder.dtype == dtype
    assert f"'{decoder.entry}' for 'sm_{sm}" in assemble(decoder, sm, tmp_path)


def test_a_deep_layers_turns_are_shared_by_more_warps() -> None:
    shallow, deep = (matmul_kernels(87, 16, 1152, k) for k in (1152, 4608))
    assert [kernel.threads // 32 for kernel in shallow] == [4, 4, 9, 4]
    assert [kernel.threads // 32 for kernel in deep] == [8, 8, 12, 8]


def test_where_two_cuts_are_one_its_kernel_comes_once() -> None:
    once = matmul_kernels(87, 1, 320, 320)  # four and twelve warps at the most are three in both
    assert len(once) == len(set(once)) == len(tiles(87, 1, 320)) - 1


def test_the_decoder_assembles(tmp_path: Path) -> None:
    kernel = decode_kernel(87, (320, 320, 3, 3))
    assemble(kernel, 87, tmp_path)
    assert kernel.shared_bytes <= STATIC_LIMIT and kernel.dtype == "fp16"


def test_kernels_come_back_from_their_text() -> None:
    kernels = (
        Kernel("a", 8, 16, 256, 1000, "fp16", ".visible .entry a(\n)\n"),
        Kernel("b", 64, 32, 128, 60000, "fp16", ".visible .entry b(\n)\n"),
    )
    assert read_kernels(write_kernels(kernels)) == kernels


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a 8 16 256 1000 fp16\n",
        "a 8 x 256 1000 fp16\n.entry a(",
        "a 0 16 256 1000 fp16\n.entry a(",
        "a 8 16 256 9999999999 fp16\n.entry a(",
        "a 8\n.entry a(",
    ],
)
def test_text_that_is_no_kernel_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match="compile the bundle again"):
        read_kernels(text)


def test_an_sm_without_a_kernel_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(UnsupportedOp, match="no kernel for sm_75, only for sm_80"):
        matmul_kernels(75, 1, 8, 8)


PTX = """// made by a compiler
.version 8.0
.visible .entry f(
\t.param .u64 .ptr .global .align 1 f_param_0,
\t.param .u32 f_param_1,
\t.param .u64 .ptr .global .align 1 f_param_2
)
.reqntid 32
{
\t.loc 1 2 3
\tld.param.b64 %rd1, [f_param_0]; // a comment
\tret;
}
\t.section\t.debug_abbrev
"""


def test_parameters_that_only_tritons_launcher_fills_are_cut_off() -> None:
    text = trimmed(PTX, 2)
    assert "f_param_1\n)" in text and "f_param_2" not in text
    assert "debug" not in text and ".loc" not in text and "comment" not in text


def test_a_kernel_that_needs_scratch_memory_is_refused() -> None:
    with pytest.raises(BuildFailed, match="f uses f_param_2"):
        trimmed(PTX.replace("[f_param_0]", "[f_param_2]"), 2)


def test_a_triton_that_does_not_know_a_chip_is_named_with_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import triton

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("ptxas fatal: Value 'sm_110a' is not defined\nrepro: ptxas")

    monkeypatch.setattr(triton, "compile", refuse)
    with pytest.raises(
        BuildFailed, match=r"Triton 3\.\d.* for sm_110 \(ptxas .* is not defined\): upgrade triton"
    ):
        decode_kernel(110, (320, 320, 3, 3))


def test_what_compiling_kernels_needs_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    orin, turing = find_device("orin-nano-8gb"), Device("ours", "Ours", "tensorrt", sm="7.5")
    check_targets([orin, turing], kernels=[orin])
    with pytest.raises(UnsupportedOp, match=r"no kernel for sm_75"):
        check_targets([turing], kernels=[turing])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(MissingDependency, match=r"cuda-bindings"):
            check_targets([orin], kernels=[orin])
    monkeypatch.delitem(sys.modules, "trimtab.targets.plugins.kernels", raising=False)
    monkeypatch.delattr("trimtab.targets.plugins.kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingDependency, match=r"triton.*pip install 'trimtab\[kernels\]'"):
        check_targets([orin], kernels=[orin])
