"""Dated documents as they are read: columns, dates, labels and tokens, and what is refused by row."""

import csv
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from pydantic import ValidationError

from tests.data.documents import (
    COLUMNS,
    WORDS,
    Reader,
    drawn,
    opened,
    rows_of,
    section,
    surveyed,
    tokenizer,
    write_csv,
    write_jsonl,
)
from weft.data.documents import DocumentsData
from weft.errors import ConfigError, DataError


def refused(data: DocumentsData) -> str:
    with pytest.raises((DataError, ConfigError)) as refusal:
        surveyed(data).refuse_when_unusable(data.unreadable)
    return str(refusal.value)


def texts(survey) -> list[str]:
    own = survey.documents
    return [tokenizer().decode(own.document(i), skip_special_tokens=True) for i in range(len(own))]


def lines(path: Path, *rows: str) -> Path:
    path.write_text("".join(f"{row}\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_all_formats_give_the_same_documents(tmp_path, ending):
    rows = rows_of(40)
    path = tmp_path / f"notes.{ending}"
    if ending == "parquet":
        typed = [{**row, "year": int(row["year"])} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(typed), path)
    elif ending == "jsonl":
        write_jsonl(path, [{**row, "year": int(row["year"]), "more": [1]} for row in rows])
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, delimiter="\t" if ending == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    survey = surveyed(section(path))
    assert texts(survey) == [row["note"] for row in rows]
    assert [survey.names[i] for i in survey.documents.task] == [row["year"] for row in rows]
    assert [survey.labels[i] for i in survey.documents.labels] == [row["outcome"] for row in rows]
    assert survey.documents.row.tolist() == list(range(1, 41))


def test_a_folder_is_read_file_by_file_and_rows_are_counted_on(tmp_path):
    write_csv(tmp_path / "b.csv", rows_of(5, seed=1))
    write_jsonl(tmp_path / "a.jsonl", rows_of(3, seed=2))
    (tmp_path / "readme.txt").write_text("not data")
    survey = surveyed(section(tmp_path, test=0.4))
    assert survey.documents.row.tolist() == list(range(1, 9))
    assert surveyed(section((tmp_path / "a.jsonl", tmp_path / "b.csv"), test=0.4)).digest() == survey.digest()


def test_a_byte_order_mark_quotes_and_newlines_are_part_of_no_name(tmp_path):
    a, b, c = WORDS[:3]
    path = tmp_path / "notes.csv"
    path.write_bytes(
        f'note,outcome,year,patient\r\n"{a}\r\n{b}",no,2019,p1\r\n"{a} ""{b}"" {c}",yes,2019,p2\r\n'.encode("utf-8-sig")
    )
    survey = surveyed(section(path, validation=0, test=0))
    assert [len(survey.documents.document(i)) for i in range(2)] == [4, 5]
    assert texts(survey)[0] == f"{a} {b}"


def test_codes_keep_their_leading_zeros_and_na_is_a_word(tmp_path):
    path = lines(tmp_path / "n.csv", "note,outcome,year,patient", *(f"{WORDS[i]},{label},2019,0{i}" for i, label in
                 enumerate(["041.9", "NA", "41.9", "null", "041.9"])))  # fmt: skip
    survey = surveyed(section(path, labels=()))
    assert survey.labels == ("041.9", "41.9", "NA", "null")
    assert len(set(survey.documents.group.tolist())) == 5


def test_columns_of_text_are_joined_by_a_template_whatever_their_names(tmp_path):
    a, b = WORDS[:2]
    rows = [{"the {title": a, "a.b": b, "outcome": "no", "year": 2019}, {"the {title": "", "a.b": b, "outcome": "yes",
            "year": 2019}]  # fmt: skip
    path = write_jsonl(
        tmp_path / "n.jsonl", [{("the title" if k[0] == "t" else k): v for k, v in r.items()} for r in rows]
    )
    given = {"text": ("the title", "a.b"), "group": None, "validation": 0, "test": 0}
    assert texts(surveyed(section(path, **given))) == [f"{a} {b}", b]
    assert texts(surveyed(section(path, **given, template="{a.b} {the title} {a.b}"))) == [f"{b} {a} {b}", f"{b} {b}"]
    with pytest.raises(ValidationError, match=r"differ in the column 'a\.b'"):
        section(path, **given, template="{the title}")


@pytest.mark.parametrize(
    ("fields", "cell", "task"),
    [
        ({"year": "when"}, "2021", "2021"),
        ({"year": "when"}, "2021.0", "2021"),
        ({"date": "when"}, "2021-05-06", "2021"),
        ({"date": "when", "period": "quarter"}, "2021-05-06T07:08:09Z", "2021-Q2"),
        ({"date": "when", "period": "month"}, "2021-05-06 23:59:59", "2021-05"),
        ({"date": "when", "date_format": "%d.%m.%Y"}, "06.05.2021", "2021"),
        ({"date": "when", "periods": {"before": ["2019-01-01", "2020-03-14"], "after": ["2020-03-15", "2022-01-01"]}},
         "2020-03-14", "before"),
        ({"task": "when"}, "2008 - 2010", "2008 - 2010"),
        ({}, "whatever", "all"),
    ],
)  # fmt: skip
def test_the_task_of_a_document_is_its_year_its_period_or_any_column(tmp_path, fields, cell, task):
    path = lines(tmp_path / "n.csv", "note,outcome,when", f"{WORDS[0]},no,{cell}", f"{WORDS[1]},yes,{cell}")
    survey = surveyed(section(path, **{"year": None, "group": None, "validation": 0, "test": 0, **fields}))
    assert survey.names == (task,)


def test_typed_dates_of_parquet_are_dates(tmp_path):
    path = tmp_path / "n.parquet"
    table = {
        "note": list(WORDS[:2]),
        "outcome": ["no", "yes"],
        "day": [datetime(2019, 12, 31, 23), datetime(2020, 1, 1)],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    assert surveyed(section(path, year=None, date="day", group=None)).names == ("2019", "2020")
    pyarrow.parquet.write_table(pyarrow.table({**table, "day": [date(2019, 12, 31), date(2020, 1, 1)]}), path)
    assert surveyed(section(path, year=None, date="day", group=None)).names == ("2019", "2020")


def test_tasks_are_chosen_and_ordered_and_the_rest_is_counted(tmp_path):
    path = write_csv(tmp_path / "n.csv", rows_of(200))
    assert surveyed(section(path)).names == ("2019", "2020", "2021", "2022")
    some = surveyed(section(path, tasks="2020..2021"))
    assert some.names == ("2020", "2021") and some.left_out["of other tasks"] == 200 - len(some.documents)
    turned = surveyed(section(path, tasks=[2022, 2019]))
    assert turned.names == ("2022", "2019") and list(turned.stretches) == ["2022", "2019"]
    early = surveyed(section(path, train_on="2019..2020"))
    assert list(early.stretches) == ["2019", "2020"] and early.tasks == ("2019", "2020", "2021", "2022")
    assert "no document is of task '2018'. Did you mean" in refused(section(path, tasks=[2018, 2019]))
    assert "from 2010 to 2012" in refused(section(path, tasks="2010..2012"))


def test_numbers_in_names_are_sorted_as_numbers_and_gaps_are_told(tmp_path):
    rows = [{**row, "site": f"ward {i % 12}"} for i, row in enumerate(rows_of(60, years=("2019", "2022")))]
    path = write_csv(tmp_path / "n.csv", rows, (*COLUMNS, "site"))
    assert surveyed(section(path, year=None, task="site")).names == tuple(f"ward {i}" for i in range(12))
    assert any("2020, 2021, which lies" in notice for notice in surveyed(section(path)).notices)


def test_labels_are_found_sorted_or_taken_as_they_are_declared(tmp_path):
    rows = [{**row, "outcome": str(i % 12)} for i, row in enumerate(rows_of(120))]
    path = write_csv(tmp_path / "n.csv", rows)
    found = surveyed(section(path, labels=()))
    assert found.labels == tuple(map(str, range(12))) and not found.multi_label
    assert any("found in all tasks, later ones too" in notice for notice in found.notices)  # trap 23
    turned = surveyed(section(path, labels=list(range(11, -1, -1))))
    assert turned.labels[0] == "11" and (turned.documents.labels == 11 - found.documents.labels).all()
    assert not any("found in all tasks" in notice for notice in turned.notices)
    assert surveyed(section(path, labels=()), Reader(labels=turned.labels)).labels == turned.labels
    with pytest.raises(ConfigError, match=r"data\.labels"):
        surveyed(section(path, labels=("a", "b")), Reader(labels=("a", "c")))


def test_a_trained_classifier_gives_the_labels_in_its_order_and_others_are_refused(tmp_path):
    path = write_csv(tmp_path / "n.csv", rows_of(40))
    own = ("yes", "perhaps", "no")
    assert surveyed(section(path, labels=()), Reader(trained_labels=own)).labels == own
    with pytest.raises(ConfigError, match=r"data\.label: the classifier .* other labels \(1: no\) than \d+ rows have"):
        surveyed(section(path, labels=()), Reader(trained_labels=("no",)))
    with pytest.raises(ConfigError, match=r"data\.labels: the classifier .* Write family\.head=new"):
        surveyed(section(path, labels=("yes", "no")), Reader(trained_labels=own))


def test_labels_of_several_kinds_become_numbers(tmp_path):
    nan = float("nan")
    path = lines(tmp_path / "n.csv", "note,outcome,year,flu,fall", f"{WORDS[0]},a;b,2019,1,0", f"{WORDS[1]},,2020,0,",
                 f"{WORDS[2]},b; ,2020,true,0.0", f"{WORDS[3]},c,2019,,1")  # fmt: skip
    plain = {"group": None, "labels": (), "validation": 0, "test": 0}
    parted = surveyed(section(path, **plain, separator=";"))
    assert parted.multi_label and parted.labels == ("a", "b", "c")
    assert parted.documents.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    several = surveyed(section(path, **plain, label=("flu", "fall")))
    told = torch.from_numpy(several.documents.labels)
    expected = torch.tensor([[1, 0], [0, nan], [1, 0], [nan, 1]])
    torch.testing.assert_close(told, expected, equal_nan=True)
    assert several.documents.labels.dtype == "float32" and several.labels == ("flu", "fall")
    unknown = surveyed(section(path, **plain, separator=";", absent="unknown"))  # nobody has b in 2019 but the first
    torch.testing.assert_close(
        torch.from_numpy(unknown.documents.labels),
        torch.tensor([[1, 1, 0], [nan, 0, nan], [nan, 1, nan], [0, 0, 1.0]]),
        equal_nan=True,
    )


def test_lists_in_rows_are_labels_too(tmp_path):
    rows = [{"note": WORDS[0], "outcome": ["a", "b"], "year": 2019}, {"note": WORDS[1], "outcome": [], "year": 2019}]
    path = write_jsonl(tmp_path / "n.jsonl", rows)
    survey = surveyed(section(path, group=None, labels=(), validation=0, test=0))
    assert survey.multi_label and survey.documents.labels.tolist() == [[1, 1], [0, 0]]
    write_jsonl(path, [*rows, {"note": WORDS[2], "outcome": "a", "year": 2019}])
    assert "Make all of them lists" in refused(section(path, group=None, labels=()))


ROWS = {
    "a year of two digits": ("year", "19"),
    "a year that is not four digits": ("year", "in 2019"),
    "no year": ("year", " "),
    "no text": ("note", "  "),
    "no label": ("outcome", ""),
    "a label that is not among those declared": ("outcome", "maybe"),
}


@pytest.mark.parametrize("why", ROWS)
def test_a_row_that_gives_no_document_is_named_and_counted(tmp_path, why):
    column, cell = ROWS[why]
    rows = rows_of(60)
    for place in (6, 9):
        rows[place][column] = cell
    path = write_csv(tmp_path / "n.csv", rows)
    told = refused(section(path))
    assert told.startswith("2 of 60 rows give no document, more than data.unreadable (0).")
    assert why in told and "n.csv, row 7, n.csv, row 10" in told
    kept = surveyed(section(path, unreadable=2))
    kept.refuse_when_unusable(2)
    assert len(kept.documents) == 58 and "2 unusable" in kept.lines()[0]


def test_rows_that_are_not_utf8_or_have_other_cells_are_named(tmp_path):
    path = tmp_path / "n.csv"
    good = [f"{WORDS[i]} {WORDS[i + 1]},{'no' if i % 2 else 'yes'},2019,p{i}".encode() for i in range(8)]
    good[2], good[5] = b"caf\xe9,no,2019,p2", b"too,many,cells,are,here"
    path.write_bytes(b"\n".join([b"note,outcome,year,patient", *good, b""]))
    told = refused(section(path))
    assert (
        "1 with not UTF-8: n.csv, row 3" in told and "1 with more or fewer cells than the header: n.csv, row 6" in told
    )
    path.write_text("note,outcome", "utf-16")
    assert "UTF-16" in refused(section(path))
    write_jsonl(path.with_suffix(".jsonl"), rows_of(8)).open("ab").write(b'{"note": "a\xff"}\n{broken\n[1]\n')
    told = refused(section(path.with_suffix(".jsonl")))
    assert (
        "row 9" in told and "1 with not JSON: n.jsonl, row 10" in told and "not a JSON object: n.jsonl, row 11" in told
    )


def test_quotes_that_do_not_match_are_an_error_and_swallow_no_rows(tmp_path):
    path = lines(tmp_path / "n.csv", "note,outcome,year,patient", f"{WORDS[0]},no,2019,1", f'"{WORDS[1]},no,2019,2',
                 f"{WORDS[2]},no,2019,3")  # fmt: skip
    assert "n.csv, row 2" in refused(section(path)) and "quotes do not match" in refused(section(path))


def test_columns_that_are_not_there_are_refused_with_a_hint(tmp_path):
    path = lines(tmp_path / "n.csv", "Note ;outcome;year;patient", f"{WORDS[0]};no;2019;1")
    assert "Is it another data.delimiter?" in refused(section(path))
    assert "but for capitals or spaces" in refused(section(path, delimiter=";"))
    assert "several columns are called 'note'" in refused(section(lines(path, "note,note,outcome,year,patient", "")))
    assert "is empty" in refused(section(lines(path)))
    assert "no row has a column 'note'" in refused(section(write_jsonl(tmp_path / "n.jsonl", [{"nota": "x"}])))
    assert "there is no" in refused(section(tmp_path / "none.csv"))
    (tmp_path / "empty").mkdir()
    assert "the folder" in refused(section(tmp_path / "empty"))


def test_dates_that_cannot_be_told_are_refused(tmp_path):
    for cell, why in (("43831", "as Excel keeps them"), ("06/05/2021", "give data.date_format")):
        path = lines(tmp_path / "n.csv", "note,outcome,day", f"{WORDS[0]},no,{cell}", f"{WORDS[1]},yes,2019-01-01")
        assert why in refused(section(path, year=None, date="day", group=None))
    told = refused(section(path, year=None, date="day", date_format="%m/%d/%Y", group=None))
    assert "n.csv, row 2" in told and "data.date_format says" in told


def test_ids_in_place_of_labels_or_tasks_are_refused(tmp_path):
    path = write_csv(tmp_path / "n.csv", rows_of(300, per_patient=2))
    assert "Is it an id?" in refused(section(path, label="patient", group=None, labels=()))
    assert "Is it an id?" in refused(section(path, task="patient", year=None, group=None))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"date": "day"}, "documents have their tasks from one column"),
        ({"period": "month"}, "of a date"),
        ({"year": None, "date": "day", "date_format": "%d.%m.%y"}, "four digits"),
        ({"year": None, "date": "day", "periods": {"a": ["2020-01-01", "2019-01-01"]}}, "ends before it begins"),
        ({"label": ["a", "b"], "labels": ["c"]}, "names of the columns"),
        ({"label": ["a", "b"], "labels": (), "separator": ";"}, "names several"),
        ({"label_kind": "classes", "separator": ";"}, "multi-label data"),
        ({"label_kind": "multi-label"}, "Write what parts them"),
        ({"label_kind": "classes", "absent": "unknown"}, "of multi-label data"),
        ({"validation": 0.5, "test": 0.5}, "which leaves none"),
        ({"labels": ["no", "yes", "no"]}, "stands there twice"),
        ({"mode": "joint", "replay": {}}, "all tasks are shown at once"),
        ({"replay": {"off_by_one": True, "balance": "label"}}, "uniform memory alone"),
        ({"replay": {"size": 0}}, "greater than 0"),
        ({"cached": True}, "Extra inputs"),
    ],
)
def test_what_does_not_go_together_is_refused_when_it_is_read(tmp_path, fields, told):
    with pytest.raises(ValidationError, match=told):
        section(tmp_path / "n.csv", **fields)


