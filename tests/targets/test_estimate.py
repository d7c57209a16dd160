"""Memory before anything is built: liveness against what was counted by hand and by brute force, and the verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphs import parsed as graph

from trimtab.bundle import open_bundle
from trimtab.cli import main
from trimtab.errors import InputError, TargetError
from trimtab.passes.propagation import propagate
from trimtab.storage import read_program
from trimtab.targets.device import Device, find_device
from trimtab.targets.estimate import plan
from trimtab.targets.liveness import Rules, kernels, peak
from trimtab.targets.verdict import check_room

PLAIN = Rules(in_place=False, scores=0)
FUSED = Rules(fuses=True, joins=True, scores=0)


def peak_bytes(text: str, rules: Rules) -> int:
    model = graph(text)
    return peak(model, propagate(model, {}), rules).bytes


SKIP = """
agraph (float[1, 100] x, float[100, 100] w) => (float[1, 100] y) {
    a = MatMul (x, w)
    b = Relu (a)
    c = Sigmoid (b)
    d = MatMul (c, w)
    e = Add (d, b)
    y = MatMul (e, w)
}
"""


def test_a_tensor_is_held_until_its_last_reader() -> None:
    assert peak_bytes(SKIP, PLAIN) == 3 * 400  # b, d and e


def test_a_pointwise_result_takes_the_place_of_what_nobody_reads_later() -> None:
    text = """
    agraph (float[1, 100] x, float[100, 100] w) => (float[1, 100] y) {
        a = MatMul (x, w)
        b = Relu (a)
        y = MatMul (b, w)
    }
    """
    assert peak_bytes(text, PLAIN) == 2 * 400
    assert peak_bytes(text, Rules(scores=0)) == 400


def test_what_a_kernel_makes_on_the_way_is_not_held() -> None:
    model = graph(SKIP)
    names = [[n.outputs[0].name for n in k.nodes] for k in kernels(model, propagate(model, {}), FUSED)]
    assert names == [["a", "b"], ["c"], ["d", "e"], ["y"]]
    assert peak_bytes(SKIP, FUSED) == 2 * 400  # b and c, and e in the place of b


def test_where_kernels_are_fused_a_narrower_result_takes_the_place_of_a_wider_one() -> None:
    text = """
    agraph (float[1, 100] x, float[100, 100] w, float16[100, 100] v) => (float[1, 100] y, float16[1, 100] z) {
        a = MatMul (x, w)
        b = MatMul (a, w)
        c = Cast <to = 10> (a)
        z = MatMul (c, v)
        y = MatMul (b, w)
    }
    """
    assert peak_bytes(text, FUSED) == 2 * 400  # a and b
    assert peak_bytes(text, Rules(scores=0)) == 2 * 400 + 200


def test_what_is_joined_is_made_by_a_kernel_of_its_own() -> None:
    text = """
    agraph (float[1, 100] x, float[100, 100] w) => (float[1, 200] y) {
        a = MatMul (x, w)
        b = MatMul (a, w)
        c = Concat <axis = 1> (a, b)
        y = Relu (c)
    }
    """
    model = graph(text)
    names = [[n.outputs[0].name for n in k.nodes] for k in kernels(model, propagate(model, {}), FUSED)]
    assert names == [["a"], ["b"], ["c"], ["y"]]


def test_a_view_that_is_the_graphs_result_is_held_by_whoever_asked_for_it() -> None:
    text = """
    agraph (float[1, 100] x, float[100, 100] w) => (float[100] y) <int64[1] flat = {-1}> {
        a = MatMul (x, w)
        y = Reshape (a, flat)
    }
    """
    assert peak_bytes(text, PLAIN) == 0


def test_an_attention_holds_its_scores_where_the_backend_keeps_them() -> None:
    text = """
    agraph (float[2, 3, 50, 8] q, float[2, 3, 70, 8] k) => (float[2, 3, 50, 8] y) {
        y = Attention (q, k, k)
    }
    """
    assert peak_bytes(text, Rules(scores=2)) == 2 * (2 * 3 * 50 * 70) * 4
    assert peak_bytes(text, Rules(scores=0)) == 0


@pytest.mark.parametrize(
    ("dtype", "head", "held"), [("float16", 8, 0), ("float16", 4, 2), ("float16", 16, 2), ("float", 8, 2)]
)
def test_one_kernel_attends_in_16_bits_with_heads_that_suit_it(dtype: str, head: int, held: int) -> None:
    text = f"""
    agraph ({dtype}[2, 3, 50, {head}] q, {dtype}[2, 3, 70, {head}] k) => ({dtype}[2, 50, 3, {head}] y) {{
        a = Attention (q, k, k)
        y = Transpose <perm = [0, 2, 1, 3]> (a)
    }}
    """
    item = 2 if dtype == "float16" else 4
    rules = Rules(fuses=True, scores=2, fused_heads=range(8, 9))
    assert peak_bytes(text, rules) == held * (2 * 3 * 50 * 70) * item


def test_views_are_no_tensors_and_keep_what_they_look_at() -> None:
    text = """
    agraph (float[10, 10] x) => (float[10, 10] y) <int64[1] flat = {-1}, int64[2] square = {10, 10}> {
        a = Softmax (x)
        b = Reshape (a, flat)
        c = Softmax (x)
        d = Reshape (b, square)
        y = MatMul (c, d)
    }
    """
    assert peak_bytes(text, PLAIN) == 2 * 400


@pytest.mark.parametrize("seed", range(5))
def test_the_peak_is_that_of_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = [int(random.integers(1, 50)) for _ in range(30)]
    lines, reads = [], []
    for index in range(len(sizes)):
        read = [int(i) for i in {*random.integers(0, index, 2)}] if index else []
        reads.append(read)
        sources = ", ".join(["x", *(f"t{i}" for i in read)])
        lines.append(f"t{index} = own.Any ({sources})")
    types = ", ".join(f"float[{size}] t{index}" for index, size in enumerate(sizes))
    body = "\n".join(lines)
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 23, "own" : 1]>\n'
        f"agraph (float[1] x) => (float[1] y) <{types}> {{ {body}\n y = Relu (x) }}"
    )
    held = [
        sum(
            4 * size
            for index, size in enumerate(sizes)
            if index <= now and max([index, *(i for i, r in enumerate(reads) if index in r)]) >= now
        )
        for now in range(len(sizes))
    ]
    assert peak(model, propagate(model, {}), PLAIN).bytes == max(held)


def small_device(room: int) -> Device:
    return Device(
        "small", "Small", "tensorrt", sm="8.7", memory_bytes=512 * 2**20 + room, precisions=("fp16",)
    )


@pytest.mark.xdist_group("dit")
def test_a_bundle_that_fits_is_told_from_one_that_does_not(bundle_folder: Callable[[str], Path]) -> None:
    bundle = open_bundle(bundle_folder("dit"))
    program = read_program(bundle)
    made = plan(program, bundle.contents, find_device("rtx-4090"), precision="fp16")
    assert made.fits() and made.step_ms is not None and made.low_memory_bytes <= made.peak_bytes
    whole = plan(program, bundle.contents, find_device("cpu"), precision="fp32")
    weights = {s.name: s.weight_bytes for s in whole.segments}
    assert weights["denoiser"] == bundle.contents.segments["denoiser"].weight_bytes
    check_room(program, bundle.contents, {"fp16": [small_device(made.peak_bytes)]}, [bundle.contents.size])
    with pytest.raises(TargetError, match=r"small has .* needs .*denoiser .*"):
        check_room(program, bundle.contents, {"fp16": [small_device(2**20)]}, [bundle.contents.size])
    with pytest.raises(InputError, match="only"):
        plan(program, bundle.contents, find_device("cpu"), precision="fp32", size=(24, 24))


@pytest.mark.xdist_group("dit")
def test_the_command_answers_with_its_exit_code(
    bundle_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(bundle_folder("dit"))
    assert main(["plan", folder, "--target", "rtx-4090"]) == 0
    said = capsys.readouterr().out
    assert "it fits" in said and "MB of it are the CUDA context" in said
    assert "most of it: the CUDA context 524.3 MB, weights of denoiser transformer_blocks" in said
    (tmp_path / "own.toml").write_text(
        '[crumb]\ntitle = "Crumb"\nbackend = "tensorrt"\nsm = "8.7"\nmemory_bytes = 600_000_000\n'
        'bandwidth_gb_s = 1\nfp32_tflops = 1\nfp16_tflops = 1\nprecisions = ["fp32", "fp16"]\n'
        'source = ["none"]\n'
    )
    assert main(["plan", folder, "--target", "crumb", "--devices", str(tmp_path / "own.toml")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "crumb has" in error and "weights of denoiser" in error
    assert main(["plan", folder, "--target", "rtx-409"]) == 1
    assert "rtx-4090" in capsys.readouterr().err


@pytest.mark.xdist_group("dit")
def test_weights_that_are_equal_count_once(
    bundle_folder: Callable[[str], Path],
) -> None:
    bundle = open_bundle(bundle_folder("dit"))
    program = read_program(bundle)

    def weights(target: str) -> int:
        made = plan(program, bundle.contents, find_device(target), precision="fp32")
        return next(segment for segment in made.segments if segment.name == "denoiser").weight_bytes

    before = {target: weights(target) for target in ("rtx-4090", "cpu")}
    values = program.segments["denoiser"].model.graph.initializers
    first, second = (values[f"transformer_blocks.{block}.norm1.linear.weight"] for block in (0, 1))
    assert isinstance(first.const_value, ir.ExternalTensor)
    second.const_value = first.const_value  # as the store keeps equal ones
    assert all(weights(target) == size - first.const_value.nbytes for target, size in before.items())
