"""Tokenised text on disk or in memory: one flat array for each source, made once and mapped by whoever trains."""

import hashlib
import json
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy

from weft.data.conversations import Conversation, Reader, Unfit
from weft.data.tapes import Row, Tape
from weft.data.templates import Template
from weft.durable import write_folder

ROWS_AT_ONCE = 256
ROWS_ALONE = 2048  # before other processes are started: importing what they need takes longer than so many rows


@dataclass(frozen=True)
class Text:
    """One text to train on. digest: of the conversation that it shows; several texts can show one."""

    key: str
    digest: str
    ids: numpy.ndarray  # (n,) int32
    learned: numpy.ndarray  # (n,) bool
    stops: bool = True
    further: bool = False  # not the first of its conversation


@dataclass(frozen=True)
class Unreadable:
    """A row that gives no text, and why, with its place."""

    key: str
    reason: str


@dataclass(frozen=True)
class Making:
    """How rows become texts."""

    reader: Reader
    template: Template
    system: str

    def texts(self, rows: Sequence[Row]) -> list[Text | Unreadable]:
        """The texts of rows, or what is wrong with them, in order."""
        made: list[Text | Unreadable] = []
        waiting: list[tuple[int, str, str, int, Any]] = []
        for row in rows:
            try:
                if row.problem:
                    raise Unfit(row.problem)
                said = self.reader.conversation(row.value)
                shown = self.template.rendered(said.led_by(self.system))
            except Unfit as unfit:
                made.append(Unreadable(row.key, f"{row.place}: {unfit}" if row.place else str(unfit)))
                continue
            for number, text in enumerate(shown):
                waiting.append((len(made), f"{row.key}@{number}" if number else row.key, digest_of(said), number, text))
                made.append(Unreadable(row.key, ""))
        encoded = self.template.encoded([text for *_, text in waiting]) if waiting else []
        for (place, key, digest, number, _), each in zip(waiting, encoded, strict=True):
            if not len(each.ids):
                made[place] = Unreadable(key, f"{key}: it gives no token.")
                continue
            made[place] = Text(key, digest, each.ids, each.learned, each.stops, further=number > 0)
        return made

    def of(self, tapes: Iterable[Tape], take: int | None = None, workers: int = 1) -> Iterator[list[Text | Unreadable]]:
        """All that tapes give, some rows at a time. take: so many rows at most. workers: processes, of many rows."""
        rows = islice((row for tape in tapes for row in tape.rows({})), take)
        few = islice(rows, ROWS_ALONE if workers > 1 else None)
        yield from map(self.texts, in_chunks(few))
        if workers > 1 and (chunk := list(islice(rows, ROWS_AT_ONCE))):
            yield from self._by_processes(chunk, in_chunks(rows), workers)

    def _by_processes(
        self, first: list[Row], rest: Iterator[list[Row]], workers: int
    ) -> Iterator[list[Text | Unreadable]]:
        # Not forked: threads of torch and of the tokenizer are running here.
        with ProcessPoolExecutor(workers, get_context("spawn"), _take_over, (self,)) as pool:
            at_work: deque[Future[list[Text | Unreadable]]] = deque([pool.submit(_texts, first)])
            for chunk in rest:
                at_work.append(pool.submit(_texts, chunk))
                if len(at_work) > 2 * workers:
                    yield at_work.popleft().result()
            while at_work:
                yield at_work.popleft().result()


_making: list[Making] = []  # of a worker process, which has no other way to keep what it was started with


def _take_over(making: Making) -> None:
    _making[:] = [making]


def _texts(rows: Sequence[Row]) -> list[Text | Unreadable]:
    return _making[0].texts(rows)


def in_chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        yield chunk


def digest_of(said: Conversation) -> str:
    """A hash of what is said, which is the same in whatever file it stands."""
    whole = json.dumps([said.messages, said.tools, said.text], sort_keys=True, default=str)
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:24]


