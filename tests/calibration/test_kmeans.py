"""k-means codebooks: what is packed, how well, and what is found before anything runs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import trimtab
from trimtab.calibration.codebook_plan import Settings
from trimtab.calibration.kmeans import cluster, make_codebooks, nearest, pack, rounded
from trimtab.errors import CalibrationError, MissingDependency
from trimtab.passes.codebooks import FORMATS, PackedWeight
from trimtab.passes.vq import PackWeights, sites


def model(**weights: Any) -> ir.Model:
    """A chain of MatMuls, one for each weight (O, I); dots in names are written as double underscores."""
    x = ir.Value(name="x", shape=ir.Shape([1, 64]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, initializers, last = [], [], x
    for name, weight in weights.items():
        name = name.replace("__", ".") + ".weight.T"
        array = np.ascontiguousarray(weight.T)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), const_value=tensor)
        value.type = ir.TensorType(tensor.dtype)
        initializers.append(value)
        nodes.append(ir.node("MatMul", [last, value]))
        last = nodes[-1].outputs[0]
    graph = ir.Graph([x], [last], nodes=nodes, initializers=initializers, opset_imports={"": 23})
    return ir.Model(graph, ir_version=11)


def weight(seed: int = 0, shape: tuple[int, int] = (64, 64)) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_fewer_sub_vectors_than_codewords_are_refused() -> None:
    with pytest.raises(CalibrationError, match="16 sub-vectors were given for 64 codewords"):
        pack([weight(shape=(4, 16))], 2, 64)


def test_numbers_that_are_not_finite_are_refused_by_name() -> None:
    broken = weight()
    broken[3, 5] = np.inf
    with pytest.raises(
        CalibrationError, match=r"blocks\.1\.to_k\.weight\.T holds numbers that are not finite"
    ):
        make_codebooks({"denoiser": model(blocks__0__to_q=weight(), blocks__1__to_k=broken)}, Settings())


def test_without_faiss_its_extra_is_named_before_anything_is_exported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependency, match=r"'faiss' is not installed .* pip install 'trimtab\[vq\]'"):
        make_codebooks({"denoiser": model(blocks__0__to_q=weight())}, Settings())
    with pytest.raises(MissingDependency, match="'faiss' is not installed"):
        trimtab.compile(tmp_path / "no model is looked for", tmp_path / "bundle", vq=2)


def test_clusters_are_found_again() -> None:
    random = np.random.default_rng(0)
    centres = random.uniform(-1, 1, (16, 4)).astype(np.float32)
    members = random.integers(0, 16, 4000)
    vectors = centres[members] + random.standard_normal((4000, 4)).astype(np.float32) * 1e-3
    codebook = cluster(vectors, 16, iterations=(60, 40))
    lost = np.square(vectors - codebook[nearest(vectors, codebook)]).mean()
    # A start may merge two centres; a random codebook of this size loses 50 times as much.
    assert lost < 0.2 * np.square(vectors - vectors.mean(0)).mean()


def test_steps_on_everything_mend_what_a_sample_misses() -> None:
    vectors = np.random.default_rng(0).standard_t(5, (20000, 4)).astype(np.float32)

    def lost(iterations: tuple[int, int]) -> float:
        codebook = cluster(vectors, 64, iterations=iterations, sample=4)
        return float(np.square(vectors - codebook[nearest(vectors, codebook)]).mean())

    assert lost((20, 20)) < 0.95 * lost((20, 0))


def test_a_scale_for_every_row_helps_where_rows_differ() -> None:
    rows = weight(shape=(64, 128)) * np.geomspace(0.01, 1, 64, dtype=np.float32)[:, None]
    (plain,), (scaled,) = pack([rows], 2, 64), pack([rows], 2, 64, scaled=True)
    relative = [
        float((np.square(p.rows() - rows).sum(1) / np.square(rows).sum(1)).mean()) for p in (plain, scaled)
    ]
    assert relative[1] < 0.5 * relative[0]


def test_a_row_of_zeros_stays_zero_under_a_scale() -> None:
    rows = weight(shape=(64, 128))
    rows[5] = 0
    (packed,) = pack([rows], 2, 64, scaled=True)
    assert np.isfinite(packed.rows()).all()


def test_codewords_are_numbers_of_fp16_unless_that_would_cost_them() -> None:
    (packed,) = pack([weight()], 2, 64)
    np.testing.assert_array_equal(packed.codebook, packed.codebook.astype(np.float16))
    tiny = weight() * np.float32(1e-9)
    np.testing.assert_array_equal(rounded(tiny), tiny)
    huge = weight() * np.float32(1e9)
    np.testing.assert_array_equal(rounded(huge), huge)


def test_more_bits_lose_less_and_the_error_is_what_it_says() -> None:
    rows = weight(shape=(128, 256))
    errors = []
    for bits in (2, 3, 4):
        (packed,) = pack([rows], bits, FORMATS[bits].codewords)
        assert packed.error == pytest.approx(
            np.square(packed.rows() - rows).sum() / np.square(rows).sum(), 1e-4
        )
        errors.append(packed.error)
    assert errors == sorted(errors, reverse=True) and errors[0] < 0.2


def same(first: PackedWeight, second: PackedWeight) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def test_work_that_was_cut_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    models = {"denoiser": model(blocks__0__to_q=weight(0), blocks__1__to_q=3 * weight(1))}
    whole = make_codebooks(models, Settings())
    done: list[str] = []

    def stop(text: str) -> None:
        done.append(text)
        if len(done) == 1:
            raise KeyboardInterrupt  # as the progress of a thread that works when Ctrl-C comes

    with pytest.raises(KeyboardInterrupt):
        make_codebooks(models, Settings(), tmp_path / "books", threads=1, progress=stop)
    kept = len(list((tmp_path / "books").glob("*.safetensors")))
    assert kept == len(done) >= 1
    again = make_codebooks(models, Settings(), tmp_path / "books", progress=done.append)
    assert len(done) == len(whole.layers), "what was there was made again"
    third = make_codebooks(models, Settings(), tmp_path / "books", progress=done.append)
    assert len(done) == len(whole.layers)
    for name, packed in whole.layers.items():
        assert same(packed, again.layers[name]) and same(packed, third.layers[name])


def test_weights_that_share_a_codebook_have_the_same_one_and_are_made_together(tmp_path: Path) -> None:
    models = {"denoiser": model(blocks__0__to_q=weight(0), blocks__1__to_q=weight(1))}
    store, told = tmp_path / "books", list[str]()
    books = make_codebooks(models, Settings(), store, progress=told.append)
    first, second = books.layers.values()
    np.testing.assert_array_equal(first.codebook, second.codebook)
    assert len(first.codebook) == 256  # 2 x 1024 sub-vectors; one of them alone would have 128
    assert books.nbytes == 2 * 64 * 64 // 4 + 256 * 4 * 4
    assert told == ["k-means of blocks.0.to_q.weight.T and 1 more"]
    for packed, site in zip(books.layers.values(), sites(models["denoiser"]), strict=True):
        vectors, codes = site.rows().reshape(-1, 4), packed.codes.reshape(-1)
        np.testing.assert_array_equal(codes, nearest(vectors, packed.codebook))
    next(store.glob("*.safetensors")).unlink()  # half of what was stored together
    again = make_codebooks(models, Settings(), store, progress=told.append)
    assert len(told) == 2 and all(same(again.layers[name], books.layers[name]) for name in books.layers)


def test_a_store_of_another_model_or_other_settings_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "books"
    make_codebooks({"denoiser": model(blocks__0__to_q=weight(0))}, Settings(), store)
    with pytest.raises(CalibrationError, match="holds the codebooks of another model"):
        make_codebooks({"denoiser": model(blocks__0__to_q=weight(1))}, Settings(), store)
    with pytest.raises(CalibrationError, match=r"other settings \(seed 0 and not 7\)"):
        make_codebooks({"denoiser": model(blocks__0__to_q=weight(0))}, Settings(seed=7), store)
    rules = (("blocks.0.to_q", "keep"),)
    with pytest.raises(CalibrationError, match=r"other settings \(rules "):
        make_codebooks({"denoiser": model(blocks__0__to_q=weight(0))}, Settings(rules=rules), store)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("mine")
    with pytest.raises(CalibrationError, match=r"holds no codebooks\.json: name an empty folder"):
        make_codebooks({"denoiser": model(blocks__0__to_q=weight(0))}, Settings(), tmp_path / "other")


def test_segments_that_differ_in_a_weight_of_one_name_are_packed_each_from_its_own(tmp_path: Path) -> None:
    first, second = (model(blocks__0__to_q=weight(0), blocks__1__to_q=weight(n)) for n in (1, 2))
    dense = {name: {s.name: s.rows() for s in sites(m)} for name, m in (("a", first), ("b", second))}
    for store in (tmp_path / "books", tmp_path / "books", None):  # made, found again, and without
        books = make_codebooks({"a": first, "b": second}, Settings(), store)
        shared, other = sorted(dense["a"])
        assert books.layers.keys() == {shared, other, f"b/{other}"}
        for name in ("a", "b"):
            for layer, rows in dense[name].items():
                error = np.square(books.of(name).layers[layer].rows() - rows).sum() / np.square(rows).sum()
                assert error == pytest.approx(books.of(name).layers[layer].error, rel=1e-3)


@pytest.mark.parametrize(
    "sizes", [((64, 96), (32, 48)), ((32, 48), (64, 96)), ((64, 96), (8, 16)), ((8, 16), (64, 96))]
)
def test_a_narrower_denoiser_s_weights_have_codewords_for_their_own_number(
    sizes: tuple[tuple[int, int], ...],
) -> None:
    models = {
        name: model(blocks__0__to_q=spread * weight(shape=s))
        for name, spread, s in zip("ab", (1, 3), sizes, strict=True)
    }
    books = make_codebooks(models, Settings())
    for name, (rows, _) in zip("ab", sizes, strict=True):
        result = PackWeights(books.of(name))(models[name])
        (layer,) = (*result.applied, *(r.where for r in result.refused))
        if rows == 8:
            assert [r.reason for r in result.refused] == ["it is too small: 8 x 16"]
        else:
            assert len(books.of(name).layers[layer].codebook) == {32: 32, 64: 128}[rows]


def test_a_damaged_file_of_a_store_is_found(tmp_path: Path) -> None:
    models, store = {"denoiser": model(blocks__0__to_q=weight(0))}, tmp_path / "books"
    make_codebooks(models, Settings(), store)
    (file,) = store.glob("*.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(CalibrationError, match=r"to_q\.weight\.T\.safetensors is damaged"):
        make_codebooks(models, Settings(), store)


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: {"codes": packed.codes + 64},
        lambda packed: {"codes": packed.codes.reshape(-1)},
        lambda packed: {"codebook": packed.codebook.reshape(-1)},
        lambda packed: {"codebook": packed.codebook[:, :0]},
    ],
    ids=[
        "a code without a codeword",
        "codes without rows",
        "a codebook without rows",
        "codewords of nothing",
    ],
)
def test_parts_that_do_not_fit_each_other_are_damage(
    tmp_path: Path, change: Callable[[PackedWeight], dict[str, Any]]
) -> None:
    from trimtab.calibration.codebook_store import CodebookStore

    store = CodebookStore(tmp_path, "f", {})
    (packed,) = pack([weight()], 2, 64)
    store.put("w", dataclasses.replace(packed, **change(packed)))
    with pytest.raises(CalibrationError, match="is damaged"):
        store.get("w")
