"""Intervals and tests over seeds and documents: equal to scipy's, which is no dependency."""

from itertools import product

import numpy as np
import pytest

from weft.math.intervals import grouped_bootstrap, paired, sign_flips, t_interval, t_quantile, t_tail

OURS, THEIRS = [0.80, 0.82, 0.79, 0.85, 0.81], [0.78, 0.80, 0.80, 0.80, 0.79]


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 30, 200])
def test_students_t_is_scipys(freedom: int):
    t = pytest.importorskip("scipy.stats").t
    for x in (0.0, 0.01, 0.7, 2.3, 8.0):
        assert t_tail(x, freedom) == pytest.approx(t.sf(x, freedom), abs=1e-11)  # differences of large ln(gamma)
    for p in (0.9, 0.975, 0.995):
        assert t_quantile(p, freedom) == pytest.approx(t.ppf(p, freedom), rel=1e-11)


def test_the_quantiles_of_textbooks():
    assert t_quantile(0.975, 1) == pytest.approx(12.706, abs=1e-3)
    assert t_quantile(0.975, 4) == pytest.approx(2.776, abs=1e-3)


def test_the_interval_of_five_seeds_is_the_mean_and_2_776_standard_errors():
    found = t_interval(OURS)
    assert found is not None and found.half is not None
    assert found.mean == pytest.approx(np.mean(OURS))
    assert found.half == pytest.approx(2.7764 * np.std(OURS, ddof=1) / np.sqrt(5), rel=1e-4)


def test_trap_26_a_single_seed_has_no_spread_in_place_of_a_spread_of_0():
    found = t_interval([0.8])
    assert found is not None and (found.mean, found.half, found.n) == (0.8, None, 1)
    assert t_interval([]) is None
    alone = paired([0.8], [0.7])
    assert alone is not None and (alone.t, alone.flips, alone.difference.half) == (None, None, None)


def test_the_paired_test_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    found, known = paired(OURS, THEIRS), stats.ttest_rel(OURS, THEIRS)
    assert found is not None and found.difference.half is not None
    assert found.t == pytest.approx(known.pvalue, rel=1e-10)
    low, high = known.confidence_interval()
    assert found.difference.mean - found.difference.half == pytest.approx(low, rel=1e-9)
    assert found.difference.mean + found.difference.half == pytest.approx(high, rel=1e-9)


def test_sign_flips_are_all_counted():
    differences = [a - b for a, b in zip(OURS, THEIRS, strict=True)]
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in product((1, -1), repeat=5)]
    by_hand = np.mean([abs(one) >= abs(sum(differences)) - 1e-12 for one in sums])
    assert sign_flips(differences) == by_hand
    assert sign_flips([0.1] * 5) == 2 / 2**5
    assert sign_flips([0.0] * 3) == 1.0
    assert sign_flips([0.1] * 21) is None


def test_equal_runs_differ_by_nothing_with_certainty_of_nothing():
    same = paired(OURS, OURS)
    assert same is not None and (same.difference.mean, same.t, same.flips) == (0.0, 1.0, 1.0)


def test_rows_of_one_patient_are_drawn_together_and_widen_the_interval():
    chance = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 25)
    values = (chance.random(40) < 0.5)[groups].astype(float)  # rows of a group are all alike
    alone = grouped_bootstrap(lambda rows: float(values[rows].mean()), np.arange(1000), 300, seed=1)
    together = grouped_bootstrap(lambda rows: float(values[rows].mean()), groups, 300, seed=1)
    assert alone is not None and together is not None
    assert together[1] - together[0] > 3 * (alone[1] - alone[0])
    expected = 2 * 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 40)
    assert together[1] - together[0] == pytest.approx(expected, rel=0.25)


def test_a_bootstrap_of_one_group_and_one_of_nothing_measurable_are_none():
    assert grouped_bootstrap(lambda rows: 1.0, np.zeros(9, np.int64), 10, seed=0) is None
    assert grouped_bootstrap(lambda rows: None, np.arange(9), 10, seed=0) is None
