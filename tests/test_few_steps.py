"""Lists of denoising steps: their values by fractions, and their way through a file's header."""

import json
from fractions import Fraction

import pytest

from weft.few_steps import MOST_STEPS, StepList

FOUR = StepList.of(4, 5.0)


def test_four_steps_at_shift_5_are_those_of_wans_distilled_models():
    """5 t / (1 + 4 t) at 1, 3/4, 1/2, 1/4 is 1, 15/16, 5/6, 5/8."""
    assert FOUR.times == (1.0, 0.9375, 5 / 6, 0.625)
    assert str(FOUR) == "4 steps at 1, 0.9375, 0.8333, 0.625 (shift 5)"


@pytest.mark.parametrize("shift", [1, 3, 5, 12])
@pytest.mark.parametrize("steps", range(1, MOST_STEPS + 1))
def test_a_list_is_even_steps_moved_by_the_shift_and_never_truncated(steps, shift):
    even = [Fraction(steps - i, steps) for i in range(steps)]
    moved = [float(shift * t / (1 + (shift - 1) * t)) for t in even]
    found = StepList.of(steps, float(shift))
    assert found.times == pytest.approx(moved, rel=1e-12)
    assert found.times[0] == 1.0 and sorted(found.times, reverse=True) == list(found.times) and found.times[-1] > 0


def test_a_list_of_another_length_is_made_at_the_same_shift_and_of_its_own_length_is_itself():
    odd = StepList((1.0, 0.7), 5.0)
    assert odd.resized(2) is odd
    assert odd.resized(4) == FOUR


@pytest.mark.parametrize("steps", range(1, MOST_STEPS + 1))
def test_a_list_survives_a_files_header_to_the_bit(steps):
    made = StepList.of(steps, 7.3)
    assert StepList.from_json(made.to_json()) == made


def test_a_header_says_what_another_program_needs():
    assert json.loads(FOUR.to_json()) == {
        "times": list(FOUR.times), "shift": 5.0, "steps": 4, "guidance": 1.0, "renoise": "fresh",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[1, 0.5]", "{}", '{"times": [1, 0.5]}', '{"times": [], "shift": 5}', '{"times": 1, "shift": 5}',
        '{"times": [0.5, 1], "shift": 5}', '{"times": [1, 1], "shift": 5}', '{"times": [1, 0], "shift": 5}',
        '{"times": [1.5, 1], "shift": 5}', '{"times": ["a"], "shift": 5}', '{"times": [1, NaN], "shift": 5}',
        '{"times": [1], "shift": "much"}', '{"times": [NaN], "shift": 5}', '{"times": [1, 0.5], "shift": NaN}',
        '{"times": [1, 0.5], "shift": 0}',
    ],
)  # fmt: skip
def test_text_that_is_no_list_is_refused_with_its_beginning(text):
    with pytest.raises(ValueError, match="is no list of denoising steps"):
        StepList.from_json(text)
