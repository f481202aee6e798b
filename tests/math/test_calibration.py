"""Whether probabilities mean what they say: bins of equal mass, intercept and slope."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from weft.math import calibration
from weft.math.calibration import expected_error, log_odds, of_classes, reliability


def outcomes(n: int, bias: float = 0.0, slope: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and whether it was so when the true log odds are bias + slope x theirs."""
    chance = np.random.default_rng(3)
    p = chance.uniform(0.02, 0.98, n)
    return p, chance.random(n) < 1 / (1 + np.exp(-(bias + slope * log_odds(p))))


def test_bins_hold_equally_many_and_are_scikit_learns_quantile_bins():
    p, y = outcomes(1500)
    bins = reliability(p, y.astype(float))
    assert [one.count for one in bins] == [100] * 15
    observed, predicted = calibration_curve(y, p, n_bins=15, strategy="quantile")
    assert [one.observed for one in bins] == pytest.approx(list(observed), abs=1e-12)
    assert [one.predicted for one in bins] == pytest.approx(list(predicted), abs=1e-12)
    assert expected_error(p, y.astype(float)) == pytest.approx(np.abs(observed - predicted).mean(), abs=1e-12)


def test_probabilities_that_mean_what_they_say_have_no_error_beyond_chance():
    p, y = outcomes(60_000)
    assert expected_error(p, y.astype(float)) < 0.01
    assert expected_error(np.full(100, 0.5), (np.arange(100) < 90).astype(float)) == pytest.approx(0.4)


def test_equal_probabilities_share_their_outcomes_whatever_the_order_of_rows():
    p, y = np.repeat([0.2, 0.7], 10), np.asarray([1.0, 0.0] * 10)
    turned = np.random.default_rng(0).permutation(20)
    assert reliability(p, y, 4) == reliability(p[turned], y[turned], 4)


def test_fewer_documents_than_bins_make_fewer_bins():
    assert [one.count for one in reliability(np.asarray([0.1, 0.9]), np.asarray([0.0, 1.0]))] == [1, 1]
    assert expected_error(np.zeros(0), np.zeros(0)) is None


def test_of_more_than_two_classes_the_winner_is_what_was_said():
    p, y = np.asarray([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]), np.asarray([0, 1])
    said, came = of_classes(p, y)
    assert list(said) == [0.5, 0.7] and list(came) == [1.0, 0.0]


@pytest.mark.parametrize(("bias", "slope"), [(0.0, 1.0), (-0.7, 1.0), (0.4, 0.6)])
def test_intercept_and_slope_are_those_of_logistic_regression(bias: float, slope: float):
    p, y = outcomes(4000, bias, slope)
    found = calibration.calibration_slope(p, y)
    fitted = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(log_odds(p)[:, None], y)
    assert found == pytest.approx(fitted.coef_[0, 0], rel=1e-4)
    assert found == pytest.approx(slope, abs=0.1)
    large = calibration.calibration_in_the_large(p, y)
    assert large is not None
    assert (1 / (1 + np.exp(-(log_odds(p) + large)))).sum() == pytest.approx(y.sum(), rel=1e-10)  # the score equation
    if slope == 1:
        assert large == pytest.approx(bias, abs=0.1)


def test_what_cannot_be_fitted_is_none():
    p = np.asarray([0.1, 0.2, 0.8, 0.9])
    one_class, parted = np.ones(4, bool), p > 0.5
    assert calibration.calibration_slope(p, one_class) is calibration.calibration_in_the_large(p, one_class) is None
    assert calibration.calibration_slope(p, parted) is None
    assert calibration.calibration_slope(np.full(4, 0.3), parted) is None
