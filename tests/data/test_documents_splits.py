"""Which documents are trained, validated and tested on: no group and no text is in two splits, and what is counted."""

from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.documents import COLUMNS, WORDS, opened, rows_of, section, surveyed, write_csv
from weft.data.documents_splits import Shares
from weft.data.documents_survey import SPLITS, TEST, TRAIN, DocumentsSurvey
from weft.errors import DataError


def split_by_row(survey: DocumentsSurvey) -> dict[int, int]:
    return dict(zip(survey.documents.row.tolist(), survey.documents.split.tolist(), strict=True))


def test_a_patient_is_in_one_split_across_all_years(tmp_path):
    rows = rows_of(400)
    survey = surveyed(section(write_csv(tmp_path / "n.csv", rows)))
    found = defaultdict(set)
    for row, split in split_by_row(survey).items():
        found[rows[row - 1]["patient"]].add(split)
    assert {len(splits) for splits in found.values()} == {1}
    years = {rows[row - 1]["patient"]: set() for row in split_by_row(survey)}
    for row in split_by_row(survey):
        years[rows[row - 1]["patient"]].add(rows[row - 1]["year"])
    assert max(map(len, years.values())) > 2  # so that the years had something to leak
    assert not any("data.group" in notice for notice in survey.notices)


def test_no_tested_row_is_trained_on_or_replayed(tmp_path):
    data = section(write_csv(tmp_path / "n.csv", rows_of(200)), replay={"size": 50, "batch": 4})
    dataset = opened(data)
    held = {key for sets in (dataset.tests, dataset.validations) for b in sets.values() for x in b for key in x.keys}
    trained = {key for order in dataset.stream for key in keys_of(dataset, order.order.documents)}
    entering = {key for order in dataset.stream for key in keys_of(dataset, order.replay.entering)}
    assert entering == trained and not held & trained
    assert len(held | trained) == len(dataset.survey.documents) == 200


def keys_of(dataset, numbers) -> list[str]:
    own = dataset.survey.documents
    return [f"{dataset.survey.names[own.task[i]]}:{own.row[i]}" for i in numbers]


def test_added_rows_move_no_other_and_the_runs_seed_none(tmp_path):
    rows = rows_of(200)
    before = split_by_row(surveyed(section(write_csv(tmp_path / "a.csv", rows))))
    after = split_by_row(surveyed(section(write_csv(tmp_path / "b.csv", [*rows, *rows_of(100, seed=5)]))))
    assert {row: after[row] for row in before} == before
    other = split_by_row(surveyed(section(tmp_path / "a.csv", split_seed=1)))
    assert other != before


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 0.4), st.floats(0, 0.4), st.integers(0, 9))
def test_the_shares_are_those_asked_for(validation, test, seed):
    counts = Counter(Shares(validation, test, seed).of(b"%d" % i) for i in range(2000))
    for split, share in enumerate((1 - validation - test, validation, test)):
        assert abs(counts[split] / 2000 - share) < 4 * (0.25 / 2000) ** 0.5


def test_without_a_group_each_document_goes_by_itself_and_that_is_said(tmp_path):
    survey = surveyed(section(write_csv(tmp_path / "n.csv", rows_of(100)), group=None))
    assert any("one patient's may be trained and tested on" in notice for notice in survey.notices)
    assert len(set(survey.documents.group.tolist())) == 100


def test_rows_without_a_group_are_groups_of_their_own(tmp_path):
    rows = [{**row, "patient": "" if i % 2 else row["patient"]} for i, row in enumerate(rows_of(100))]
    survey = surveyed(section(write_csv(tmp_path / "n.csv", rows)))
    assert "50 documents have no group; each was split by itself." in survey.notices
    alone = {g for i, g in enumerate(survey.documents.group.tolist()) if i % 2}
    assert len(alone) == 50


def test_a_text_that_stands_in_several_splits_stays_where_it_stands_first_in_time(tmp_path):
    rows = rows_of(120, years=("2020",)) + rows_of(120, seed=1, years=("2019",))
    for row in rows[::6]:
        row["note"] = WORDS[7]
    survey = surveyed(section(write_csv(tmp_path / "n.csv", rows)))
    own = survey.documents
    first = next(i for i in own.row.tolist() if rows[i - 1]["year"] == "2019" and rows[i - 1]["note"] == WORDS[7])
    splits = {split for row, split in split_by_row(survey).items() if rows[row - 1]["note"] == WORDS[7]}
    assert splits == {split_by_row(survey)[first]}
    gone = 240 - len(own)
    assert gone and survey.left_out["whose text stands in another split"] == gone
    assert any(f"{gone} documents have a text that stands in another split" in notice for notice in survey.notices)
    kept = surveyed(section(tmp_path / "n.csv", duplicates="keep"))
    assert len(kept.documents) == 240 and any("in several splits" in notice for notice in kept.notices)