def test_labels_of_several_at_once_balance_no_memory(tmp_path):
    path = lines(tmp_path / "n.csv", "note,outcome,year", *(f"{word},a;b,2019" for word in WORDS[:9]))
    told = refused(section(path, group=None, labels=(), separator=";", replay={"balance": "label"}))
    assert told.startswith("data.replay.balance")


@pytest.mark.parametrize(("truncate", "kept"), [("head", "012345"), ("tail", "456789"), ("head_tail", "012789")])
@pytest.mark.parametrize("model_type", ["bert", "xlnet"])
def test_long_documents_are_cut_as_told_and_keep_the_marks_around_them(tmp_path, truncate, kept, model_type):
    text = " ".join(WORDS[:10])
    path = lines(tmp_path / "n.csv", "note,outcome,year", f"{text},no,2019", f"{WORDS[0]},yes,2019")
    data = section(path, group=None, length=8, truncate=truncate, validation=0, test=0)
    survey, words = surveyed(data, Reader(model_type=model_type)), tokenizer(model_type)
    expected = words(" ".join(WORDS[int(i)] for i in kept))["input_ids"]
    assert survey.documents.document(0).tolist() == expected
    assert survey.documents.document(1).tolist() == words(WORDS[0])["input_ids"]
    assert (survey.cut, survey.whole, survey.longest) == (1, 12, 8)
    assert any("1 (50.0%) are longer than 8" in line for line in survey.lines())


