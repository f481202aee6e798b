"""Numbers of the matrix R[i][j], by hand."""

import numpy as np
import pytest

from weft.math.transfer import FORMULAS, ScoreMatrix, Transfer, mean

YEARS = ("2019", "2020", "2021")
R = np.asarray([[0.9, 0.6, 0.5], [0.95, 0.8, 0.55], [0.7, 0.85, 0.9]])
B = np.asarray([0.5, 0.4, 0.45])


def matrix(values: np.ndarray = R, untrained: np.ndarray | None = B, **more) -> ScoreMatrix:
    return ScoreMatrix(YEARS[: len(values)], YEARS, values, untrained, **more)


def test_each_number_is_its_formula_by_hand():
    found = matrix().transfer()
    assert found.average == pytest.approx((0.7 + 0.85 + 0.9) / 3)
    assert found.bwt == pytest.approx(((0.7 - 0.9) + (0.85 - 0.8)) / 2)
    assert found.bti == pytest.approx(((0.7 - 0.9) + (0.85 - 0.8)) / 3)
    assert found.forgetting == pytest.approx(((0.95 - 0.7) + (0.8 - 0.85)) / 2)
    assert found.fwt == pytest.approx(((0.6 - 0.4) + (0.55 - 0.45)) / 2)
    assert found.next == pytest.approx((0.6 + 0.55) / 2)
    assert found.plasticity == pytest.approx((0.9 + 0.8 + 0.9) / 3)
    assert set(FORMULAS) == set(Transfer.__dataclass_fields__)


def test_of_errors_forgetting_is_what_they_have_grown_by():
    found = matrix(1 - R, 1 - B, less=True).transfer()
    assert found.forgetting == pytest.approx(matrix().transfer().forgetting)


def test_the_averages_of_rows_are_over_what_was_learned_by_then():
    assert [matrix().average(i) for i in range(3)] == pytest.approx([0.9, 0.875, (0.7 + 0.85 + 0.9) / 3])


def test_of_one_experience_there_is_an_average_and_what_comes_next_and_nothing_else():
    found = matrix(R[:1]).transfer()
    assert (found.average, found.next, found.plasticity) == (0.9, 0.6, 0.9)
    assert found.bwt is found.bti is found.forgetting is found.fwt is None


def test_without_scores_from_before_training_there_is_no_forward_transfer():
    assert matrix(untrained=None).transfer().fwt is None


def test_after_the_last_year_learned_comes_the_first_that_never_is():
    found = ScoreMatrix(YEARS[:2], YEARS, R[:2])
    assert found.transfer().next == pytest.approx((0.6 + 0.55) / 2)
    fixed = found.fixed(1)
    assert (fixed.learned, fixed.ahead, fixed.worst) == pytest.approx((0.875, 0.55, 0.55))


def test_trained_up_to_a_year_the_years_ahead_are_averaged_and_their_worst_is_told():
    fixed = matrix().fixed(0)
    assert (fixed.learned, fixed.ahead, fixed.worst) == pytest.approx((0.9, 0.55, 0.5))
    assert matrix(1 - R, less=True).fixed(0).worst == pytest.approx(0.5)
    stream = matrix().stream(horizon=1)
    assert (stream.ahead, stream.worst) == pytest.approx(((0.6 + 0.55) / 2, (0.6 + 0.55) / 2))
    assert matrix().stream(horizon=2).worst == pytest.approx((0.5 + 0.55) / 2)


def test_joint_training_has_an_average_over_all_tasks_and_no_transfer():
    found = ScoreMatrix(("joint",), YEARS, R[2:], B)
    told = found.transfer()
    assert told.average == pytest.approx((0.7 + 0.85 + 0.9) / 3)
    assert told.bwt is told.next is told.fwt is told.plasticity is None
    assert matrix().intransigence(list(found.last)) == pytest.approx(((0.7 - 0.9) + (0.85 - 0.8) + 0) / 3)


def test_tasks_may_be_learned_in_another_order_than_they_are_named_in():
    found = ScoreMatrix(("2021", "2019"), YEARS, np.asarray([[0.1, 0.2, 0.9], [0.8, 0.3, 0.6]]))
    told = found.transfer()
    assert told.bwt == pytest.approx(0.6 - 0.9)
    assert told.average == pytest.approx((0.6 + 0.8) / 2)
    assert told.next == pytest.approx((0.1 + 0.3) / 2)


def test_what_could_not_be_measured_leaves_the_means():
    values = R.copy()
    values[2, 0] = np.nan
    found = matrix(values).transfer()
    assert found.bwt == pytest.approx(0.85 - 0.8)
    assert found.average == pytest.approx((0.85 + 0.9) / 2)
    assert mean([float("nan"), None]) is None
