"""Labels of documents as numbers: one class each, or any number of labels, where some may not be known."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from weft.data.documents_reading import Unusable, written
from weft.data.documents_tasks import natural
from weft.errors import DataError

KNOWN = {"1": 1.0, "1.0": 1.0, "true": 1.0, "0": 0.0, "0.0": 0.0, "false": 0.0, "": float("nan")}
NO_LABEL = "no label"
PER_LABEL, FEW_LABELS = 5, 50  # more labels than these, with fewer documents each, tell documents apart

Told = str | tuple[str, ...] | tuple[float, ...]  # a class; labels; of each label whether it is


@dataclass(frozen=True)
class LabelReader:
    """How the cells of a row tell its labels."""

    columns: tuple[str, ...]
    separator: str | None
    kind: str  # auto, classes or multi-label

    def read(self, cells: Sequence[Any]) -> Told:
        """What the cells tell. Raises Unusable."""
        if len(cells) > 1:
            known = [KNOWN.get(written(cell).strip().casefold()) for cell in cells]
            if any(value is None for value in known):
                raise Unusable("a label column that is neither 0, 1 nor blank")
            told = tuple(value for value in known if value is not None)
            if all(value != value for value in told):
                raise Unusable(NO_LABEL)
            return told
        cell = cells[0]
        if isinstance(cell, (list, tuple)) and self.kind != "classes":
            return tuple(name for name in (written(each).strip() for each in cell) if name)
        text = written(cell).strip()
        if self.separator is not None and cell is not None:
            return tuple(name for name in (part.strip() for part in text.split(self.separator)) if name)
        if not text:
            raise Unusable(NO_LABEL)
        return (text,) if self.kind == "multi-label" else text


@dataclass(frozen=True)
class Labelling:
    """The names of labels, and how many a document may have."""

    names: tuple[str, ...]
    multi_label: bool

    def missing(self, told: Told) -> bool:
        """Whether what a row tells has a name that is not known."""
        if isinstance(told, str):
            return told not in self.names
        return any(isinstance(name, str) and name not in self.names for name in told)

    def numbers(self, told: Sequence[Told]) -> numpy.ndarray:
        """(n,) int64 of classes, or (n, C) fp32 of labels, nan where it is not known."""
        places = {name: place for place, name in enumerate(self.names)}
        if not self.multi_label:
            return numpy.array([places[each] for each in told if isinstance(each, str)], numpy.int64)
        found = numpy.zeros((len(told), len(self.names)), numpy.float32)
        for row, each in enumerate(told):
            for place, value in enumerate(each):
                if isinstance(value, str):
                    found[row, places[value]] = 1.0
                else:
                    found[row, place] = value
        return found


def labelling(told: Sequence[Told], declared: Sequence[str], columns: Sequence[str]) -> Labelling:
    """The labels of a data set: those that are declared, or all that are found. Raises DataError."""
    multi_label = len(columns) > 1 or any(not isinstance(each, str) for each in told)
    if multi_label and any(isinstance(each, str) for each in told):
        raise DataError("data.label: some rows have a list of labels and others one. Make all of them lists.")
    if len(columns) > 1:
        return Labelling(tuple(columns), True)
    if declared:
        return Labelling(tuple(declared), multi_label)
    names = sorted(set(all_names(told)), key=natural)
    if len(names) > FEW_LABELS and len(names) * PER_LABEL > len(told):
        raise DataError(
            f"data.label: its column has {len(names)} different values in {len(told)} rows. Is it an id? If they are "
            "labels, name them under data.labels."
        )
    return Labelling(tuple(names), multi_label)


def all_names(told: Iterable[Told]) -> Iterable[str]:
    """Every name that rows tell, as often as they do."""
    for each in told:
        if isinstance(each, str):
            yield each
        else:
            yield from (name for name in each if isinstance(name, str))


def not_yet_given(numbers: numpy.ndarray, task: numpy.ndarray) -> numpy.ndarray:
    """Labels (n, C) in which those that no document of a task has are not known in that task (n,)."""
    found = numbers.copy()
    for each in numpy.unique(task):
        own = task == each
        never = ~(numbers[own] == 1).any(0)
        found[numpy.ix_(own, never)] = numpy.nan
    return found
