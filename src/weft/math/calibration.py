"""Whether predicted probabilities mean what they say: Brier score, calibration error, reliability, intercept and slope.

Letters and labels as in scores.py.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BINS = 15
NEAREST = 1e-15  # to 0 and 1 that a probability is taken for where its logarithm is needed
TURNS = 100  # of Newton's method
STEEPEST = 1e3  # a slope beyond it means that classes are parted without error


@dataclass(frozen=True)
class Bin:
    """Predictions of neighbouring probabilities: how many, what they said on average, and how often it was so."""

    count: int
    predicted: float
    observed: float


def of_classes(probabilities: Array, labels: NDArray[np.int64]) -> tuple[Array, Array]:
    """What was said (N,) and whether it was so (N,): of two classes of the second, of more of the most probable."""
    if probabilities.shape[1] == 2:
        return probabilities[:, 1], (labels == 1).astype(np.float64)
    winner = probabilities.argmax(1)
    return probabilities.max(1), (winner == labels).astype(np.float64)


def of_labels(probabilities: Array, truth: Array) -> tuple[Array, Array]:
    """The same of every known cell of (N, C)."""
    known = ~np.isnan(truth)
    return probabilities[known], truth[known]


def reliability(predicted: Array, observed: Array, bins: int = BINS) -> list[Bin]:
    """Bins of equally many predictions, by their probability. Predictions of one probability share their outcomes, so
    that nothing depends on the order of the rows."""
    if not len(predicted):
        return []
    order = np.argsort(predicted, kind="stable")
    said, came = predicted[order], observed[order].astype(np.float64)
    _, place, counts = np.unique(said, return_inverse=True, return_counts=True)
    came = (np.bincount(place.ravel(), weights=came) / counts)[place.ravel()]
    parts = zip(np.array_split(said, bins), np.array_split(came, bins), strict=True)
    return [Bin(len(p), float(p.mean()), float(o.mean())) for p, o in parts if len(p)]


def expected_error(predicted: Array, observed: Array, bins: int = BINS) -> float | None:
    """Expected calibration error over bins of equal mass. Naeini et al. 2015; Nixon et al. 2019, arXiv:1904.01685."""
    found = reliability(predicted, observed, bins)
    if not found:
        return None
    return sum(one.count * abs(one.predicted - one.observed) for one in found) / len(predicted)


def brier(probabilities: Array, labels: NDArray[np.int64]) -> float | None:
    """Mean over rows of the squared error of the second of two classes, or summed over more. Brier 1950."""
    if not len(labels):
        return None
    truth = labels[:, None] == np.arange(probabilities.shape[1])
    squares = (probabilities - truth) ** 2
    return float((squares[:, 1] if probabilities.shape[1] == 2 else squares.sum(1)).mean())


def log_odds(probability: Array) -> Array:
    """ln(p / (1 - p)), of probabilities next to 0 and 1 that of the nearest float."""
    p = np.clip(probability, NEAREST, 1 - NEAREST)
    return np.log(p) - np.log1p(-p)


def calibration_in_the_large(probability: Array, positive: NDArray[np.bool_]) -> float | None:
    """The intercept a of P(positive) = sigmoid(a + log odds): 0 when as many are positive as was said, above 0 when
    more are. Van Calster et al. 2019, doi:10.1186/s12916-019-1466-7. None with one class only."""
    if positive.all() or not positive.any():
        return None
    x, y = log_odds(probability), positive.astype(np.float64)
    low, high = -100.0, 100.0  # the sum of errors falls with the intercept
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (y - _sigmoid(x + middle)).sum() > 0 else (low, middle)
    return (low + high) / 2


def calibration_slope(probability: Array, positive: NDArray[np.bool_]) -> float | None:
    """The slope b of P(positive) = sigmoid(a + b log odds): 1 when right, below 1 when too sure, above when too shy.
    None with one class, one probability, or classes that are parted without error."""
    x, y = log_odds(probability), positive.astype(np.float64)
    if positive.all() or not positive.any() or np.ptp(x) == 0:
        return None
    centre, width = x.mean(), x.std()
    z = np.stack([np.ones_like(x), (x - centre) / width])  # (2, N)
    at = np.zeros(2)
    for _ in range(TURNS):
        p = _sigmoid(at @ z)
        gradient = z @ (y - p)
        step = np.linalg.solve((z * (p * (1 - p))) @ z.T + 1e-12 * np.eye(2), gradient)
        while _likelihood(at + step, z, y) < _likelihood(at, z, y) and np.abs(step).max() > 1e-12:
            step = step / 2
        at = at + step
        if not np.isfinite(at).all() or abs(at[1]) > STEEPEST:
            return None
        if np.abs(step).max() < 1e-10:
            parted = ((at @ z > 0) == positive).all()
            return None if parted else float(at[1] / width)
    return None


def _likelihood(at: Array, z: Array, y: Array) -> float:
    logits = at @ z
    return float((y * logits - np.logaddexp(0.0, logits)).sum())


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))
