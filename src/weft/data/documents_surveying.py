"""Read dated documents, decide which task and which split each belongs to, and make tokens of them."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy

from weft.contracts import EncoderFamily
from weft.data.documents_labels import Labelling, LabelReader, Told, labelling, not_yet_given
from weft.data.documents_notices import notices, problems
from weft.data.documents_reading import Unusable, files_of, written
from weft.data.documents_splits import WORDS, Shares, apart, hashed, leaking
from weft.data.documents_survey import SPLITS, TRAIN, Collection, DocumentsSurvey, Unread, joined
from weft.data.documents_tasks import JOINT, Tasks, chosen, tells_documents_apart
from weft.data.documents_tokens import Cutting
from weft.errors import ConfigError, DataError
from weft.events import Listener, PhaseStarted, Progress

if TYPE_CHECKING:
    from weft.data.documents import DocumentsData

USUAL_LENGTH = 512  # of what 'auto' reads; models that take more are made for longer documents than most
OTHER_TASKS, OF_NO_PERIOD, ELSEWHERE = "of other tasks", "of no period", "whose text stands in another split"
WRONG_LABEL = "a label that is not among those declared"
TOLD_EVERY = 8192  # documents


@dataclass(slots=True, repr=False)
class Row:
    """A row that gives a document. number: over all files, from 1. place: where a user would look for it. group: as its
    column says. name: a hash of its id."""

    number: int
    place: str
    text: str
    told: Told
    task: str
    group: str
    split: int
    name: bytes


@dataclass(repr=False)
class Rows:
    """The rows of all files: those that give a document, and those that give none."""

    found: list[Row] = field(default_factory=list)
    unreadable: list[Unread] = field(default_factory=list)
    read: int = 0
    of_no_period: int = 0

    def refuse(self, place: str, why: str) -> None:
        self.unreadable.append(Unread(place, f"{place}: it has {why}.", why))


@dataclass(frozen=True)
class Reading:
    """How a row becomes a document."""

    data: "DocumentsData"
    tasks: Tasks
    labels: LabelReader

    @property
    def dated(self) -> str | None:
        data = self.data
        return data.year or data.date or data.task

    def columns(self) -> list[str]:
        """All columns that are read, each once."""
        data = self.data
        own = (*data.columns_of_text, *data.columns_of_labels, self.dated, data.group, data.id, data.split)
        return list(dict.fromkeys(name for name in own if name is not None))

    def all(self) -> Rows:
        """Every row of every file. Raises DataError."""
        paths = self.data.path if isinstance(self.data.path, tuple) else (self.data.path,)
        rows, columns, seen = Rows(), self.columns(), Counter[str]()
        for path in files_of(paths):
            for record in self.data.records(path, columns):
                rows.read += 1
                place = f"{path.name}, row {record.number}"
                seen.update(name for name in columns if name in record.cells)
                try:
                    if record.problem:
                        raise Unusable(record.problem)
                    self._add(rows, record.cells, place)
                except Unusable as unusable:
                    rows.refuse(place, str(unusable))
        if missing := [name for name in columns if not seen[name]]:
            raise DataError(f"data.path: no row has a column '{missing[0]}'. Is it another name?")
        return rows

    def _add(self, rows: Rows, cells: Mapping[str, Any], place: str) -> None:
        data = self.data
        text, told = self._text(cells), self.labels.read([cells.get(name) for name in data.columns_of_labels])
        task = self.tasks.of(written(cells.get(self.dated)) if self.dated else "")
        split = TRAIN
        if data.split is not None:
            word = written(cells.get(data.split)).strip().casefold()
            if word not in WORDS:
                raise Unusable("a split that is neither train, validation nor test")
            split = WORDS[word]
        group = written(cells.get(data.group)).strip() if data.group else ""
        name = hashed(written(cells.get(data.id))) if data.id else b""
        if task is None:
            rows.of_no_period += 1
        else:
            rows.found.append(Row(rows.read, place, text, told, task, group, split, name))

    def _text(self, cells: Mapping[str, Any]) -> str:
        parts = {name: written(cells.get(name)) for name in self.data.columns_of_text}
        if not any(part.strip() for part in parts.values()):
            raise Unusable("no text")
        if self.data.template is None:
            return "\n\n".join(part for part in parts.values() if part.strip())
        return re.sub(r"\{([^{}]*)\}", lambda match: parts[match[1]], self.data.template)


def reading_of(data: "DocumentsData") -> Reading:
    """How the rows of a section are read."""
    kind = next((name for name in ("year", "date", "task") if getattr(data, name) is not None), None)
    tasks = Tasks(kind, data.period, data.periods or None, data.date_format)
    return Reading(data, tasks, LabelReader(data.columns_of_labels, data.separator, data.label_kind))


def survey(data: "DocumentsData", family: EncoderFamily, tell: Listener, reserved: int) -> DocumentsSurvey:
    """Read, split, count and tokenise. Raises ConfigError for a length that the model cannot take, and DataError."""
    length = length_of(data, family, reserved)
    cutting = Cutting(family.tokenizer(), length, data.truncate)
    padding = cutting.padding()
    rows = reading_of(data).all()
    names = tasks_of(data, rows)
    left_out = {OF_NO_PERIOD: rows.of_no_period, OTHER_TASKS: kept_of_tasks(rows, names)}
    labels = labels_of(data, family, rows)
    sorting, twice = sorted_out(data, rows, names)
    left_out[ELSEWHERE] = twice if data.duplicates == "apart" else 0
    encoded = list(told_of(cutting.encoded([row.text for row in rows.found]), len(rows.found), tell))
    documents = collected(data, rows.found, [ids for ids, _ in encoded], sorting, labels)
    experiences = experiences_of(data, documents, names)
    return DocumentsSurvey(
        documents=documents,
        labels=labels.names,
        multi_label=labels.multi_label,
        names=tuple(names),
        experiences=experiences,
        batch_size=data.batch_size,
        glances=data.glances,
        padding=padding,
        length=length,
        truncate=data.truncate,
        cut=sum(whole > length for _, whole in encoded),
        whole=max((whole for _, whole in encoded), default=0),
        unreadable=tuple(rows.unreadable),
        rows_read=rows.read,
        left_out=left_out,
        notices=(*of_columns(data, rows.found), *notices(data, documents, names, labels, twice)),
        problems=tuple(problems(documents, names, labels, experiences, left_out)),
        grouped=data.group is not None,
        replayed=replayed(data),
    )


@dataclass(frozen=True)
class Sorting:
    """Of each document the number of its task, its split and its group, (n,) each."""

    task: numpy.ndarray
    split: numpy.ndarray
    group: numpy.ndarray


def sorted_out(data: "DocumentsData", rows: Rows, names: Sequence[str]) -> tuple[Sorting, int]:
    """Where each document belongs, and how many have a text that stands in another split, which are left out where that
    is asked for. Raises DataError."""
    places = {name: number for number, name in enumerate(names)}
    task = numpy.array([places[row.task] for row in rows.found], numpy.int64)
    group, split = split_of(data, rows.found)
    # In the order of time: a later task has no part in what becomes of an earlier one's documents.
    twins = apart(split, [hashed(row.text) for row in rows.found], numpy.argsort(task, kind="stable"))
    twice = int(twins.sum())
    if data.duplicates == "apart" and twice:
        rows.found = [row for row, twin in zip(rows.found, twins, strict=True) if not twin]
        task, split, group = task[~twins], split[~twins], group[~twins]
    return Sorting(task, split, group), twice


def collected(
    data: "DocumentsData", rows: Sequence[Row], tokens: Sequence[numpy.ndarray], sorting: Sorting, labels: Labelling
) -> Collection:
    """The documents as numbers."""
    numbers = labels.numbers([row.told for row in rows])
    if labels.multi_label and data.absent == "unknown":
        numbers = not_yet_given(numbers, sorting.task)
    return Collection(
        ids=joined(tokens, numpy.int32),
        starts=numpy.cumsum([0, *map(len, tokens)], dtype=numpy.int64),
        row=numpy.array([row.number for row in rows], numpy.int64),
        task=sorting.task,
        split=sorting.split,
        group=sorting.group,
        labels=numbers,
    )


def length_of(data: "DocumentsData", family: EncoderFamily, reserved: int) -> int:
    """Tokens of the longest document that is read whole. Raises ConfigError."""
    most = family.context - reserved
    virtual = f", {reserved} of which the adapter's virtual tokens take" if reserved else ""
    if most < 1 or (data.length != "auto" and data.length > most):
        asked = "" if data.length == "auto" else f"{data.length} tokens are more than the model can take: "
        raise ConfigError(
            f"data.length: {asked}it was made for {family.context}{virtual}. Write at most {max(most, 1)}."
        )
    return min(most, USUAL_LENGTH) if data.length == "auto" else data.length


def tasks_of(data: "DocumentsData", rows: Rows) -> list[str]:
    """The tasks that are taken, in order. Raises DataError."""
    found = {row.task for row in rows.found}
    if data.task is not None and not data.tasks and tells_documents_apart(len(found), len(rows.found)):
        raise DataError(
            f"data.task: its column has {len(found)} different values. Is it an id? If they are tasks, name them under "
            "data.tasks."
        )
    return chosen(found, data.tasks, "data.tasks", list(data.periods))


def kept_of_tasks(rows: Rows, names: Sequence[str]) -> int:
    """Forget rows of other tasks. How many they were."""
    taken, before = set(names), len(rows.found)
    rows.found = [row for row in rows.found if row.task in taken]
    return before - len(rows.found)


def labels_of(data: "DocumentsData", family: EncoderFamily, rows: Rows) -> Labelling:
    """The names of the labels, in the order of the model where it has one. Rows that tell others become unreadable.
    Raises ConfigError for a config whose names differ, DataError."""
    known = tuple(family.labels) or family.trained_labels
    if family.labels and data.labels and set(family.labels) != set(data.labels):
        raise ConfigError("data.labels: they are not the names under family.labels. Write one of the two.")
    trained = f"the classifier in family.source was trained for other labels ({len(known)}: {', '.join(known[:8])})"
    mend = "Write family.head=new for a classifier that begins anew"
    if known and data.labels and set(known) != set(data.labels):
        raise ConfigError(f"data.labels: {trained}. {mend}, or name the labels as it does.")
    declared = known or data.labels
    columns = data.columns_of_labels
    found = labelling([row.told for row in rows.found], declared, columns)
    if family.labels and len(columns) > 1 and tuple(family.labels) != columns:
        raise ConfigError("data.label: its columns are not family.labels in their order. Write them as the model has.")
    if known and len(columns) > 1 and known != columns:
        raise ConfigError(f"data.label: {trained}, and these are the columns in that order. {mend}, or write those.")
    if found.multi_label and data.replay is not None and "label" in data.replay.balance:
        raise ConfigError(
            "data.replay.balance: a document with several labels belongs to no single one. Write 'task' or 'none'."
        )
    wrong = [row for row in rows.found if found.missing(row.told)]
    if wrong and known and known == family.trained_labels:
        raise ConfigError(f"data.label: {trained} than {len(wrong)} rows have. {mend}, or leave these rows out.")
    for row in wrong:
        rows.refuse(row.place, WRONG_LABEL)
    if wrong:
        rows.found = [row for row in rows.found if not found.missing(row.told)]
    return found


def split_of(data: "DocumentsData", rows: Sequence[Row]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Number of the group (n,) and split (n,) of each row; a row without a group is one by its text. Raises DataError
    where a split column tears a group apart."""
    units = [b"g" + row.group.encode() if row.group else b"t" + hashed(row.text) for row in rows]
    places: dict[bytes, int] = {}
    groups = numpy.array([places.setdefault(unit, len(places)) for unit in units], numpy.int64)
    if data.split is None:
        shares = Shares(data.validation, data.test, data.split_seed)
        drawn = [shares.of(unit) for unit in places]
        return groups, numpy.array(drawn, numpy.int64)[groups] if drawn else groups
    split = numpy.array([row.split for row in rows], numpy.int64)
    if data.group is not None and len(torn := leaking(split, groups)):
        first = [rows[i].place for i in numpy.flatnonzero(groups == torn[0])[: len(SPLITS)]]
        raise DataError(
            f"data.split: {len(torn)} groups of data.group are in more than one split, the first in "
            f"{'; '.join(first)}. Mend the column, or leave it out, so that whole groups are drawn."
        )
    return groups, split