def test_trap_31_virtual_tokens_leave_less_room_for_a_document(tmp_path):
    path = write_csv(tmp_path / "n.csv", rows_of(40))
    assert section(path).survey(Reader(context=18), reserved=8).length == 10
    assert section(path).survey(Reader(context=4096)).length == 512
    with pytest.raises(
        ConfigError, match=r"made for 18, 8 of which the adapter's virtual tokens take\. Write at most 10"
    ):
        section(path, length=11).survey(Reader(context=18), reserved=8)
    with pytest.raises(ConfigError, match="leave no room"):
        section(path, length=2).survey(Reader())


def test_rows_are_filled_up_on_the_side_that_the_model_reads_less(tmp_path):
    path = lines(tmp_path / "n.csv", "note,outcome,year", f"{WORDS[0]} {WORDS[1]},no,2019", f"{WORDS[2]},yes,2019")
    data = section(path, group=None, validation=0, test=0, shuffle=False)
    for model_type, left in (("bert", False), ("xlnet", True)):
        survey = replace(surveyed(data, Reader(model_type=model_type)), problems=())  # none is tested on
        batch = drawn(opened(data, survey).stream[0], 0, 1)[0]
        short = batch["mask"][1].tolist()
        assert short == ([False, True, True, True] if left else [True, True, True, False])
        assert (batch["ids"][~batch["mask"]] == tokenizer(model_type).pad_token_id).all()
        assert tokenizer(model_type).decode(batch["ids"][0], skip_special_tokens=True) == f"{WORDS[0]} {WORDS[1]}"


def test_a_tokenizer_without_padding_is_refused(tmp_path):
    class Bare(Reader):
        def tokenizer(self):
            words = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer)
            assert words.pad_token_id is None
            return words

    with pytest.raises(ConfigError, match="no padding token"):
        surveyed(section(write_csv(tmp_path / "n.csv", rows_of(20))), Bare())
