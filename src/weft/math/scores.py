"""How well predicted probabilities sort documents: accuracy, F1, AUROC, AUPRC, precision at k, over classes and labels.

Letters: N rows, C classes or labels. Probabilities are (N, C), of two classes the second is the positive one. The label
of a row is the number of its class (N,), or, where a row may have several, 0, 1 or nan (unknown) for each (N, C).
All sums are in float64. What cannot be said of the rows (AUROC of a single class) is None, never 0 or 0.5.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft.math.calibration import brier, expected_error, of_classes, of_labels

Array = NDArray[np.float64]
Truth = NDArray[np.int64] | NDArray[np.float64] | NDArray[np.float32]
Scores = dict[str, float | None]


@dataclass(frozen=True)
class Macro:
    """A mean over classes or labels, and how many entered it; the others had nothing to measure. None: all."""

    value: float | None
    counted: int
    skipped: int


# ---- Of everything at once ----------------------------------------------------------------------------------------


def scores_of(probabilities: Array, labels: Truth, threshold: float | None = None) -> Scores:
    """All scores of one test set by their names, the main one first. threshold: of F1 of two classes, found on other,
    earlier rows; None: F1 is not told."""
    p = np.asarray(probabilities, np.float64)
    if labels.ndim == 2:
        return _of_labels(p, np.asarray(labels, np.float64))
    return _of_classes(p, np.asarray(labels, np.int64), threshold)


def main_score(probabilities: Array, labels: Truth) -> float | None:
    """The first of these scores alone."""
    if labels.ndim == 2:
        return micro_f1_of_labels(probabilities, np.asarray(labels, np.float64))
    return accuracy(probabilities, np.asarray(labels, np.int64))


def _of_classes(p: Array, y: NDArray[np.int64], threshold: float | None) -> Scores:
    found: Scores = {"accuracy": accuracy(p, y), "macro_f1": macro_f1(p.argmax(1), y)}
    if p.shape[1] == 2:
        found |= {"auroc": auroc(p[:, 1], y == 1), "auprc": auprc(p[:, 1], y == 1)}
        if threshold is not None:
            found["f1"] = f1_at(p[:, 1], y == 1, threshold)
    else:
        truth = one_hot(y, p.shape[1])
        found |= {"auroc": macro_auroc(p, truth).value, "auprc": macro_auprc(p, truth).value}
    return {**found, "ece": expected_error(*of_classes(p, y)), "brier": brier(p, y)}


def _of_labels(p: Array, truth: Array) -> Scores:
    return {
        "micro_f1": micro_f1_of_labels(p, truth), "macro_f1": macro_f1_of_labels(p, truth).value,
        "macro_auroc": macro_auroc(p, truth).value, "macro_auprc": macro_auprc(p, truth).value,
        "ece": expected_error(*of_labels(p, truth)),
    }  # fmt: skip


FORMULAS: Mapping[str, str] = {
    "accuracy": "share of documents whose most probable class is theirs",
    "macro_f1": "mean of F1 = 2TP / (2TP + FP + FN) over the classes that are there or were predicted; of several "
    "labels each is predicted from 0.5 on",
    "micro_f1": "2TP / (2TP + FP + FN) over all labels of all documents together, predicted from 0.5 on",
    "f1": "F1 of the second class, predicted from the threshold on that was best on the validation documents of the "
    "years learned so far",
    "auroc": "chance that a document of the class has a larger probability of it than another document, ties half; "
    "of more than two classes the mean over those that are there and not everywhere",
    "auprc": "average precision, the sum over thresholds of (recall gained) x precision; chance alone gives the "
    "class's share. Of more than two classes the mean",
    "macro_auroc": "mean of the labels' AUROC over labels that some documents have and some have not",
    "macro_auprc": "mean of the labels' average precision over labels that some documents have and some have not",
    "ece": "expected calibration error: 15 bins of equally many predictions, the mean of |predicted - observed| "
    "weighted by their number. Of two classes the second's probability, of more the winner's, of labels each one's",
    "brier": "mean squared error of the probabilities; of two classes of the second's, of more summed over classes",
}
LESS_IS_BETTER = frozenset({"ece", "brier"})


# ---- Classes: one for each row ------------------------------------------------------------------------------------


def accuracy(probabilities: Array, labels: NDArray[np.int64]) -> float | None:
    """Share of rows whose most probable class is theirs; None without rows."""
    return float((probabilities.argmax(1) == labels).mean()) if len(labels) else None


def macro_f1(predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> float | None:
    """Mean F1 over the classes that are there or were predicted."""
    present = np.union1d(predicted, labels)
    each = [f1(predicted == number, labels == number) for number in present]
    return _mean([value for value in each if value is not None])


def one_hot(labels: NDArray[np.int64], classes: int) -> Array:
    """(N, C) of 0 and 1."""
    return (labels[:, None] == np.arange(classes)).astype(np.float64)


# ---- One class against the rest -----------------------------------------------------------------------------------


def f1(predicted: NDArray[np.bool_], positive: NDArray[np.bool_]) -> float | None:
    """2TP / (2TP + FP + FN); None where nothing is positive and nothing was predicted so."""
    whole = int(predicted.sum()) + int(positive.sum())
    return 2 * int((predicted & positive).sum()) / whole if whole else None


def f1_at(probability: Array, positive: NDArray[np.bool_], threshold: float) -> float | None:
    """F1 when a row is called positive from the threshold on. None where no row is positive."""
    return f1(probability >= threshold, positive) if positive.any() else None


def best_threshold(probability: Array, positive: NDArray[np.bool_]) -> float | None:
    """From which probability on F1 is best; of equals the largest. To be found on rows that are not tested on, and no
    younger. None where no row is positive."""
    if not positive.any():
        return None
    thresholds, true, false = _counts(probability, positive)
    value = 2 * true / (true + false + positive.sum())
    return float(thresholds[value.argmax()])


def auroc(probability: Array, positive: NDArray[np.bool_]) -> float | None:
    """The Mann-Whitney statistic with midranks for ties, over its largest value. None with one class only."""
    ones = int(positive.sum())
    zeros = len(positive) - ones
    if not ones or not zeros:
        return None
    _, place, counts = np.unique(probability, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place.ravel()]
    return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def auprc(probability: Array, positive: NDArray[np.bool_]) -> float | None:
    """Average precision: no interpolation, rows of one probability come at once. None with one class only."""
    ones = int(positive.sum())
    if not ones or ones == len(positive):
        return None
    _, true, false = _counts(probability, positive)
    gained = np.diff(true, prepend=0) / ones
    return float((gained * true / (true + false)).sum())


def prevalence(positive: NDArray[np.bool_]) -> float | None:
    """Share of positive rows: what AUPRC is by chance."""
    return float(positive.mean()) if len(positive) else None


def _counts(probability: Array, positive: NDArray[np.bool_]) -> tuple[Array, Array, Array]:
    """Distinct thresholds from the largest on, and how many rows from each on are positive and are not."""
    order = np.argsort(-probability, kind="stable")
    ordered = probability[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # of each group of equals
    true = np.cumsum(positive[order], dtype=np.float64)[last]
    return ordered[last], true, last + 1.0 - true


# ---- Labels: any number for each row ------------------------------------------------------------------------------


def macro_auroc(probabilities: Array, truth: Array) -> Macro:
    """Mean AUROC over the columns of truth (N, C) that have both classes."""
    return _macro([auroc(p, y) for p, y in _columns(probabilities, truth)])


def macro_auprc(probabilities: Array, truth: Array) -> Macro:
    """Mean average precision over the columns that have both classes."""
    return _macro([auprc(p, y) for p, y in _columns(probabilities, truth)])


def macro_f1_of_labels(probabilities: Array, truth: Array, threshold: float = 0.5) -> Macro:
    """Mean F1 over the labels that some row has, or was said to have."""
    return _macro([f1(p >= threshold, y) for p, y in _columns(probabilities, truth)])


def micro_f1_of_labels(probabilities: Array, truth: Array, threshold: float = 0.5) -> float | None:
    """F1 over all known cells together."""
    known = ~np.isnan(truth)
    return f1(probabilities[known] >= threshold, truth[known] > 0.5)


def precision_at(k: int, probabilities: Array, truth: Array) -> float | None:
    """Mean over rows of the share of true labels among their k most probable ones; unknown labels are not asked.
    None with fewer than k labels."""
    if probabilities.shape[1] < k or not len(truth):
        return None
    known = ~np.isnan(truth)
    order = np.argsort(-np.where(known, probabilities, -np.inf), axis=1, kind="stable")[:, :k]
    return float((np.take_along_axis(np.where(known, truth, 0.0), order, 1) > 0.5).mean())


def _columns(probabilities: Array, truth: Array) -> list[tuple[Array, NDArray[np.bool_]]]:
    """Of each label the rows whose truth is known."""
    known = ~np.isnan(truth)
    return [(probabilities[known[:, c], c], truth[known[:, c], c] > 0.5) for c in range(truth.shape[1])]


def _macro(values: list[float | None]) -> Macro:
    counted = [value for value in values if value is not None]
    return Macro(_mean(counted), len(counted), len(values) - len(counted))


def _mean(values: list[float]) -> float | None:
    return float(np.mean(np.asarray(values, np.float64))) if values else None
