"""Scores of predictions: equal to scikit-learn's, and honest where nothing can be measured."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from weft.math import scores
from weft.math.scores import FORMULAS, LESS_IS_BETTER, scores_of

EXACT = 1e-12


def classes(n: int, c: int, seed: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, c) and classes (n,), all of which occur; ties: many rows are equal."""
    chance = np.random.default_rng(seed)
    logits = chance.integers(-2, 3, (n, c)) if ties else chance.normal(size=(n, c)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return p, np.concatenate([np.arange(c), chance.integers(c, size=n - c)])


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 80), st.integers(0, 10_000), st.booleans())
def test_of_two_classes_each_score_is_scikit_learns(n: int, seed: int, ties: bool):
    p, y = classes(n, 2, seed, ties)
    found, positive = scores_of(p, y, threshold=0.4), p[:, 1]
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(y, p.argmax(1)), abs=EXACT)
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(y, p.argmax(1), average="macro"), abs=EXACT)
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(y, positive), abs=EXACT)
    assert found["auprc"] == pytest.approx(metrics.average_precision_score(y, positive), abs=EXACT)
    assert found["f1"] == pytest.approx(metrics.f1_score(y, positive >= 0.4), abs=EXACT)
    assert found["brier"] == pytest.approx(metrics.brier_score_loss(y, positive), abs=EXACT)


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 5), st.integers(0, 10_000), st.booleans())
def test_of_several_classes_each_score_is_scikit_learns(c: int, seed: int, ties: bool):
    p, y = classes(60, c, seed, ties)
    found, truth = scores_of(p, y), np.eye(c)[y]
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(y, p.argmax(1)), abs=EXACT)
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(y, p.argmax(1), average="macro"), abs=EXACT)
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(truth, p, average="macro"), abs=EXACT)
    assert found["auprc"] == pytest.approx(metrics.average_precision_score(truth, p, average="macro"), abs=EXACT)
    assert found["brier"] == pytest.approx(np.square(p - truth).sum(1).mean(), abs=EXACT)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_of_several_labels_each_score_is_scikit_learns(seed: int, ties: bool):
    chance = np.random.default_rng(seed)
    p = chance.integers(0, 5, (50, 4)) / 4 if ties else chance.random((50, 4))
    truth = (chance.random((50, 4)) < 0.3).astype(float)
    truth[0], truth[1] = 0, 1
    found, said = scores_of(p, truth), p >= 0.5
    assert found["micro_f1"] == pytest.approx(metrics.f1_score(truth, said, average="micro"), abs=EXACT)
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(truth, said, average="macro"), abs=EXACT)
    assert found["macro_auroc"] == pytest.approx(metrics.roc_auc_score(truth, p, average="macro"), abs=EXACT)
    assert found["macro_auprc"] == pytest.approx(metrics.average_precision_score(truth, p, average="macro"), abs=EXACT)
    assert "accuracy" not in found


def test_a_label_that_all_or_no_documents_have_is_skipped_and_counted():
    p, truth = np.random.default_rng(0).random((6, 3)), np.zeros((6, 3))
    truth[:, 1], truth[:3, 2] = 1, 1
    found = scores.macro_auroc(p, truth)
    assert (found.counted, found.skipped) == (1, 2)
    assert found.value == pytest.approx(metrics.roc_auc_score(truth[:, 2], p[:, 2]), abs=EXACT)


def test_unknown_labels_are_not_taken_for_negative_ones():
    p, truth = np.asarray([[0.9], [0.8], [0.1]]), np.asarray([[1.0], [np.nan], [0.0]])
    found = scores_of(p, truth)
    assert found["micro_f1"] == found["macro_f1"] == found["macro_auroc"] == 1.0
    assert scores_of(p, np.nan_to_num(truth))["micro_f1"] < 1


def test_trap_25_a_year_with_one_class_has_no_auroc_in_place_of_a_half():
    p, y = np.asarray([[0.2, 0.8], [0.6, 0.4]]), np.asarray([1, 1])
    found = scores_of(p, y, threshold=0.5)
    assert (found["auroc"], found["auprc"]) == (None, None)
    assert found["accuracy"] == 0.5
    assert scores_of(p, np.asarray([0, 0]), threshold=0.5)["f1"] is None


def test_without_documents_nothing_is_measured():
    assert set(scores_of(np.zeros((0, 2)), np.zeros(0, np.int64)).values()) == {None}
    assert set(scores_of(np.zeros((0, 3)), np.zeros((0, 3))).values()) == {None}


def test_accuracy_is_never_alone_on_documents_of_which_few_are_positive():
    y = (np.arange(100) < 5).astype(np.int64)
    always_negative = np.tile([1.0, 0.0], (100, 1))
    found = scores_of(always_negative, y)
    assert found["accuracy"] == 0.95
    assert found["auroc"] == 0.5
    assert found["auprc"] == scores.prevalence(y == 1) == 0.05


def test_trap_23_the_threshold_of_f1_is_the_best_of_other_documents():
    p, positive = np.asarray([0.1, 0.2, 0.3, 0.4]), np.asarray([False, True, False, True])
    best = scores.best_threshold(p, positive)
    assert best == 0.2
    every = {t: scores.f1_at(p, positive, t) for t in (0.1, 0.2, 0.3, 0.4, 0.5)}
    assert max(every, key=every.__getitem__) == best
    assert scores.best_threshold(p, np.zeros(4, bool)) is None


def test_precision_at_k_counts_true_labels_among_the_k_most_probable():
    p, truth = np.asarray([[0.9, 0.8, 0.1], [0.2, 0.3, 0.4]]), np.asarray([[1, 0, 1], [0, 1, 1]])
    assert scores.precision_at(2, p, truth.astype(float)) == (1 / 2 + 2 / 2) / 2
    assert scores.precision_at(5, p, truth.astype(float)) is None


def test_each_score_has_a_formula_in_words():
    p, y = classes(20, 2, 0)
    told = {*scores_of(p, y, threshold=0.5), *scores_of(p, np.eye(2)[y])}
    assert told == set(FORMULAS) and told >= LESS_IS_BETTER
