"""How inputs of foreign graphs are wired, and what fixed and unknown sizes become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from foreign import LINEAR, PIXELS, compiled, linear, noise, picture, sampled, write

import trimtab
from trimtab.comparison import compare
from trimtab.errors import InputError


def test_joined_texts_numbers_mask_and_given(tmp_path: Path) -> None:
    """SDXL's wiring in small: two texts side by side, time ids, a mask, and the negative prompt's zeros."""
    tiny.t5_tokenizer(6).save_pretrained(tmp_path / "tokenizer")
    one = "{ f = Cast<to = 1>(ids) hidden = Unsqueeze(f, last) }"
    for name in "ab":
        write(
            tmp_path / f"{name}.onnx",
            "int32[B,T] ids",
            "float[B,T,1] hidden",
            f"<int64[1] last = {{2}}> {one}",
        )
    write(
        tmp_path / "denoiser.onnx",
        "float[N,3,H,W] sample, float timestep, float16[N,S,2] text, float[N,3] ids, bool[N,S] mask, float[N,1] given",
        "float[N,3,H,W] out_sample",
        "<float scale = {0.25}, float rate = {0.001}, int64[2] tail = {1, 2}, int64[1] one = {1}, "
        "int64[4] column = {-1, 1, 1, 1}> "
        "{ t = Mul(timestep, rate) s = Mul(sample, scale) a = Add(s, t) f = Cast<to = 1>(text) "
        "b = Cast<to = 1>(mask) w = ReduceSum<keepdims = 0>(f, tail) m = ReduceSum<keepdims = 0>(b, one) "
        "i = ReduceSum<keepdims = 0>(ids, one) g = ReduceSum<keepdims = 0>(given, one) "
        "p = Add(w, m) q = Add(p, i) r = Mul(q, g) z = Mul(r, rate) c = Reshape(z, column) "
        "out_sample = Add(a, c) }",
    )
    toml = f"""guidance = 2.0
{PIXELS}
[denoiser.inputs]
text = ["a.hidden", "b.hidden"]
ids = [1, 2, 0.5]
mask = {{ token_mask = "tokenizer", length = 6 }}
given = "given"
[a]
file = "a.onnx"
inputs = {{ ids = {{ tokens = "tokenizer/tokenizer.json", length = 6 }} }}
[b]
file = "b.onnx"
inputs = {{ ids = {{ tokens = "tokenizer", length = 6 }} }}
"""
    with compiled(tmp_path, toml) as ours:
        assert len(ours.bundle.contents.tokenizers) <= 2
        found = ours("ab", seed=1).pixels
        both = ours("ab", negative_prompt="", seed=1).pixels
    encoded = tiny.t5_tokenizer(6)(["", "ab"], padding="max_length")
    ids, mask = np.array(encoded["input_ids"]), np.array(encoded["attention_mask"])
    sums = 0.001 * (2 * ids.sum(1) + mask.sum(1) + 3.5)
    for pixels, negative in (found, 0.0), (both, float(sums[0])):
        extra = 2 * float(sums[1]) - negative
        expected = sampled(lambda x, t, extra=extra: linear(x, t) + extra, noise((1, 3, 4, 8), 1))
        assert np.abs(pixels - picture(expected)).max() < 1e-3


def test_unknown_sizes_of_a_text_are_its_tokens(tmp_path: Path) -> None:
    """An output of which neither the exporter nor onnx knows the batch."""
    tiny.t5_tokenizer(6).save_pretrained(tmp_path / "tokenizer")
    write(
        tmp_path / "text.onnx",
        "int64[B,T] ids, int64[B,T] unused",
        "float[X,Y,1] hidden, float[B,T] other",
        "<int64[1] last = {2}, int64 zero = {0}> "
        "{ other = Cast<to = 1>(unused) f = Cast<to = 1>(ids) g = Gather<axis = 1>(ids, zero) all = Equal(g, g) "
        "k = Compress<axis = 0>(f, all) hidden = Unsqueeze(k, last) }",
    )
    body = (
        LINEAR[2]
        .replace("Add(s, t)", "Add(a, m)")
        .replace("s = Mul", "b = ReduceMean(h, tail) m = Mul(b, rate) s = Mul")
    )
    body = body.replace("<", "<int64[2] tail = {1, 2}, ", 1).replace("a, m)", "p, q)")
    body = body.replace("out_sample =", "p = Add(s, t) q = Reshape(m, column) out_sample =")
    body = body.replace("<", "<int64[4] column = {-1, 1, 1, 1}, ", 1)
    write(tmp_path / "denoiser.onnx", LINEAR[0] + ", float[N,S,1] h", LINEAR[1], body, opset=18)
    wires = """inputs = { h = "text.hidden" }
