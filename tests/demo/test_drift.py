"""What the synthetic documents promise: exact accuracies, dials that do what they say, and nothing when all are off."""

import csv
import json
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from weft.demo.drift import BANNER, Dials, Drift, class_names, invented_words, notes, notes_before, vocabulary, years_of
from weft.demo.drift_files import write_drift

SMALL = Drift(per_year=200)


def only(**dials: float) -> Drift:
    return replace(SMALL, dials=replace(Dials.off(), **dials))


def test_the_best_accuracy_is_the_sum_over_all_sequences_of_signal_words():
    year = years_of(replace(SMALL, signal=3))[5]
    speaks = year.speaks_for()
    chance = {  # of each signal word, for each class
        word: [
            share / len(year.new[k] if word in year.new[k] else year.old[k])
            * (year.novel if word in year.new[k] else 1 - year.novel)
            for share in (year.strength if k == y else 1 - year.strength for y in range(2))
        ]
        for word, k in speaks.items()
    }  # fmt: skip
    best = 0.0
    for words in product(speaks, repeat=3):
        true = [year.prior[y] * np.prod([chance[word][y] for word in words]) for y in range(2)]
        told = [(1 - year.noise) * true[y] + year.noise * true[1 - y] for y in range(2)]
        best += max(told)
    assert year.bayes_accuracy() == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_who_knows_the_posterior_is_as_right_as_the_best_accuracy_says(classes):
    drift = Drift(per_year=1500, years=2, classes=classes)
    years, labels = {year.name: year for year in years_of(drift)}, class_names(drift)
    right = Counter()
    for note in notes(drift):
        posterior = years[note.year].posterior(note.text.split())
        assert sum(posterior) == pytest.approx(1)
        right[note.year] += labels[int(np.argmax(posterior))] == note.label
    for name, year in years.items():
        deviation = (year.bayes_accuracy() * (1 - year.bayes_accuracy()) / drift.per_year) ** 0.5
        assert abs(right[name] / drift.per_year - year.bayes_accuracy()) < 4 * deviation


def test_with_all_dials_off_the_years_are_exchangeable():
    first, *others = years_of(replace(SMALL, dials=Dials.off()))
    assert all(replace(year, name=first.name) == first for year in others)


@pytest.mark.parametrize("dial", ["renewal", "novel", "flip", "prevalence", "style", "background"])
def test_each_dial_moves_its_own_kind_of_drift_and_no_other(dial):
    still, moved = years_of(only()), years_of(only(**{dial: 0.5}))
    kinds = {
        "renewal": lambda y: frozenset(word for group in y.old for word in group),
        "novel": lambda y: (y.novel, y.new),
        "flip": lambda y: frozenset((word, k) for k, group in enumerate(y.old) for word in group),
        "prevalence": lambda y: y.prior,
        "style": lambda y: (y.style, y.styled),
        "background": lambda y: y.background,
    }
    changed = {name for name, kind in kinds.items() if [*map(kind, still)] != [*map(kind, moved)]}
    assert changed == {dial} | ({"flip"} if dial == "renewal" else set())  # a new word has its class from the start


def test_a_flip_changes_what_words_mean_and_not_which_words_there_are():
    years = years_of(only(flip=0.25))
    before, after = years[2].speaks_for(), years[3].speaks_for()
    assert before.keys() == after.keys()
    assert Counter(before[word] == after[word] for word in before) == {True: 18, False: 6}


def test_renewed_words_were_never_seen_before():
    drift = only(renewal=0.5)
    seen: set[str] = set()
    for year in years_of(drift):
        words = set(year.speaks_for())
        if year.name in ("2021", "2023"):
            assert len(words - seen) == len(words) // 2
        else:
            assert not seen or words <= seen
        seen |= words


def test_permuted_labels_say_nothing_about_the_words():
    drift = Drift(per_year=1500, years=1, permuted=True)
    (year,), labels = years_of(drift), class_names(drift)
    right = [labels[int(np.argmax(year.posterior(note.text.split())))] == note.label for note in notes(drift)]
    assert abs(np.mean(right) - 0.5) < 4 * (0.25 / 1500) ** 0.5


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_words(tmp_path):
    one, two = (write_drift(tmp_path / name, SMALL, before=10).checksum for name in ("one", "two"))
    assert one == two != write_drift(tmp_path / "three", replace(SMALL, seed=1), before=10).checksum
    assert vocabulary(SMALL) != vocabulary(replace(SMALL, seed=1))


def test_csv_and_jsonl_hold_the_same_documents(tmp_path):
    as_csv, as_jsonl = (write_drift(tmp_path, SMALL, ending, before=10).documents for ending in ("csv", "jsonl"))
    with as_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [json.loads(line) for line in as_jsonl.read_text().splitlines()]
    assert len(rows) == 6 * 200


def test_the_truth_stands_apart_with_a_banner_and_the_checksum(tmp_path):
    files = write_drift(tmp_path, SMALL, before=10)
    told = json.loads(files.truth.read_text())
    assert files.truth.parent.parent == files.documents.parent
    assert (told["banner"], told["sha256"]) == (BANNER, files.checksum)
    assert told["bayes_accuracy"]["2019"] == years_of(SMALL)[0].bayes_accuracy()
    assert BANNER in (tmp_path / "SYNTHETIC.txt").read_text()


def test_patients_have_several_documents_in_several_years():
    of_patient: dict[str, list[str]] = {}
    for note in notes(SMALL):
        of_patient.setdefault(note.patient, []).append(note.year)
    assert np.mean([len(years) for years in of_patient.values()]) > 3
    assert np.mean([len(set(years)) > 1 for years in of_patient.values()]) > 0.8


def test_the_documents_before_the_years_are_others_of_the_first_years_kind():
    of_2019 = {note.text for note in notes(SMALL) if note.year == "2019"}
    before = list(notes_before(SMALL, 300))
    assert len(before) == 300 and {note.year for note in before} == {"2019"}
    assert of_2019.isdisjoint(note.text for note in before)
    assert {word for note in before for word in note.text.split()} <= {*vocabulary(SMALL)}


def test_invented_words_are_different_and_end_as_no_english_word_does():
    words = invented_words(500, seed=3)
    assert len(set(words)) == 500 and all(word[-1] in "xqv" for word in words)
