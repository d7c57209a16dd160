"""The CUDA kernels on the CPU, a fiber a thread (emulator/), against a plain loop; and that they refuse in words."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from conftest import made_once

from trimtab.errors import BuildFailed, MissingDependency
from trimtab.passes.vq_op import pack_indices
from trimtab.targets.plugins import nvrtc
from trimtab.targets.plugins.aot import macros
from trimtab.targets.plugins.codes import as_words, row_words
from trimtab.targets.plugins.tiles import SHARED_LIMIT, SMS, STATIC_LIMIT, FewRows, ManyRows, Tile, tiles

EMULATOR = Path(__file__).parent / "emulator"
TYPES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
FORMATS = [(4, 8), (2, 8), (2, 6)]
"""Weights of a codeword and bits of a code."""

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


GXX = ["g++", "-std=c++20", "-O0", "-w", "-fsanitize=address,alignment", "-fno-sanitize-recover"]


@pytest.fixture(scope="session")
def emulate(workshop: Path) -> Callable[..., float]:
    """`_emulate` with the headers of C++ compiled."""

    def compiled(folder: Path) -> None:
        folder.mkdir()
        header = shutil.copy(EMULATOR / "standard.h", folder)
        subprocess.run([*GXX, "-x", "c++-header", header, "-o", f"{header}.gch"], check=True)

    return functools.partial(_emulate, made_once(workshop / "emulator", compiled))


def _compiled(headers: Path, cut: FewRows | ManyRows, macros: Mapping[str, object]) -> Path:
    """The emulator with a cut's kernel in it: compiled once for all tests that run it."""
    text = (nvrtc.SOURCES / cut.source).read_text()
    defined = [f"-D{name}={value}" for name, value in macros.items()]

    def compiled(folder: Path) -> None:
        folder.mkdir()
        # A copy: beside the source itself lies the header that the emulator's stands for, and would be found first.
        (folder / cut.source).write_text(text)
        included = [f'-DSOURCE="{folder / cut.source}"', "-I", headers, "-I", EMULATOR, "-I", nvrtc.SOURCES]
        command = [*GXX, *defined, *included, EMULATOR / "run.cpp", "-o", folder / "program"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    name = hashlib.sha256("\n".join([text, *defined]).encode()).hexdigest()
    return made_once(headers.parent / "emulated" / name, compiled) / "program"


def _emulate(
    headers: Path,
    cut: FewRows | ManyRows,
    m: int,
    n: int,
    k: int,
    folder: Path,
    *,
    d: int = 4,
    bits: int = 8,
    dtype: str = "fp16",
    late: bool = True,
    turns: int = 0,
) -> float:
    """The largest error of a product, by its largest value; NaN where nothing was written.

    Fails where a tensor, or shared memory as the cut asks for it, is left, or a wide access is not aligned. What
    ``late`` and ``turns`` mean is the emulator's to say.
    """
    random = np.random.default_rng(m * n * k)
    half = TYPES[dtype]
    codes = random.integers(0, 1 << bits, (n, -(-k // d)), dtype=np.uint8)
    codebook = random.standard_normal((1 << bits, d)).astype(half)
    x = random.standard_normal((m, k)).astype(half)
    scale = random.uniform(0.5, 2, n).astype(np.float32)
    bias = random.standard_normal(n).astype(half)
    words = as_words(pack_indices(codes, bits).view(np.uint8))
    for name, array in (("x", x), ("words", words), ("codebook", codebook), ("scale", scale), ("bias", bias)):
        (folder / name).write_bytes(array.tobytes())
    program = _compiled(headers, cut, macros(cut, n, k, d, bits, dtype))
    programs = -(-m // cut.rows) * -(-n // cut.columns)
    numbers = (programs, cut.threads(k, d, bits), cut.shared_bytes(k, d, bits), m, int(late), turns)
    run = [str(program), *map(str, numbers), str(folder)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    y = np.frombuffer((folder / "y").read_bytes(), half).reshape(m, n).astype(np.float64)
    w = codebook[codes].reshape(n, -1)[:, :k].astype(np.float64)
    expected = (x.astype(np.float64) @ w.T) * scale + bias.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return float(np.abs(y - expected).max() / np.abs(expected).max())


ONCE = {"fp16": 2.0**-11 + 1e-5, "bf16": 2.0**-8 + 1e-5}
"""One rounding of the result."""


@needs_a_compiler
@pytest.mark.parametrize(
    ("cut", "m", "n", "k", "d", "bits", "dtype"),
    [
        (FewRows(8, 16, 32), 1, 32, 256, 4, 8, "fp16"),
        (FewRows(16, 32, 16, 4), 13, 40, 640, 4, 8, "bf16"),
        (FewRows(16, 16, 16), 19, 17, 90, 4, 8, "fp16"),
        (FewRows(8, 16, 32), 3, 16, 192, 2, 8, "bf16"),
        (FewRows(32, 32, 16, 3), 33, 32, 320, 2, 6, "fp16"),
        (FewRows(8, 32, 32, 4), 9, 1, 1, 4, 8, "fp16"),
        (ManyRows(64), 70, 72, 328, 4, 8, "fp16"),
        (ManyRows(128, 2, 32), 40, 136, 192, 4, 8, "fp16"),
        (ManyRows(32), 20, 100, 136, 2, 6, "fp16"),
        (ManyRows(64, line=64), 1, 1, 8, 2, 6, "bf16"),
        (ManyRows(128, stages=2, line=32), 129, 65, 200, 2, 8, "fp16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (FewRows(16, 16, 16), 5, 20, 35, 2, 6, "fp16"),
                (FewRows(32, 32), 31, 33, 1544, 4, 8, "bf16"),
                (ManyRows(32, line=64), 33, 64, 320, 4, 8, "bf16"),
                (ManyRows(64, 4), 65, 51, 72, 2, 8, "fp16"),
            )
        ),
    ],
)
def test_products_of_few_and_of_many_rows_are_rounded_once(
    cut: FewRows | ManyRows,
    m: int,
    n: int,
    k: int,
    d: int,
    bits: int,
    dtype: str,
    tmp_path: Path,
    emulate: Callable[..., float],
) -> None:
    assert emulate(cut, m, n, k, tmp_path, d=d, bits=bits, dtype=dtype) <= ONCE[dtype]


FEW, MANY = FewRows(8, 16, 16, 3), ManyRows(32)


@needs_a_compiler
@pytest.mark.parametrize("cut", [FEW, MANY])
@pytest.mark.parametrize(("late", "turns"), [(False, 1), (True, 1), (True, 2)])
def test_nothing_depends_on_which_thread_is_first_or_when_copies_arrive(
    cut: FewRows | ManyRows, late: bool, turns: int, tmp_path: Path, emulate: Callable[..., float]
) -> None:
    assert emulate(cut, 31, 40, 448, tmp_path, late=late, turns=turns) <= ONCE["fp16"]


def spoil(there: str, instead: str, folder: Path, monkeypatch: pytest.MonkeyPatch, place: int = 0) -> None:
    """Has other kernels compiled: with something instead of what is there, counted from 0."""
    sources = folder / "cuda"
    shutil.copytree(nvrtc.SOURCES, sources)
    for source in sources.glob("*.cu"):
        parts = source.read_text().split(there)
        if place + 1 < len(parts):
            source.write_text(there.join(parts[: place + 1]) + instead + there.join(parts[place + 1 :]))
    monkeypatch.setattr(nvrtc, "SOURCES", sources)


@needs_a_compiler
@pytest.mark.parametrize(
    ("cut", "wait", "place"),
    [
        (FEW, "__syncthreads();", 0),
        (MANY, "wait_for_copies<STAGES - 2>();", 0),
        (MANY, "__syncthreads();", 1),
        *(pytest.param(FEW, "__syncthreads();", place, marks=pytest.mark.slow) for place in (1, 2)),
        *(pytest.param(MANY, "__syncthreads();", place, marks=pytest.mark.slow) for place in (0, 2, 3)),
        pytest.param(MANY, "wait_for_products();", 0, marks=pytest.mark.slow),
    ],
)
def test_the_emulator_sees_a_wait_that_is_missing(
    cut: FewRows | ManyRows,
    wait: str,
    place: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    emulate: Callable[..., float],
) -> None:
    spoil(wait, "", tmp_path, monkeypatch, place)
    assert not emulate(cut, 127, 40, 448, tmp_path, turns=2) <= ONCE["fp16"]


@needs_a_compiler
@pytest.mark.parametrize(
    ("cut", "check", "instead", "said"),
    [
        (FEW, "stretch * kWords + i < STRIDE", "true", "AddressSanitizer"),  # words, of the last row
        (MANY, "at < STRIDE);", "true);", "AddressSanitizer"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (FEW, "at < m", "true", "AddressSanitizer"),  # x
                (FEW, "out_m >= m", "false", "AddressSanitizer"),  # y
                (MANY, "turn * 64 + piece * 8 < K", "true", "AddressSanitizer"),
                (MANY, "first_m + at_m >= m", "false", "AddressSanitizer"),
                (MANY, "x_row * 128", "x_row * 128 + 8", "Assertion"),  # a copy to where it is not aligned
                (MANY, "wait_for_copies<0>();", "", "Assertion"),  # copies that the end would overtake
            )
        ),
    ],
)
def test_the_emulator_sees_an_access_that_is_none_of_a_kernels(
    cut: FewRows | ManyRows,
    check: str,
    instead: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    emulate: Callable[..., float],
) -> None:
    spoil(check, instead, tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=said):
        emulate(cut, 9, 40, 320, tmp_path)


@needs_a_compiler
@pytest.mark.parametrize("cut", [FEW, MANY])
def test_the_emulator_sees_that_a_kernel_asks_for_too_little_shared_memory(
    cut: FewRows | ManyRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulate: Callable[..., float]
) -> None:
    bytes_of = type(cut).shared_bytes
    monkeypatch.setattr(type(cut), "shared_bytes", lambda *given: bytes_of(*given) - 16)
    with pytest.raises(AssertionError, match="AddressSanitizer"):
        emulate(cut, 9, 40, 448, tmp_path)


@pytest.mark.parametrize(("d", "bits"), FORMATS)
def test_a_kernel_knows_how_many_words_a_row_has(d: int, bits: int) -> None:
    for k in range(1, 300):
        codes = np.zeros((1, -(-k // d)), np.uint8)
        assert as_words(pack_indices(codes, bits)).shape == (1, row_words(k, d, bits))


@pytest.mark.parametrize(("d", "bits"), FORMATS)
@pytest.mark.parametrize("sm", SMS)
def test_a_kernel_of_each_list_can_be_launched_without_asking_for_more_memory(
    sm: int, d: int, bits: int
) -> None:
    for rows, k in itertools.product((1, 8, 9, 16, 17, 64, 65, 256), (1, 8, 320, 1152, 1160, 15360)):
        cuts = [cut for cut in tiles(sm, rows, k) if not isinstance(cut, Tile)]
        asked = [cut.shared_bytes(k, d, bits) for cut in cuts]
        assert min(asked, default=0) <= STATIC_LIMIT and max(asked, default=0) <= SHARED_LIMIT[sm] * 1024
        assert all(cut.threads(k, d, bits) <= 1024 for cut in cuts)


def test_a_source_that_does_not_compile_is_named_with_its_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings")
    (tmp_path / "bad.cu").write_text("#warning that comes first\n__device__ int f() { return g; }")
    for name in ("ptx.cuh", "table.cuh"):
        (tmp_path / name).touch()
    monkeypatch.setattr(nvrtc, "SOURCES", tmp_path)
    with pytest.raises(BuildFailed, match=r"refused bad\.cu for sm_87: .*identifier \"g\" is undefined"):
        nvrtc.compile_ptx("bad.cu", 87, {})


def test_a_compiler_that_is_not_installed_is_said_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for bindings in (None, SimpleNamespace()):
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
        with pytest.raises(MissingDependency, match=r"cuda-bindings.*pip install 'trimtab\[kernels\]'"):
            nvrtc.library()
    without_library = SimpleNamespace(nvrtcVersion=lambda: ctypes.CDLL("libnvrtc-of-nobody.so"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(nvrtc=without_library))
    with pytest.raises(MissingDependency, match=r"nvidia-cuda-nvrtc.*pip install 'trimtab\[kernels\]'"):
        nvrtc.library()
