"""The task of a document by its year, its date or any column, and which tasks are taken in which order."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime

from weft.data.documents import RANGE
from weft.data.documents_reading import Unusable
from weft.errors import DataError, did_you_mean

ALL = "all"  # the one task of documents without a year, a date or a task
JOINT = "joint"
DATED = re.compile(r"\d{4}(-Q\d|-\d\d)?")
YEAR = re.compile(r"(\d{4})(?:\.0)?")  # programs that know no missing integers write years as fractions
PER_TASK, FEW_TASKS, MOST_TASKS = 5, 20, 100  # beyond them a column that is no date tells documents apart


@dataclass(frozen=True)
class Tasks:
    """How a cell tells its document's task. kind: of the column; None: there is none."""

    kind: str | None  # year, date or task
    period: str = "year"
    periods: Mapping[str, tuple[date, date]] | None = None
    date_format: str | None = None

    def of(self, cell: str) -> str | None:
        """The task of a document; None where it is of no period. Raises Unusable."""
        if self.kind is None:
            return ALL
        told = cell.strip()
        if not told:
            raise Unusable(f"no {self.kind}")
        if self.kind == "task":
            return told
        return self._of_year(told) if self.kind == "year" else self._of_day(self._day(told))

    def _of_year(self, told: str) -> str:
        match = YEAR.fullmatch(told)
        if match is None:
            few = re.fullmatch(r"\d{1,2}", told) is not None
            raise Unusable("a year of two digits, whose century is open" if few else "a year that is not four digits")
        return match[1]

    def _day(self, told: str) -> date:
        if self.date_format is None and re.fullmatch(r"\d{1,6}(\.\d+)?", told):
            raise Unusable("a date that is a plain number, as Excel keeps them; save the column as text")
        try:
            found = datetime.strptime(told, self.date_format) if self.date_format else datetime.fromisoformat(told)
        except ValueError:  # its words hold the cell
            how = "is not as data.date_format says" if self.date_format else "is not ISO 8601; give data.date_format"
            raise Unusable(f"a date that {how}") from None
        return found.date()

    def _of_day(self, day: date) -> str | None:
        if self.periods:
            return next((name for name, (first, last) in self.periods.items() if first <= day <= last), None)
        if self.period == "quarter":
            return f"{day.year:04}-Q{(day.month + 2) // 3}"
        return f"{day.year:04}-{day.month:02}" if self.period == "month" else f"{day.year:04}"


def natural(name: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """A key by which numbers in names are sorted as numbers, and no two names are the same."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts), name


def chosen(found: Iterable[str], asked: str | Sequence[str], field: str, order: Sequence[str] = ()) -> list[str]:
    """The tasks that are asked for, of those found, in order. asked: a list or A..B; nothing: all. order: of those
    that have one already. Raises DataError."""
    known = sorted(set(found), key=lambda name: (order.index(name) if name in order else len(order), natural(name)))
    if not asked:
        return known
    if isinstance(asked, str):
        match = RANGE.fullmatch(asked)
        assert match is not None, "a section lets nothing else pass"
        first, last = match[1], match[2]
        if order:
            ends = [place_of(name, known, field) for name in (first, last)]
            within = known[ends[0] : ends[1] + 1]
        else:
            within = [name for name in known if natural(first) <= natural(name) <= natural(last)]
        if not within:
            raise DataError(f"{field}: no document is of a task from {first} to {last}.")
        return within
    for name in asked:
        place_of(name, known, field)
    return list(asked)


def tells_documents_apart(tasks: int, documents: int) -> bool:
    """Whether so many values are no tasks but something that each document, or each patient, has of its own."""
    return tasks > MOST_TASKS or (tasks > FEW_TASKS and tasks * PER_TASK > documents)


def place_of(name: str, known: Sequence[str], field: str) -> int:
    """Where a task stands. Raises DataError, which shows the names of dates alone: another column may be the wrong one,
    and hold what nobody is to see."""
    if name not in known:
        dates = [each for each in known if DATED.fullmatch(each)]
        hint = f" {did_you_mean(name, dates)}" if dates else ""
        raise DataError(f"{field}: no document is of task '{name}'.{hint}")
    return list(known).index(name)


def gaps(tasks: Sequence[str]) -> list[str]:
    """Years that are missing between others."""
    if not all(re.fullmatch(r"\d{4}", name) for name in tasks):
        return []
    years = sorted(map(int, tasks))
    return [str(year) for year in range(years[0], years[-1]) if year not in years] if years else []
