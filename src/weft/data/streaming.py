"""Text that is read while training: a stretch of rows at a time, shuffled and packed, with a place to go on from."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weft.contracts import Batch
from weft.data.ahead import ahead
from weft.data.loader import BATCHES_AHEAD
from weft.data.packing import RowSampler
from weft.data.sampler import chance
from weft.data.tapes import Row, Tape
from weft.data.tokens import Making, Text, Unreadable
from weft.errors import DataError
from weft.events import Listener, Notice

Rows = tuple[tuple[Text, ...], ...]


@dataclass(frozen=True)
class Stream:
    """A source that is streamed. tapes: opens it anew. weight: of its rows among those of all sources."""

    label: str
    tapes: Callable[[], tuple[list[Tape], str]]
    making: Making
    weight: int = 1
    take: int | None = None  # rows of an epoch


@dataclass(frozen=True, kw_only=True)
class Filling:
    """How rows become batches; the words are those of the data section."""

    capacity: int | None
    length: int
    batch_size: int
    truncate: str
    buffer: int
    shuffle: bool
    seed: int
    unreadable: int


class Reading:
    """One source, epoch after epoch; its files take turns in an order that is drawn for each epoch."""

    def __init__(self, stream: Stream, filling: Filling, place: Mapping[str, Any]) -> None:
        self._stream, self._filling = stream, filling
        self._epoch, self._turn = place.get("epoch", 0), place.get("turn", 0)
        self._taken, self._at = place.get("taken", 0), place.get("at", {})
        self._tape: Tape | None = None

    def rows(self) -> Iterator[Row | None]:
        """The rows from the place on, and None at the end of each epoch. Raises DataError for a source without rows."""
        while True:
            tapes, _ = self._stream.tapes()
            for tape in self._in_turn(tapes):
                for row in tape.rows(self._at) if self._has_more() else ():
                    self._taken += 1
                    yield row
                    if not self._has_more():
                        break
                self._tape, self._at, self._turn = None, {}, self._turn + 1
            if not self._taken:
                raise DataError(f"data.sources: the stream '{self._stream.label}' has no rows.")
            self._epoch, self._turn, self._taken = self._epoch + 1, 0, 0
            yield None

    def place(self) -> dict[str, Any]:
        """The place behind the row that was given last, as plain data."""
        at = self._tape.here() if self._tape else self._at
        return {"epoch": self._epoch, "turn": self._turn, "taken": self._taken, "at": at}

    def _has_more(self) -> bool:
        return self._stream.take is None or self._taken < self._stream.take

    def _in_turn(self, tapes: Sequence[Tape]) -> Iterator[Tape]:
        """The tapes of the epoch from the present turn on."""
        order = list(range(len(tapes)))
        if self._filling.shuffle:
            seed = self._filling.seed
            order.sort(key=lambda i: chance(seed, "files", self._stream.label, self._epoch, i))
        for number in order[self._turn :]:
            self._tape = tapes[number]
            yield tapes[number]


@dataclass(frozen=True)
class Mark:
    """Where a stretch begins. draw: the number of its first batch. place: of every source, and the counts until then"""

    draw: int
    place: Mapping[str, Any]


COUNTS = ("unreadable", "too long", "with nothing to learn")


class Stretches:
    """The batches of one stretch of rows after another, from a mark on."""

    def __init__(self, streams: Sequence[Stream], filling: Filling, mark: Mark) -> None:
        self._filling, self._streams = filling, streams
        self._number, self._picked = mark.place.get("stretch", 0), mark.place.get("rows", 0)
        places = mark.place.get("sources", [{}] * len(streams))
        self._readings = [Reading(s, filling, place) for s, place in zip(streams, places, strict=True)]
        self._rows = [reading.rows() for reading in self._readings]
        self.counts = {name: mark.place.get("counts", {}).get(name, 0) for name in COUNTS}

    def place(self) -> dict[str, Any]:
        """Plain data of the place that is reached."""
        sources = [reading.place() for reading in self._readings]
        return {"stretch": self._number, "rows": self._picked, "sources": sources, "counts": dict(self.counts)}

    def next(self) -> list[Rows]:
        """The batches of the next stretch. Raises DataError beyond the error budget."""
        filling, texts = self._filling, self._texts()
        if filling.shuffle:
            drawn = [chance(filling.seed, "stretch", self._number, i) for i in range(len(texts))]
            texts = [texts[i] for i in sorted(range(len(texts)), key=drawn.__getitem__)]
        lengths = [len(text.ids) for text in texts]
        sampler = RowSampler(lengths, filling.capacity, filling.batch_size, filling.seed, filling.shuffle)
        batches = sampler.epoch(self._number)
        self._number += 1
        return [tuple(tuple(texts[i] for i in row) for row in batch) for batch in batches]

    def _texts(self) -> list[Text]:
        """The texts of so many rows as a stretch has; of a single source it ends with the epoch."""
        read: list[list[Row]] = [[] for _ in self._streams]
        first = self._picked
        while self._picked < first + self._filling.buffer:
            source = self._whose()
            row = next(self._rows[source])
            if row is not None:
                read[source].append(row)
                self._picked += 1
            elif len(self._streams) == 1 and read[0]:
                break
        texts: list[Text] = []
        for stream, rows in zip(self._streams, read, strict=True):
            for made in stream.making.texts(rows):
                texts += self._fitting(made)
        if not texts:
            raise DataError(
                f"Of {self._picked - first} rows of the streams none can be trained on: {lost({}, self.counts)}. Raise "
                "data.length, or look at data.learn."
            )
        return texts

    def _whose(self) -> int:
        """The source of the next row, by the weights."""
        weights = [stream.weight for stream in self._streams]
        place = chance(self._filling.seed, "source", self._picked) * sum(weights)
        return next(i for i in range(len(weights)) if place < sum(weights[: i + 1]))

    def _fitting(self, made: Text | Unreadable) -> list[Text]:
        """The text if it can be trained on, cut where that was asked for. Raises DataError."""
        length = self._filling.length
        if isinstance(made, Unreadable):
            self.counts["unreadable"] += 1
            if self.counts["unreadable"] > self._filling.unreadable:
                raise DataError(
                    f"{self.counts['unreadable']} rows of the streams give no conversation, more than data.unreadable "
                    f"({self._filling.unreadable}). The last: {made.reason}"
                )
            return []
        if len(made.ids) > length:
            if self._filling.truncate == "error":
                raise DataError(
                    f"{made.key} has {len(made.ids)} tokens, more than data.length ({length}), and data.truncate is "
                    "'error'. Raise data.length, or write 'drop' or 'cut_end'."
                )
            if self._filling.truncate == "drop":
                self.counts["too long"] += 1
                return []
            made = Text(made.key, made.digest, made.ids[:length], made.learned[:length])
        if not made.learned[1:].any():
            self.counts["with nothing to learn"] += 1
            return []
        return [made]


@dataclass
class StreamExperience:
    """An endless stream of training batches. Every rank reads all rows, in one order, and takes its own batches.

    A stretch of rows is shuffled and packed for itself, so that a place is where the stretch began: what was read of
    it is read again on resume, and nothing before it.
    """

    name: str
    last_step: int
    streams: tuple[Stream, ...]
    filling: Filling
    collate: Callable[[Rows], Batch]
    tell: Listener
    _marks: list[Mark] = field(default_factory=lambda: [Mark(0, {})])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def epoch_draws(self) -> None:
        """Not known: rows are counted as they come."""
        return None

    def position(self, drawn: int) -> dict[str, Any]:
        """Where the stretch of a draw began. Marks before it are forgotten: draws only grow."""
        with self._lock:
            known = [mark for mark in self._marks if mark.draw <= drawn]
            self._marks = [known[-1], *(mark for mark in self._marks if mark.draw > drawn)]
            return {"draw": known[-1].draw, **known[-1].place}

    def resume_at(self, position: Mapping[str, Any]) -> None:
        if position:
            with self._lock:
                self._marks = [Mark(position["draw"], {k: v for k, v in position.items() if k != "draw"})]

    def batches(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        """Micro-batches of one rank, the draws start + rank, start + rank + world, ... of the run."""
        for batch, said in ahead(self._drawn(start + rank, world), BATCHES_AHEAD):
            if said and rank == 0:
                self.tell(Notice(text=said))
            if batch is not None:
                yield batch

    def _drawn(self, first: int, world: int) -> Iterator[tuple[Batch | None, str]]:
        """The batches of the draws first, first + world, ...; beside them what is to be said of a stretch."""
        with self._lock:
            earlier = [mark for mark in self._marks if mark.draw <= first]
        assert earlier, f"draw {first} lies before what this stream was resumed at"
        mark = earlier[-1]
        stretches, draw = Stretches(self.streams, self.filling, mark), mark.draw
        while True:
            before = dict(stretches.counts)
            batches = stretches.next()
            after = Mark(draw + len(batches), stretches.place())
            with self._lock:
                if after.draw > self._marks[-1].draw:
                    self._marks.append(after)
            if said := lost(before, stretches.counts):
                yield None, f"data: left out of a stretch of the stream: {said}."
            for rows in batches:
                if draw >= first and (draw - first) % world == 0:
                    yield self.collate(rows), ""
                draw += 1


def lost(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """What was lost between two counts, in words; empty when nothing was."""
    more = {name: after[name] - before.get(name, 0) for name in COUNTS}
    return ", ".join(f"{count} {name}" for name, count in more.items() if count)
