"""Curves small enough to be drawn: smoothed over all their points first, then thinned so that no extreme is lost."""

from collections.abc import Callable
from typing import Any

import numpy
from numpy.typing import NDArray

Floats = NDArray[numpy.float64]
Indices = NDArray[numpy.intp]
BLOCK = 128  # values that are smoothed by one product of matrices


def smoothed(values: Floats, beta: float) -> Floats:
    """The debiased moving mean s_t = β s_{t-1} + (1 - β) x_t, over 1 - β^t (Kingma & Ba 2015, arXiv:1412.6980, alg. 1).

    A gap (NaN) changes nothing and has the mean before it; gaps before the first value stay gaps.
    """
    there = numpy.isfinite(values)
    given = values[there]
    if not 0 < beta < 1 or not len(given):
        return numpy.where(there, values, numpy.nan)
    means = _moving(given, beta) / -numpy.expm1(numpy.arange(1, len(given) + 1) * numpy.log(beta))
    counted = numpy.cumsum(there)
    return numpy.where(counted > 0, means[numpy.maximum(counted - 1, 0)], numpy.nan)


def _moving(values: Floats, beta: float) -> Floats:
    """s_t without the debiasing, block by block: within one, a triangle of powers of β."""
    filled = numpy.zeros(-(-len(values) // BLOCK) * BLOCK)
    filled[: len(values)] = values
    powers = beta ** numpy.arange(BLOCK)
    ages = numpy.subtract.outer(numpy.arange(BLOCK), numpy.arange(BLOCK))  # of column j's value at row i
    weights = numpy.where(ages >= 0, (1 - beta) * powers[numpy.maximum(ages, 0)], 0.0)
    blocks = filled.reshape(-1, BLOCK) @ weights.T
    carried = 0.0
    for block in blocks:
        block += carried * beta * powers
        carried = block[-1]
    return blocks.reshape(-1)[: len(values)]


def kept(values: Floats, points: int) -> Indices:
    """Which values to draw: of equally many neighbours the least and the largest, in their order, and both ends.

    Not more than `points` (at least four). Of neighbours that are all gaps one stays, so that the gap is seen.
    """
    count = len(values)
    if count <= max(points, 4):
        return numpy.arange(count)
    size = -(-count // max(1, (max(points, 4) - 2) // 2))
    there = numpy.isfinite(values)
    starts = numpy.arange(0, count, size)
    low = _extreme(numpy.where(there, values, numpy.inf), size, numpy.argmin)
    high = _extreme(numpy.where(there, values, -numpy.inf), size, numpy.argmax)
    return numpy.unique(numpy.concatenate([[0], starts + low, starts + high, [count - 1]]).astype(numpy.intp))


def _extreme(values: Floats, size: int, which: Callable[..., Any]) -> Indices:
    """Place of the extreme within each run of `size` values."""
    whole = len(values) // size * size
    places = which(values[:whole].reshape(-1, size), axis=1)
    return numpy.append(places, which(values[whole:])) if whole < len(values) else places