@dataclass(frozen=True)
class Corpus:
    """The texts of one source. ids (T,) int32 and learned (T,) bool of all; text i is [starts[i], starts[i + 1])."""

    ids: numpy.ndarray
    learned: numpy.ndarray
    starts: numpy.ndarray  # (n + 1,) int64
    keys: Sequence[str]
    digests: Sequence[str]
    unreadable: tuple[Unreadable, ...] = ()
    endless: int = 0  # texts whose turns end in no special token
    further: int = 0  # texts beyond the first of their conversation

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def lengths(self) -> numpy.ndarray:
        return numpy.diff(self.starts)

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.learned.nbytes

    def text(self, number: int) -> Text:
        own = slice(self.starts[number], self.starts[number + 1])
        return Text(self.keys[number], self.digests[number], self.ids[own], self.learned[own])


def collected(made: Iterable[Sequence[Text | Unreadable]]) -> Corpus:
    """A corpus in memory."""
    found = [each for some in made for each in some]
    texts = [each for each in found if isinstance(each, Text)]
    return Corpus(
        ids=numpy.concatenate([numpy.zeros(0, numpy.int32), *(text.ids for text in texts)]),
        learned=numpy.concatenate([numpy.zeros(0, bool), *(text.learned for text in texts)]),
        starts=numpy.cumsum([0, *(len(text.ids) for text in texts)], dtype=numpy.int64),
        keys=[text.key for text in texts],
        digests=[text.digest for text in texts],
        unreadable=tuple(each for each in found if isinstance(each, Unreadable)),
        endless=sum(not text.stops for text in texts),
        further=sum(text.further for text in texts),
    )


def write_corpus(folder: Path, made: Iterable[Sequence[Text | Unreadable]]) -> None:
    """Write a corpus: ids.bin, learned.bin and index.json. No more than some rows are in memory at a time."""

    def fill(draft: Path) -> None:
        counts = {"endless": 0, "further": 0}
        index: dict[str, Any] = {"lengths": [], "keys": [], "digests": [], "unreadable": [], **counts}
        sums = {"ids": 0, "learned": 0}
        with (draft / "ids.bin").open("wb") as ids, (draft / "learned.bin").open("wb") as learned:
            for some in made:
                for each in some:
                    if isinstance(each, Unreadable):
                        index["unreadable"].append([each.key, each.reason])
                        continue
                    for name, file, array in (("ids", ids, each.ids), ("learned", learned, each.learned)):
                        sums[name] = zlib.crc32(array.tobytes(), sums[name])
                        file.write(array.tobytes())
                    index["lengths"].append(len(each.ids))
                    index["keys"].append(each.key)
                    index["digests"].append(each.digest)
                    index["endless"] += not each.stops
                    index["further"] += each.further
        whole = {**index, "crc32": sums}
        (draft / "index.json").write_text(json.dumps({**whole, "index_crc32": _checksum(whole)}))

    write_folder(folder, fill)


def read_corpus(folder: Path) -> Corpus | None:
    """A corpus whose arrays are mapped; None when it is not there, torn, or not what was written."""
    try:
        index = json.loads((folder / "index.json").read_text())
        said = index.pop("index_crc32")
        starts = numpy.cumsum([0, *index["lengths"]], dtype=numpy.int64)
        arrays = {}
        for name, dtype in (("ids", numpy.int32), ("learned", numpy.bool_)):
            path = folder / f"{name}.bin"
            if path.stat().st_size != starts[-1] * numpy.dtype(dtype).itemsize:
                return None
            # An empty file cannot be mapped.
            arrays[name] = numpy.memmap(path, dtype, "r") if starts[-1] else numpy.zeros(0, dtype)
            if zlib.crc32(arrays[name]) != index["crc32"][name]:
                return None
        if said != _checksum(index):
            return None
    except (OSError, ValueError, KeyError, TypeError):  # all that a damaged index can raise
        return None
    return Corpus(
        arrays["ids"], arrays["learned"], starts, index["keys"], index["digests"],
        tuple(Unreadable(key, reason) for key, reason in index["unreadable"]), index["endless"], index["further"],
    )  # fmt: skip


def _checksum(index: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(index).encode())
