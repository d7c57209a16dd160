"""The noise is torch's noise: where torch runs its AVX2 kernel, every comparison is of bits."""

from __future__ import annotations

import hashlib
import math
import sys

import numpy as np
import pytest
import torch

from trimtab.errors import InputError
from trimtab.runtime.noise import NoiseGenerator, box_muller

# GCC fuses torch's AVX2 kernel, which AVX-512 machines run too. Other builds are held to the stated bound.
EXACT = sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

UNIT_RADIUS = 6601320
"""The uniform, in units of 2^-24, whose radius is exactly 1: near (1 - exp(-1/2)) 2^24."""


def torch_draws(seed: int, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(shape, generator=generator).numpy() for shape in shapes]


def torch_box_muller(words: np.ndarray) -> np.ndarray:
    """What torch makes of chosen words: (512 n,) -> (512 n,) float32, through forged generator states."""
    # Undo the Twister's tempering (Matsumoto and Nishimura 1998, section 2.1), last step first.
    state = words.astype(np.uint32)
    state ^= state >> 18
    state ^= (state << 15) & np.uint32(0xEFC60000)
    tempered = state.copy()
    for _ in range(4):  # each round gives 7 more bits
        state = tempered ^ ((state << 7) & np.uint32(0x9D2C5680))
    tempered = state.copy()
    for _ in range(2):  # each round gives 11 more bits
        state = tempered ^ (state >> 11)

    # torch's state: the seed, two int32 (words left, seeded or not), the next word, 624 words as uint64.
    generator = torch.Generator("cpu").manual_seed(0)
    forged = generator.get_state()
    forged.numpy().view(np.int32)[2] = 624
    forged.numpy().view(np.uint64)[2] = 0
    normals = np.empty((words.size // 512, 512), np.float32)
    for row, row_state in zip(normals, state.reshape(-1, 512), strict=True):
        forged.numpy().view(np.uint64)[3 : 3 + 512] = row_state
        generator.set_state(forged)
        torch.randn((512,), generator=generator, out=torch.from_numpy(row))
    return normals.reshape(-1)


def assert_same(ours: np.ndarray, theirs: np.ndarray, bound: float = 3.4e-6) -> None:
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    if EXACT:
        np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    else:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1])
@pytest.mark.parametrize(
    "shape",
    [
        *[(), (0,), (1,), (2, 0, 3), (3, 5), (15,)],  # one at a time
        *[(16,), (17,), (31,), (2, 16), (33,), (3, 7, 11)],  # groups of 16, and a last group made anew
        *[(1, 4, 64, 64), (2048 * 16,), (2048 * 16 + 1,), (3, 2048 * 16 - 1)],  # around the size of a chunk
    ],
)
def test_draws_what_torch_draws(seed: int, shape: tuple[int, ...]) -> None:
    generator = NoiseGenerator(seed)
    for theirs in torch_draws(seed, [shape] * 3):
        assert_same(generator.normal(shape), theirs)


@pytest.mark.parametrize("seed", range(8))
def test_the_state_goes_on_between_draws_of_all_sizes(seed: int) -> None:
    sizes = np.random.default_rng(seed)
    shapes = [(int(sizes.integers(limit)),) for limit in (4, 16, 40, 2000) for _ in range(50)]
    shapes = [shapes[i] for i in sizes.permutation(len(shapes))]
    generator = NoiseGenerator(seed)
    for shape, theirs in zip(shapes, torch_draws(seed, shapes), strict=True):
        assert_same(generator.normal(shape), theirs)


def test_the_second_of_a_pair_waits_through_a_big_draw() -> None:
    generator = NoiseGenerator(5)
    for theirs in torch_draws(5, [(1,), (100,), (1,), (1,)]):
        assert_same(generator.normal(theirs.shape), theirs)


@pytest.mark.parametrize("seed", [-1, -3, -(2**31), -(2**63), 2**32, 2**32 + 7, 2**63, 2**64 - 1])
def test_takes_the_seeds_that_torch_takes(seed: int) -> None:
    shape = (2, 100)
    assert_same(NoiseGenerator(seed).normal(shape), torch_draws(seed, [shape])[0])


def test_takes_numpy_integers() -> None:
    np.testing.assert_array_equal(
        NoiseGenerator(np.int64(-3)).normal((20,)), NoiseGenerator(-3).normal((20,))
    )


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 16))])
def test_every_radius_and_every_angle(part: int) -> None:
    """The proof: each has 2^24 values, and a normal is one product of the two. Part k takes every 16th."""
    uniforms = np.arange(part, 2**24, 16, dtype=np.uint32).reshape(-1, 8)
    radii = np.stack((uniforms, np.zeros_like(uniforms)), axis=1).reshape(-1)  # times cos(0) = 1
    assert_same(box_muller(radii), torch_box_muller(radii), bound=5e-7)
    angles = np.stack((np.full_like(uniforms, UNIT_RADIUS), uniforms), axis=1).reshape(-1)
    assert_same(box_muller(angles), torch_box_muller(angles), bound=5e-7)


def test_the_unit_radius_is_one() -> None:
    assert abs(UNIT_RADIUS - (1 - math.exp(-0.5)) * 2**24) < 1
    assert box_muller(np.array([UNIT_RADIUS] * 8 + [0] * 8, np.uint32))[0] == 1


def test_there_is_no_negative_zero() -> None:
    normals = box_muller(np.array([0] * 12 + [2**23] * 4, np.uint32))  # radius 0; no turn and half a turn
    assert not normals.any()
    assert not np.signbit(normals).any()


def test_the_bits_do_not_depend_on_the_machine() -> None:
    """Pinned for machines whose own torch draws other bits: Arm, or no AVX2."""
    bits = NoiseGenerator(0).normal((1, 4, 64, 64)).astype("<f4").tobytes()
    digest = "24efac55b39e95b2d74d8fb5b3a8e8a8e808bd04129f260c4cdbb225bb952a4d"
    assert hashlib.sha256(bits).hexdigest() == digest


@pytest.mark.parametrize("seed", [True, 1.0, "1", None, np.array([1])])
def test_refuses_what_is_no_integer_as_torch_does(seed: object) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        torch.Generator("cpu").manual_seed(seed)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="give an integer"):
        NoiseGenerator(seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_refuses_seeds_over_64_bits_as_torch_does(seed: int) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        torch.Generator("cpu").manual_seed(seed)
    with pytest.raises(InputError, match="does not fit in 64 bits"):
        NoiseGenerator(seed)


@pytest.mark.parametrize("shape", [(-1,), (0, -1), (-4, -8)])
def test_refuses_negative_sizes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="negative size"):
        NoiseGenerator(0).normal(shape)