[text]
file = "text.onnx"
[text.inputs]
ids = { tokens = "tokenizer", length = 6 }
unused = { token_mask = "tokenizer", length = 6 }
"""
    with compiled(tmp_path, PIXELS + wires) as ours:
        found = ours(["ab", "c"], seed=1).pixels
        assert [spec.name for spec in ours.bundle.contents.segments["text"].outputs] == ["hidden"]
    ids = tiny.t5_tokenizer(6)(["ab", "c"], padding="max_length", return_tensors="pt")["input_ids"]
    shift = 0.001 * ids.float().mean(1).reshape(2, 1, 1, 1)
    expected = sampled(lambda x, t: linear(x, t) + shift, noise((2, 3, 4, 8), 1))
    assert np.abs(found - picture(expected)).max() < 1e-5


def test_graphs_without_module_names_can_be_compared(tmp_path: Path) -> None:
    write(tmp_path / "denoiser.onnx", *LINEAR)
    with compiled(tmp_path, PIXELS):
        found = compare(tmp_path / "bundle", tmp_path / "bundle")
    assert found["steps"] == [0, 0, 0]
    assert found["modules"] == []


def test_guidance_scale_as_an_input(tmp_path: Path) -> None:
    body = LINEAR[2].replace(
        "out_sample = Add(s, t)",
        "a = Mul(g, rate) c = Reshape(a, column) b = Add(s, t) out_sample = Add(b, c)",
    )
    body = body.replace("<", "<int64[4] column = {-1, 1, 1, 1}, ", 1)
    write(
        tmp_path / "denoiser.onnx",
        LINEAR[0] + ", float16[N] g",
        LINEAR[1],
        body.replace("Mul(g,", "Mul(h,").replace("{ t =", "{ h = Cast<to = 1>(g) t ="),
    )
    with compiled(tmp_path, f'guidance = 3.0\n{PIXELS}inputs = {{ g = "guidance" }}') as ours:
        found = ours(seed=1, count=2, guidance=50).pixels
    expected = sampled(lambda x, t: linear(x, t) + 0.05, noise((2, 3, 4, 8), 1))
    assert np.abs(found - picture(expected)).max() < 1e-5


def test_decoder_of_another_layout_and_range(tmp_path: Path) -> None:
    write(tmp_path / "denoiser.onnx", *(text.replace("N,3", "N,4") for text in LINEAR))
    write(
        tmp_path / "decoder.onnx",
        "float16[B,4,Y,X] z",
        "float16[B,YY,XX,3] rgb",
        "<float[4] sizes = {1, 1, 2, 2}, float[3,4,1,1] kernel = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0}> "
        '{ f = Cast<to = 1>(z) u = Resize<mode = "nearest">(f, , sizes) c = Conv(u, kernel) '
        "t = Transpose<perm = [0, 2, 3, 1]>(c) rgb = Cast<to = 10>(t) }",
    )
    toml = f"""{PIXELS}[decoder]
