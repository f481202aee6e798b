"""How sure a mean over seeds or over documents is: t-intervals, paired tests, a bootstrap over groups. No scipy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MOST_FLIPS = 20  # pairs up to which all sign flips are tried: a million sums


@dataclass(frozen=True)
class Interval:
    """A mean of n values. half: half the width of its interval; None of a single value, which has no spread."""

    mean: float
    half: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """The mean of n differences of pairs. t: two-sided p of the paired t-test, flips: of the exact sign-flip
    permutation test; None for a single pair, and flips for more pairs than can be tried."""

    difference: Interval
    t: float | None
    flips: float | None


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Student's interval of a mean of independent values, such as one run's of each seed. None without values."""
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None, n)
    return Interval(mean, t_quantile(0.5 + level / 2, n - 1) * _standard_error(values, mean), n)


def paired(ours: Sequence[float], theirs: Sequence[float], level: float = 0.95) -> Paired | None:
    """Ours less theirs, pair by pair. None without pairs."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    interval = t_interval(differences, level)
    if interval is None or interval.half is None:
        return None if interval is None else Paired(interval, None, None)
    error = _standard_error(differences, interval.mean)
    if error > 0:
        p = 2 * t_tail(abs(interval.mean) / error, interval.n - 1)
    else:
        p = 1.0 if interval.mean == 0 else 0.0
    return Paired(interval, p, sign_flips(differences))


def sign_flips(differences: Sequence[float]) -> float | None:
    """Share of all sign patterns whose sum is at least as far from 0: exact, two-sided; its least is 2 / 2^n. Fisher
    1935. None for more than 20 differences."""
    n = len(differences)
    if n > MOST_FLIPS:
        return None
    sums = np.zeros(1)
    for difference in np.abs(np.asarray(differences, np.float64)):
        sums = np.concatenate([sums + difference, sums - difference])
    seen = abs(math.fsum(differences))
    slack = 1e-12 * (1 + float(np.abs(differences).sum()))  # sums in another order
    return float((np.abs(sums) >= seen - slack).mean())


def grouped_bootstrap(
    statistic: Callable[[NDArray[np.int64]], float | None], groups: NDArray[np.int64], draws: int, seed: int,
    level: float = 0.95,
) -> tuple[float, float] | None:  # fmt: skip
    """Percentile interval of a statistic of row numbers when whole groups (patients) are drawn with replacement: their
    rows are no independent ones. groups: (N,). A draw of which the statistic cannot be told is left out; None where
    more than half are."""
    _, place = np.unique(groups, return_inverse=True)
    order = np.argsort(place.ravel(), kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(place.ravel()))[:-1])
    chance = np.random.default_rng(seed)
    drawn = (np.concatenate([rows[i] for i in chance.integers(len(rows), size=len(rows))]) for _ in range(draws))
    found = [value for value in map(statistic, drawn) if value is not None]
    if len(rows) < 2 or 2 * len(found) <= draws:
        return None
    low, high = np.quantile(found, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def _standard_error(values: Sequence[float], mean: float) -> float:
    n = len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


# ---- Student's t --------------------------------------------------------------------------------------------------


def t_tail(t: float, freedom: float) -> float:
    """P(T > t) for t >= 0, by the incomplete beta function: half of I(x; f/2, 1/2), x = f / (f + t^2)."""
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t)) / 2


def t_quantile(p: float, freedom: float) -> float:
    """The t with P(T <= t) = p, for p from 0.5 on, by bisection."""
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > 1 - p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > 1 - p else (low, middle)
    return (low + high) / 2


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I(x; a, b), by its continued fraction. DLMF 8.17.22."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    least = 1e-300
    c, d = 1.0, 1 / max(1 - (a + b) * x / (a + 1), least)
    fraction = d
    for m in range(1, 500):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away(1 + term * d, least)
            c = _away(1 + term / c, least)
            fraction *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return front * fraction


def _away(value: float, least: float) -> float:
    """Not 0, by which the fraction divides."""
    return value if abs(value) > least else least
