"""What is drawn where nobody asks for anything."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.program import Task, TensorSpec
from trimtab.runtime.stand_ins import picture, stand_ins


@pytest.mark.parametrize("size", [(64, 48), (33, 7), (1, 1)])
def test_a_picture_has_the_size_and_range_of_one_and_is_the_same_again(size: tuple[int, int]) -> None:
    found = picture(size)
    assert found.shape == (size[1], size[0], 3) and found.dtype == np.float32
    assert np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1
    np.testing.assert_array_equal(found, picture(size))


def test_a_picture_s_amplitude_falls_with_the_frequency_as_in_photographs() -> None:
    found = picture((256, 256))
    amplitude = np.abs(np.fft.rfft2(found, axes=(0, 1))).mean(-1)
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256))
    low, high = ((near <= frequency) & (frequency < 2 * near) for near in (0.02, 0.16))
    assert amplitude[low].mean() / amplitude[high].mean() == pytest.approx(8, rel=0.2)  # three octaves
    assert 0.2 < found.std() < 0.26 and abs(found.mean() - 0.5) < 0.02


def test_a_task_is_given_what_it_has_inputs_for_and_no_more() -> None:
    inputs = [TensorSpec(kind, "float32", (), {"kind": kind}) for kind in ("label", "mask", "noise")]
    made = stand_ins(Task(tuple(inputs), (), {}), (8, 4))
    assert set(made) == {"label", "mask"} and made["mask"].shape == (4, 8, 1) and made["mask"].all()


def test_of_what_starts_from_a_picture_all_steps_run() -> None:
    assert stand_ins(Task((), (), {}, strength=0.6), (8, 4)) == {"strength": 1.0}