def test_without_groups_equal_texts_are_one(tmp_path):
    rows = [{**row, "note": f"{WORDS[i % 40]} {WORDS[i % 7]}"} for i, row in enumerate(rows_of(400))]
    survey = surveyed(section(write_csv(tmp_path / "n.csv", rows), group=None))
    assert len(survey.documents) == 400 and survey.left_out["whose text stands in another split"] == 0


def test_a_split_column_is_taken_and_must_not_tear_a_patient_apart(tmp_path):
    words = {0: "Train", 1: "valid", 2: "TEST"}
    rows = [{**row, "part": words[int(row["patient"][1:]) % 3]} for row in rows_of(150)]
    survey = surveyed(section(write_csv(tmp_path / "n.csv", rows, (*COLUMNS, "part")), split="part"))
    assert [words[s] for s in survey.documents.split] == [row["part"] for row in rows]
    rows[3]["part"] = "test" if rows[3]["part"] == "Train" else "train"
    with pytest.raises(DataError, match=r"1 groups of data\.group are in more than one split"):
        surveyed(section(write_csv(tmp_path / "n.csv", rows, (*COLUMNS, "part")), split="part"))
    rows[3]["part"] = "perhaps"
    with pytest.raises(DataError, match=r"neither train, validation nor test: n\.csv, row 4"):
        data = section(write_csv(tmp_path / "n.csv", rows, (*COLUMNS, "part")), split="part")
        surveyed(data).refuse_when_unusable(0)


def test_what_is_thin_is_said_and_what_is_empty_is_refused(tmp_path):
    rows = rows_of(300, years=("2019", "2020")) + [
        {"note": f"{WORDS[i]} {WORDS[i + 1]}", "outcome": "no", "year": "2021", "patient": f"q{i}"} for i in range(12)
    ]
    survey = surveyed(section(write_csv(tmp_path / "n.csv", rows)))
    assert any(notice.startswith("train: fewer than 20 documents of 2021") for notice in survey.notices)
    assert "train: all documents of 2021 have the same label." in survey.notices
    survey.refuse_when_unusable(0)
    with pytest.raises(DataError, match="No document is left to test on"):
        surveyed(section(tmp_path / "n.csv", test=0)).refuse_when_unusable(0)
    with pytest.raises(DataError, match="have the same label, so there is nothing to learn"):
        surveyed(section(tmp_path / "n.csv", tasks=[2021], labels=())).refuse_when_unusable(0)
    few = surveyed(section(tmp_path / "n.csv", labels=("no", "yes", "perhaps")))
    assert "1 of 3 labels are in no document that is trained on." in few.notices


def test_a_plan_is_told_counts_by_task_split_and_label(tmp_path):
    rows = rows_of(200)
    survey = surveyed(section(write_csv(tmp_path / "n.csv", rows), id="note"))
    for task in survey.names:
        for split, name in enumerate(SPLITS):
            own = [rows[r - 1] for r, s in split_by_row(survey).items() if s == split and rows[r - 1]["year"] == task]
            assert survey.counts[task][name] == {
                "all": len(own), **{label: sum(row["outcome"] == label for row in own) for label in ("no", "yes")}
            }  # fmt: skip
    told = "\n".join(survey.lines())
    assert "200 documents of" in told and "2 classes: no, yes" in told and "2019: train" in told
    assert survey.rows == sum(survey.counts[task][SPLITS[TRAIN]]["all"] for task in survey.names)
    assert survey.tasks == tuple(task for task in survey.names if survey.counts[task][SPLITS[TEST]]["all"])


def test_ids_that_two_documents_have_are_counted(tmp_path):
    rows = [{**row, "key": i // 2} for i, row in enumerate(rows_of(40))]
    survey = surveyed(section(write_csv(tmp_path / "n.csv", rows, (*COLUMNS, "key")), id="key"))
    assert "20 documents have an id that another has too." in survey.notices
