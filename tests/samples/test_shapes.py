"""The shapes sample: its pictures, captions, tokenizer and judge, and the two pipelines committed with it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

SAMPLE = Path(__file__).parents[2] / "samples" / "01_shapes"
sys.path.insert(0, str(SAMPLE))

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import generate  # noqa: E402
import judge as judging  # noqa: E402
import torch  # noqa: E402
from draw import draw  # noqa: E402
from evaluate import class_score  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from shapes import Scene, Thing, forget, sample_scenes  # noqa: E402
from train_dit import CLASSES, NULL_CLASS  # noqa: E402
from vocabulary import MAX_LENGTH, new_tokenizer  # noqa: E402

import trimtab  # noqa: E402

SD, DIT = SAMPLE / "models" / "shapes-sd", SAMPLE / "models" / "shapes-dit"


@pytest.fixture(scope="module")
def judge():
    return judging.load()


@pytest.fixture(scope="module")
def sd():
    return generate.load_sd(SD)


@pytest.fixture(scope="module")
def dit():
    return generate.load_dit(DIT)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_same_seed_draws_the_same_pixels():
    scenes = sample_scenes(1, 16)
    assert scenes == sample_scenes(1, 16)
    np.testing.assert_array_equal(draw(scenes, 2), draw(scenes, 2))
    assert not np.array_equal(draw(scenes, 2), draw(scenes, 3))


def test_pictures_are_in_range_and_objects_stay_in_their_boxes():
    scenes = [
        Scene((Thing(shape, "red", "large", position),), "white")
        for shape in ("circle", "square", "triangle", "star", "cross")
        for position in ("top left", "bottom right")
    ]
    pictures = draw(scenes, 0)
    assert pictures.shape == (10, 64, 64, 3)
    assert pictures.dtype == np.float32
    assert pictures.min() >= 0.0
    assert pictures.max() <= 1.0
    for scene, picture in zip(scenes, pictures, strict=True):
        red = picture[..., 0] - picture[..., 1] > 0.3
        box = np.s_[:32, :32] if scene.things[0].position == "top left" else np.s_[32:, 32:]
        assert red[box].sum() == red.sum() > 0


def test_a_caption_says_what_a_scene_holds():
    scene = Scene(
        (Thing("circle", "red", "large", "top left"), Thing("star", "blue", "small", "bottom right")), "white"
    )
    caption = (
        "a large red circle at the top left and a small blue star at the bottom right on a white background"
    )
    assert scene.caption == caption
    assert Scene.parse(caption) == scene


def test_captions_are_read_back_whole_or_partial():
    rng = np.random.default_rng(0)
    for scene in sample_scenes(2, 300):
        part = forget(scene, rng)
        assert Scene.parse(scene.caption) == scene
        assert Scene.parse(part.caption) == part


@pytest.mark.parametrize("caption", ["a red dog", "red circle", "a red circle on a pink background"])
def test_other_sentences_are_refused(caption):
    with pytest.raises(ValueError, match="grammar"):
        Scene.parse(caption)


def test_each_word_is_one_token_and_comes_back(tmp_path):
    tokenizer = new_tokenizer(tmp_path)
    for scene in sample_scenes(3, 100):
        ids = tokenizer(scene.caption).input_ids
        assert len(ids) == len(scene.caption.split()) + 2 <= MAX_LENGTH
        assert tokenizer.decode(ids, skip_special_tokens=True) == scene.caption


def test_any_text_can_be_tokenized(tmp_path):
    tokenizer = new_tokenizer(tmp_path)
    ids = tokenizer("Ünïcode, 猫 & 42").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]


def test_the_judge_reads_fresh_real_pictures(judge):
    scenes = sample_scenes(7001, 500)
    score = judging.score(judge, draw(scenes, 7001), scenes)
    assert score.overall.value >= 0.98
    assert all(estimate.value >= 0.98 for estimate in score.by_attribute.values())


def test_the_judge_counts_only_what_is_stated():
    seen = Scene(
        (Thing("star", "red", "small", "top left"), Thing("cross", "blue", "large", "top right")), "gray"
    )
    right = judging.compare(Scene((Thing("cross", "blue"),)), seen)
    assert right == {"count": [False], "shape": [True], "colour": [True]}
    moved = judging.compare(Scene((Thing("star", "red", "small", "bottom left"),), "gray"), seen)
    assert moved == {
        "count": [False],
        "shape": [False],
        "colour": [False],
        "size": [False],
        "position": [False],
        "background": [True],
    }


def test_the_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    first = rng.standard_normal((200_000, 3))
    second = 2.0 * rng.standard_normal((200_000, 3)) + (3.0, 0.0, 0.0)
    # |m|^2 = 9, and (2 - 1)^2 for each of three axes.
    assert judging.frechet_distance(first, second) == pytest.approx(12.0, rel=0.02)
    assert judging.frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("path", "limit"),
    [(SD, 10_000_000), (DIT, 10_000_000), (judging.WEIGHTS.parent / "judge.safetensors", 2_000_000)],
)
def test_weights_stay_within_their_budget(path, limit):
    assert (folder_bytes(path) if path.is_dir() else path.stat().st_size) <= limit


def test_weights_have_names_that_every_supported_transformers_reads():
    weights = load_file(SD / "text_encoder" / "model.safetensors")
    # As the hub's, and not as transformers 5 saves them.
    assert all(name.startswith("text_model.") for name in weights)


def test_the_text_pipeline_is_what_its_compiler_expects(sd):
    assert sd.unet.config.sample_size * sd.vae_scale_factor == 64
    assert len(sd.unet.down_blocks) == 3
    assert all(len(block.attentions) == 2 for block in sd.unet.down_blocks)
    assert sd.tokenizer.model_max_length == MAX_LENGTH
    assert sd.unet.dtype == torch.float32


def test_the_text_pipeline_survives_a_round_trip(sd, tmp_path):
    sd.save_pretrained(tmp_path)
    again = generate.load_sd(tmp_path)
    for name in ("unet", "vae", "text_encoder"):
        first, second = getattr(sd, name).state_dict(), getattr(again, name).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_class_pipeline_has_a_null_class_and_names(dit):
    assert dit.transformer.config.num_embeds_ada_norm == NULL_CLASS
    assert dit.get_label_ids(["red circle"]) == [CLASSES.index("red circle")]
    tables = [
        block.norm1.emb.class_embedder.embedding_table.weight for block in dit.transformer.transformer_blocks
    ]
    assert all(torch.equal(table, tables[0]) for table in tables)
    assert tables[0][len(CLASSES) : NULL_CLASS].abs().max() == 0.0


def test_the_text_pipeline_draws_what_the_caption_says(judge, sd):
    scenes = sample_scenes(7002, 24)
    pictures = generate.from_captions(sd, [scene.caption for scene in scenes], steps=12, guidance=5.0, seed=0)
    score = judging.score(judge, pictures, scenes)
    swapped = judging.score(judge, pictures, scenes[1:] + scenes[:1])
    assert score.overall.value > 0.75
    assert score.overall.value > swapped.overall.value + 0.25


def test_the_class_pipeline_draws_its_class(judge, dit):
    classes = list(range(len(CLASSES)))
    pictures = generate.from_classes(dit, classes, steps=12, guidance=3.0, seed=0)
    # Chance is 1 in 30. Thirty pictures have a standard error of 5%; the README has the number.
    assert class_score(judge, pictures, classes).value > 0.75


@pytest.mark.xdist_group("shapes-sd")
def test_the_compiled_text_pipeline_draws_what_diffusers_draws(sample_bundle, sd):
    prompt = "a large red circle at the top left on a white background"
    with trimtab.load(sample_bundle("shapes-sd")) as pipe:
        ours = pipe(prompt, seed=0, schedule=3).pixels
    generator = torch.Generator().manual_seed(0)
    theirs = sd(prompt, num_inference_steps=3, generator=generator, output_type="np").images
    assert np.abs(ours - theirs).max() <= 1e-3
