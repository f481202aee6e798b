"""The learners on turned digits do what was measured of the published ones; cut down from benchmarks/digits.py."""

from statistics import mean

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("scipy")

from tests.digits import METHODS, matrix_of

SEEDS = (0,)


def percent(name: str) -> tuple[float, float]:
    """(RA, BTI), means over the seeds."""
    found = [matrix_of(METHODS[name], "rotations", seed)[0].transfer() for seed in SEEDS]
    return 100 * mean(each.average or 0 for each in found), 100 * mean(each.bti or 0 for each in found)


@pytest.mark.slow
def test_the_learners_forget_and_keep_as_the_published_ones_do():
    """Over five seeds first-order La-MAML was in [60, 68] and online training below 50; one seed spreads further. That
    La-MAML is above replay is not claimed: it is not."""
    (online, forgotten), (replay, after_replay) = percent("online"), percent("replay")
    lamaml, after_lamaml = percent("lamaml, first order")
    assert online < 57 and forgotten < -8
    assert replay > online + 10
    assert 56 < lamaml < 74
    assert after_lamaml > after_replay + 4
