"""Trap 33: no word, id or patient of a document is in what is said of it, whatever goes wrong."""

import io
import logging
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.documents import COLUMNS, WORDS, Reader, drawn, opened, rows_of, section, write_csv, write_jsonl
from weft.errors import WeftError
from weft.events import Event

CANARY = "zanzibar"
ALL = (*COLUMNS, "key", "part", "day")
Change = Callable[[list[dict[str, Any]]], object]


def secret_rows(count: int = 120) -> list[dict[str, Any]]:
    """Documents that say what nobody may read, in their text, their id and their patient."""
    return [
        {
            **row, "note": f"{CANARY}text {row['note']}", "patient": f"{CANARY}patient{row['patient']}",
            "key": f"{CANARY}id{i // 2}", "part": "train", "day": f"{row['year']}-01-02",
        }
        for i, row in enumerate(rows_of(count))
    ]  # fmt: skip


def silent(*told: object) -> None:
    for each in told:
        assert CANARY not in str(each).lower()
        assert CANARY not in repr(each).lower()


def heard_of(work: Callable[[list[Event]], object]) -> list[Event]:
    """What is told while it works. Nothing may be printed or logged of it, and no error may say it."""
    out, heard = io.StringIO(), list[Event]()
    logs = logging.StreamHandler(out)
    logging.getLogger().addHandler(logs)
    try:
        with redirect_stdout(out), redirect_stderr(out):
            work(heard)
    except WeftError as error:
        silent(error, "".join(traceback.format_exception(error)), error.__cause__)
        raise
    finally:
        logging.getLogger().removeHandler(logs)
        silent(out.getvalue(), *(event.record() for event in heard))
    return heard


def test_surveys_batches_and_notices_say_counts_and_row_numbers(tmp_path):
    rows = secret_rows()
    for row in rows[:20]:
        row["note"] = f"{CANARY} {WORDS[0]}"
    for row in rows[30:40]:
        row["patient"] = ""
    rows[7]["note"] = " ".join([CANARY] * 90)
    path = write_csv(tmp_path / "n.csv", rows, ALL)
    data = section(path, id="key", labels=(), replay={"size": 9, "batch": 3}, tasks=(2019, 2020, 2022))

    def work(heard: list[Event]) -> None:
        survey = data.survey(Reader(), heard.append)
        for part in ("have no group", "have an id", "stands in another split", "found in all tasks", "is of 2021"):
            assert any(part in notice for notice in survey.notices), part
        silent(survey, *survey.lines(), *survey.notices, survey.counts, survey.digest(), survey.unreadable)
        silent(survey.labels, survey.tasks, survey.left_out, survey.documents)
        dataset = opened(data, survey)
        silent(dataset, *dataset.stream, *(each.order for each in dataset.stream))
        for experience in dataset.stream:
            batch = drawn(experience, 2, 1)[0]
            silent(batch.keys, experience.position(2), experience.name, experience.replay)
        silent(*(batch.keys for batches in dataset.tests.values() for batch in batches))

    heard_of(work)


def set_cell(column: str, value: Any, place: int = 4) -> Change:
    return lambda rows: rows[place].update({column: value})


REFUSALS: dict[str, tuple[Change, dict[str, Any]]] = {
    "year": (set_cell("year", CANARY), {}),
    "two digits": (set_cell("year", "19"), {}),
    "label": (set_cell("outcome", CANARY), {}),
    "no label": (set_cell("outcome", ""), {}),
    "no text": (set_cell("note", ""), {}),
    "split": (set_cell("part", CANARY), {"split": "part"}),
    "torn": (lambda rows: [set_cell("part", "test", i)(rows) for i in range(0, 120, 2)], {"split": "part"}),
    "date": (set_cell("day", CANARY), {"year": None, "date": "day"}),
    "date as told": (set_cell("day", CANARY), {"year": None, "date": "day", "date_format": "%Y-%m-%d"}),
    "0 and 1": (lambda rows: None, {"label": ("outcome", "key"), "labels": ()}),
    "ids for labels": (lambda rows: None, {"label": "key", "labels": ()}),
    "ids for tasks": (lambda rows: None, {"year": None, "task": "key", "unreadable": 0, "tasks": ()}),
    "no such task": (lambda rows: None, {"year": None, "task": "patient", "tasks": (2019,)}),
    "none in the range": (lambda rows: None, {"year": None, "task": "patient", "tasks": "1..2"}),
    "no such column": (lambda rows: None, {"text": "nothing"}),
    "nobody tested": (lambda rows: None, {"test": 0}),
    "one label": (lambda rows: [row.update(outcome="no") for row in rows], {"labels": ()}),
    "too long": (lambda rows: None, {"length": 65}),
    "no room": (lambda rows: None, {"length": 2}),
    "balanced labels": (lambda rows: None, {"separator": ";", "labels": (), "replay": {"balance": "label"}}),
}


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_names_rows_and_columns(tmp_path, name, ending):
    change, fields = REFUSALS[name]
    rows = secret_rows()
    change(rows)
    path = tmp_path / f"n.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending == "jsonl":
        write_jsonl(path, rows)
    else:
        write_csv(path, rows, ALL)
    data = section(path, **fields)
    with pytest.raises(WeftError):
        heard_of(lambda heard: data.survey(Reader(), heard.append).refuse_when_unusable(0))


def quoted(path: Path) -> None:
    path.write_text(f'note,outcome,year,patient\n"{CANARY},no,2019,1\n"{CANARY}"x,no,2019,2\n')


def without_header(path: Path) -> None:
    path.write_text(f"{CANARY} {WORDS[0]},no,2019,{CANARY}\n")


def other_bytes(path: Path) -> None:
    path.write_bytes(f"note,outcome,year,patient\n{CANARY}é,no,2019,{CANARY}\n".encode("latin-1"))


def cut_off(path: Path) -> None:
    path.write_text(f"note,outcome,year,patient\n{CANARY},{CANARY}\n")


@pytest.mark.parametrize("spoil", [quoted, without_header, other_bytes, cut_off])
def test_files_that_cannot_be_read_are_named_and_not_shown(tmp_path, spoil):
    path = tmp_path / "n.csv"
    spoil(path)
    with pytest.raises(WeftError):
        heard_of(lambda heard: section(path).survey(Reader(), heard.append).refuse_when_unusable(0))


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        ("jsonl", f'{{"note": "{CANARY}", "outcome"\n["{CANARY}"]\n"{CANARY}"\n'),
        ("jsonl", f'{{"note": {{"{CANARY}": 1}}, "outcome": ["{CANARY}"], "year": 2019, "patient": "{CANARY}"}}\n'),
        ("parquet", f"PAR1{CANARY}PAR1"),
    ],
)
def test_the_same_of_rows_of_json_and_of_torn_parquet(tmp_path, ending, content):
    path = tmp_path / f"n.{ending}"
    path.write_text(content)
    with pytest.raises(WeftError):
        heard_of(lambda heard: section(path).survey(Reader(), heard.append).refuse_when_unusable(0))


def test_nothing_is_written_anywhere(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "n.csv", secret_rows(), ALL)
    monkeypatch.chdir(tmp_path)
    survey = section(path).survey(Reader())
    drawn(opened(section(path), survey).stream[0], 0, 3)
    assert [each.name for each in tmp_path.rglob("*")] == ["n.csv"]
