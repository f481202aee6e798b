"""The learning rate over the steps."""

import math

import pytest

from weft.math.schedule import lr_factor


def test_warm_up_rises_in_even_steps_to_the_full_rate():
    assert [lr_factor(s, 100, 4, "constant", 0.0) for s in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_a_cosine_is_halfway_down_in_the_middle_and_at_the_floor_at_the_end():
    assert lr_factor(0, 100, 0, "cosine", 0.1) == 1.0
    assert lr_factor(50, 100, 0, "cosine", 0.1) == pytest.approx(0.55)
    assert lr_factor(100, 100, 0, "cosine", 0.1) == pytest.approx(0.1)
    assert lr_factor(25, 100, 0, "cosine", 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_a_line_falls_evenly_after_the_warm_up():
    assert [lr_factor(s, 14, 4, "linear", 0.0) for s in (4, 9, 14)] == pytest.approx([1.0, 0.5, 0.0])
