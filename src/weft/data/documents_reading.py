"""Rows of dated documents out of CSV, TSV and JSONL files; what goes wrong is told by row, never by content."""

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from weft.data.tapes import JsonLines
from weft.errors import DataError

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
NOT_UTF8 = "not UTF-8"


class Unusable(Exception):
    """Why a row gives no document, in words that every row with this fault shares: they say nothing of its content."""


@dataclass(frozen=True, repr=False)
class Record:
    """One row. number: counted from 1 within its file, the header aside. problem: why it cannot be read."""

    number: int
    cells: Mapping[str, Any]
    problem: str = ""


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and all of named folders with one of the endings, sorted. Raises DataError."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"data.path: there is no '{path}'. Paths count from the working directory, {Path.cwd()}.")
        inside = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
        shown = [each for each in inside if not any(part.startswith(".") for part in each.relative_to(path).parts)]
        own = [each for each in shown if each.suffix.lower() in ENDINGS]
        if not own:
            what = "the folder" if path.is_dir() else "the file"
            raise DataError(f"data.path: {what} '{path}' has nothing that ends in {', '.join(ENDINGS)}.")
        found += own
    return found


def json_records(path: Path) -> Iterator[Record]:
    """The objects of a .jsonl file by the number of their line."""
    tape = JsonLines(path, path.name)
    for row in tape.rows({}):
        number = tape.here()["line"]
        if row.problem:
            yield Record(number, {}, NOT_UTF8 if NOT_UTF8 in row.problem else "not JSON")
        elif not isinstance(row.value, dict):
            yield Record(number, {}, "not a JSON object")
        else:
            yield Record(number, row.value)


def csv_records(path: Path, columns: Sequence[str], delimiter: str) -> Iterator[Record]:
    """The rows of a .csv. Cells may be quoted and then hold newlines, the delimiter, and quotes written twice."""
    with opened(path) as file, any_size():
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        number, places = 0, None
        try:
            for cells in rows:
                if not cells:
                    continue
                if places is None:
                    places = places_of(path, cells, columns)
                    width = len(cells)
                    continue
                number += 1
                if len(cells) != width:
                    yield Record(number, {}, "more or fewer cells than the header")
                    continue
                yield Record(number, {name: cells[place] for name, place in places.items()})
        except csv.Error:  # its words may not be told: they are of what stands there
            raise DataError(
                f"{path}, row {number + 1} (line {rows.line_num}): its quotes do not match. Within quotes a quote is "
                "written twice."
            ) from None
        if places is None:
            raise DataError(f"{path} is empty. Expected a header and a row for each document.")


def places_of(path: Path, header: Sequence[str], columns: Sequence[str]) -> dict[str, int]:
    """Where in a row the columns stand. Raises DataError."""
    check_columns(path, header, columns, " Is it another data.delimiter?" if len(header) == 1 else "")
    return {name: header.index(name) for name in columns}


def check_columns(path: Path, found: Sequence[str], wanted: Sequence[str], hint: str = "") -> None:
    """Raise DataError for columns that a file does not have. Those that it has are not named: without a header they
    would be a document."""
    for name in wanted:
        if name not in found:
            alike = any(name.strip().casefold() == other.strip().casefold() for other in found)
            how = " One has this name but for capitals or spaces." if alike else hint
            raise DataError(f"{path}: none of its {len(found)} columns is called '{name}'.{how}")
        if list(found).count(name) > 1:
            raise DataError(f"{path}: several columns are called '{name}'. Rename all but one.")


@contextmanager
def opened(path: Path) -> Iterator[TextIOWrapper]:
    """A file as text. Bytes that are not UTF-8 become lone surrogates, so that their row can be told."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    with file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path} is UTF-16. Save it as UTF-8.")
        file.seek(0)
        yield TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")


@contextmanager
def any_size() -> Iterator[None]:
    """Let cells be of any size: a long document is more than the csv module takes for one."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def written(value: Any) -> str:
    """A cell as text. Numbers are written as they would be in a .csv; what is not there is blank. Raises Unusable."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # a lone surrogate
            raise Unusable(NOT_UTF8) from None
        return value
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (int, float, Decimal)):
        return str(value)
    if isinstance(value, (date, datetime)):
        return value.isoformat()
    raise Unusable("a cell that is neither text nor a number")
