"""What training on documents would see: counts by task, label and split, and tokens that stay in memory."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy

from weft.errors import DataError

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)
ROWS_NAMED = 5
LABELS_SHOWN = 8


@dataclass(frozen=True)
class Unread:
    """A row that gives no document. reason: its place and why, without a word of what stands there."""

    key: str
    reason: str
    why: str


@dataclass(frozen=True, repr=False)
class Collection:
    """Documents in the order of the files, n of them. Only counts of it may be shown: its tokens are the documents.

    ids: (T,) int32 of all; document i is [starts[i], starts[i + 1]). row: (n,), its number over all files, from 1.
    task, split, group: (n,) numbers. labels: (n,) int64 of classes or (n, C) fp32, nan where it is not known.
    """

    ids: numpy.ndarray
    starts: numpy.ndarray
    row: numpy.ndarray
    task: numpy.ndarray
    split: numpy.ndarray
    group: numpy.ndarray
    labels: numpy.ndarray

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def lengths(self) -> numpy.ndarray:
        return numpy.diff(self.starts)

    def document(self, number: int) -> numpy.ndarray:
        """Its tokens."""
        return self.ids[self.starts[number] : self.starts[number + 1]]

    def within(self, split: int, task: int | None = None) -> numpy.ndarray:
        """Numbers of the documents of a split, of a task or of all, in the order of the files."""
        own = self.split == split
        return numpy.flatnonzero(own if task is None else own & (self.task == task))


@dataclass(frozen=True)
class Padding:
    """What rows of a batch are filled up with, and on which side."""

    token: int
    left: bool


@dataclass(frozen=True, repr=False)
class DocumentsSurvey:
    """The documents of the files. stretches: experience -> micro-batches of all ranks in one pass over it, glances
    counted. tasks: names of all test sets, in order. names: those of all tasks, as Collection.task counts them.

    cut: documents that are longer than is read. whole: tokens of the longest before that. left_out: documents that are
    not used, by the reason. notices: what the user should know. problems: what cannot be trained on, each a sentence.
    """

    documents: Collection
    labels: tuple[str, ...]
    multi_label: bool
    names: tuple[str, ...]
    experiences: Mapping[str, numpy.ndarray]  # name -> numbers of the documents that it trains on
    batch_size: int
    glances: int
    padding: Padding
    length: int
    truncate: str
    cut: int
    whole: int
    unreadable: tuple[Unread, ...]
    rows_read: int
    left_out: Mapping[str, int]
    notices: tuple[str, ...]
    problems: tuple[str, ...]
    grouped: bool
    replayed: str = ""  # the memory in words

    streamed = False
    capacity = None

    @cached_property
    def stretches(self) -> dict[str, int]:
        return {name: ceil(len(rows) / self.batch_size) * self.glances for name, rows in self.experiences.items()}

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        return tuple(name for i, name in enumerate(self.names) if len(self.documents.within(TEST, i)))

    @property
    def train(self) -> numpy.ndarray:
        """Numbers of the documents that are trained on, of all experiences."""
        return numpy.concatenate([numpy.zeros(0, numpy.int64), *self.experiences.values()])

    @property
    def validation(self) -> numpy.ndarray:
        """Numbers of the documents that are validated on, of all tasks."""
        return self.documents.within(VALIDATION)

    @property
    def rows(self) -> int:
        """Documents of one pass over all experiences."""
        return sum(map(len, self.experiences.values()))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document, as it is read."""
        return int(self.documents.lengths.max()) if len(self.documents) else 0

    @cached_property
    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """Documents by task, split and label; 'all' counts each once."""
        return {
            task: {split: self._labelled(self.documents.within(s, t)) for s, split in enumerate(SPLITS)}
            for t, task in enumerate(self.names)
        }

    def _labelled(self, numbers: numpy.ndarray) -> dict[str, int]:
        own = self.documents.labels[numbers]
        each = (own == 1).sum(0) if self.multi_label else numpy.bincount(own, minlength=len(self.labels))
        return {"all": len(numbers), **dict(zip(self.labels, each.tolist(), strict=True))}

    def digest(self) -> str:
        """Hash over what every document is: tokens, labels, task, split and place. Nothing can be read from it."""
        own, found = self.documents, hashlib.sha256()
        trained = numpy.concatenate([numpy.zeros(0, numpy.int64), *self.experiences.values()])
        for array in (own.ids, own.starts, own.row, own.task, own.split, own.labels, trained):
            found.update(numpy.ascontiguousarray(array).tobytes())
        found.update("\n".join((*self.labels, *self.names, *self.experiences)).encode())
        return found.hexdigest()

    def epoch_draws(self, batch_size: int) -> int:
        """Micro-batches of one pass over all experiences."""
        return sum(ceil(len(rows) / batch_size) * self.glances for rows in self.experiences.values())

    def steps_per_epoch(self, batch_size: int, accumulate: int = 1) -> int:
        """Optimizer steps of one pass. accumulate: micro-batches per step, over all ranks."""
        return ceil(self.epoch_draws(batch_size) / accumulate)

    def lines(self) -> list[str]:
        """The survey in words, for a plan."""
        own = self.documents
        groups = f" of {len(numpy.unique(own.group)):,} groups" if self.grouped else ""
        lost = [f"{count:,} {why}" for why, count in self.left_out.items() if count]
        if self.unreadable:
            lost.append(f"{len(self.unreadable):,} unusable")
        apart = f"; left out: {', '.join(lost)}" if lost else ""
        shown = ", ".join(self.labels[:LABELS_SHOWN]) + (", ..." if len(self.labels) > LABELS_SHOWN else "")
        kind = "labels, any number of which a document has" if self.multi_label else "classes"
        share = self.cut / len(own) if len(own) else 0.0
        lose = {"head": "end", "tail": "beginning", "head_tail": "middle"}[self.truncate]
        return [
            f"{len(own):,} documents{groups} in {len(self.names)} tasks{apart}",
            f"{len(self.labels)} {kind}: {shown}",
            *(f"{name}: {self._line(name)}" for name in self.names),
            f"longest document {self.whole:,} tokens; {self.cut:,} ({share:.1%}) are longer than {self.length:,} and "
            f"lose their {lose}",
            *([self.replayed] if self.replayed else []),
            *(f"note: {notice}" for notice in self.notices),
        ]

    def _line(self, task: str) -> str:
        counts = self.counts[task]
        parts = []
        for split in SPLITS:
            total = counts[split]["all"]
            which = self.labels[1:] if len(self.labels) == 2 and not self.multi_label else self.labels
            own = [f"{name} {counts[split][name] / total:.0%}" for name in which] if total else []
            told = f" ({', '.join(own)})" if own and len(own) <= LABELS_SHOWN else ""
            parts.append(f"{split} {total:,}{told}")
        return ", ".join(parts)

    def refuse_when_unusable(self, budget: int) -> None:
        """Raise DataError when more rows than the budget are unusable, or nothing can be trained on."""
        broken = len(self.unreadable)
        if broken > budget:
            why = Counter(each.why for each in self.unreadable)
            told = "\n".join(f"  {count} with {reason}: {self._rows_with(reason)}" for reason, count in why.items())
            raise DataError(
                f"{broken} of {self.rows_read} rows give no document, more than data.unreadable ({budget}). Mend or "
                f"remove them, or raise the limit:\n{told}"
            )
        if self.problems:
            raise DataError("\n".join(self.problems))

    def _rows_with(self, why: str) -> str:
        places = [each.key for each in self.unreadable if each.why == why]
        return ", ".join(places[:ROWS_NAMED]) + (", ..." if len(places) > ROWS_NAMED else "")


def joined(arrays: Sequence[numpy.ndarray], dtype: type) -> numpy.ndarray:
    return numpy.concatenate([numpy.zeros(0, dtype), *(numpy.asarray(array, dtype) for array in arrays)])