file = "decoder.onnx"
scale = 2
shift = 0.5
factor = 2
layout = "NHWC"
range = [0, 1]
"""
    with compiled(tmp_path, toml) as ours:
        found = ours(seed=1, count=2, size=(12, 8)).pixels
        with pytest.raises(InputError, match="multiples of 2"):
            ours(seed=1, size=(9, 8))
    latents = sampled(linear, noise((2, 4, 4, 6), 1))[:, :3] / 2 + 0.5
    expected = latents.repeat_interleave(2, 2).repeat_interleave(2, 3).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(found - expected).max() < 2e-3  # half precision


def test_fixed_sizes(tmp_path: Path) -> None:
    write(tmp_path / "denoiser.onnx", *(text.replace("N,3,H,W", "2,3,4,8") for text in LINEAR))
    toml = PIXELS.replace("size = [8, 4]", "")
    with compiled(tmp_path, toml) as ours:
        found = ours(seed=1, count=2).pixels
        with pytest.raises(
            InputError, match=r"only 8x4 can be drawn: denoiser\.onnx was exported for this size"
        ):
            ours(seed=1, count=2, size=(16, 16))
        with pytest.raises(
            InputError, match=r"3 pictures asked for, .* fixed batch of 2: ask for 2 at a time"
        ):
            ours(seed=1, count=3)
    assert np.abs(found - picture(sampled(linear, noise((2, 3, 4, 8), 1)))).max() < 1e-5


def test_a_file_s_name_may_hold_what_no_bundle_does(tmp_path: Path) -> None:
    write(tmp_path / "den\u00a0oiser.onnx", *(text.replace("N,3,H,W", "2,4,2,4") for text in LINEAR))
    write(
        tmp_path / "dec\u200boder.onnx",
        "float[B,4,2,4] z",
        "float[B,3,4,8] rgb",
        "<float[4] sizes = {1, 1, 2, 2}, float[3,4,1,1] kernel = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0}> "
        '{ u = Resize<mode = "nearest">(z, , sizes) rgb = Conv(u, kernel) }',
    )
    decoder = '[decoder]\nfile = "dec\u200boder.onnx"\nfactor = 2\n'
    toml = PIXELS.replace("denoiser.onnx", "den\u00a0oiser.onnx") + decoder
    with (
        compiled(tmp_path, toml, steps=1) as ours,
        pytest.raises(InputError, match=r"den\?oiser\.onnx was exported for this size"),
    ):
        ours(size=(16, 16))
    write(tmp_path / "den\u00a0oiser.onnx", *(text.replace("N,3", "N,4") for text in LINEAR))
    with (
        compiled(tmp_path, toml, steps=1) as ours,
        pytest.raises(InputError, match=r"dec\?oder\.onnx was exported for this size"),
    ):
        ours(size=(16, 16))


def test_fixed_batch_with_guidance(tmp_path: Path) -> None:
    body = LINEAR[2].replace(
        "out_sample = Add(s, t)",
        "c = Cast<to = 1>(k) d = Reshape(c, column) e = Mul(d, rate) b = Add(s, t) out_sample = Add(b, e)",
    )
    body = body.replace("<", "<int64[4] column = {-1, 1, 1, 1}, ", 1)
    label = "inputs = { k = { classes = 9, null = 9 } }"
    for batch, advice in (2, "ask for 1 at a time"), (4, "ask for 2 at a time"):
        inputs = LINEAR[0].replace("N", str(batch)) + f", int64[{batch}] k"
        write(tmp_path / "denoiser.onnx", inputs, LINEAR[1], body)
        with compiled(tmp_path, f"guidance = 2.0\n{PIXELS}{label}") as ours:
            assert len(ours(label=1, count=batch // 2, seed=1).pixels) == batch // 2
            assert len(ours(label=1, count=batch, guidance=1, seed=1).pixels) == batch
            with pytest.raises(InputError, match=f"3 pictures with guidance, .* {advice}"):
                ours(label=1, count=3, seed=1)
    write(tmp_path / "denoiser.onnx", LINEAR[0].replace("N", "1") + ", int64[1] k", LINEAR[1], body)
    with pytest.raises(InputError, match="fixed batch of 1, and guidance needs two rows"):
        trimtab.compile(tmp_path / "model.toml", tmp_path / "bundle")