def experiences_of(data: "DocumentsData", documents: Collection, names: Sequence[str]) -> dict[str, numpy.ndarray]:
    """Experience -> the documents that it trains on, where there are any. Raises DataError."""
    trained = chosen(names, data.train_on, "data.train_on", list(names))
    own = {name: documents.within(TRAIN, list(names).index(name)) for name in trained}
    if data.mode == "joint":
        whole = numpy.sort(joined(list(own.values()), numpy.int64))
        return {JOINT: whole} if len(whole) else {}
    return {name: rows for name, rows in own.items() if len(rows)}


def of_columns(data: "DocumentsData", rows: Sequence[Row]) -> list[str]:
    """What the user should know of the columns of groups and ids."""
    said = []
    if data.group is not None and (blank := sum(not row.group for row in rows)):
        said.append(f"{blank} documents have no group; each was split by itself.")
    if data.id is not None and (doubles := len(rows) - len({row.name for row in rows})):
        said.append(f"{doubles} documents have an id that another has too.")
    return said


def told_of(encoded: Iterator[Any], total: int, tell: Listener) -> Iterator[Any]:
    """The same, and how far it is, where there are many."""
    if total >= TOLD_EVERY:
        tell(PhaseStarted(phase="starting", total=total))
    for done, each in enumerate(encoded, start=1):
        if done % TOLD_EVERY == 0:
            tell(Progress(phase="starting", done=done, total=total))
        yield each


def replayed(data: "DocumentsData") -> str:
    """The memory in words."""
    memory = data.replay
    if memory is None:
        return ""
    shared = "" if memory.balance == "none" else f", shared evenly by {memory.balance.replace('_', ' and ')}"
    of = "of all that was shown" if memory.scope == "all" else "of earlier tasks"
    return f"replay: {memory.batch} documents beside each batch, from a memory of {memory.size} {of}{shared}"
