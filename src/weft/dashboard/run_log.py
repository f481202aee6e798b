"""All that one rank's log says of a run, read on as it grows: curves, validations, samples, scores, what happened."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weft.dashboard.curves import Curves
from weft.dashboard.entries import Entry, entry_of
from weft.dashboard.samples import key_of
from weft.dashboard.tail import OFFSET_BITS, Tail, lines_after, number, parsed

ENTRIES = 200  # newest that are kept
KNOWN = ("phase", "notice", "run_started", "step", "incident", "evaluated", "sampled", "saved", "exported", "control",
         "scored", "run_ended")  # fmt: skip
EVALUATED = ("step", "time", "loss", "baseline", "by_time", "baseline_by_time", "by_expert", "items", "failed",
             "standard_error")  # fmt: skip
Record = dict[str, Any]


class RunLog:
    """One rank's log. Not safe for several threads: the store locks it."""

    def __init__(self, path: Path) -> None:
        self.tail = Tail(path)
        self._handlers: dict[str, Callable[[Record], None]] = {
            "step": self._step, "run_started": self._started, "evaluated": self._evaluated, "sampled": self._sampled,
            "scored": self._scored, "control": self._controlled,
        }  # fmt: skip
        self._forget()

    def _forget(self) -> None:
        self.curves = Curves()
        self.bad_lines = 0
        self.begun: Record | None = None
        self.evaluations: dict[int, Record] = {}
        self.samples: dict[tuple[Any, ...], Record] = {}
        self.scores: dict[tuple[str, str], Record] = {}  # (metric, after) -> the last that was told
        self.rates: list[Record] = []  # orders to change a learning rate that were followed
        self.resumes: list[dict[str, Any]] = []
        self.entries: deque[Entry] = deque(maxlen=ENTRIES)
        self._cuts: list[int] = []  # offsets before which a reader must not go on: something he has is void

    @property
    def damaged(self) -> int:
        return self.bad_lines + self.tail.overlong

    @property
    def position(self) -> int:
        return self.tail.position

    def update(self) -> bool:
        """Read one turn of what came since. Whether there is more."""
        found = self.tail.read()
        if found.reset:
            self._forget()
        for line in found.lines:
            self._take(line)
        return found.more

    def _take(self, line: bytes) -> None:
        record = parsed(line)
        if record is None:
            self.bad_lines += bool(line.strip())
            return
        handler = self._handlers.get(record["event"])
        if handler is not None:
            handler(record)
        if record["event"] != "step" and (entry := entry_of(record)) is not None:
            self.entries.append(entry)

    def _step(self, record: Record) -> None:
        self.bad_lines += not self.curves.add(record)

    def _started(self, record: Record) -> None:
        step = record.get("step")
        if type(step) is not int:
            self.bad_lines += 1
            return
        self.begun = record
        if step:
            self.resumes.append({"step": step, "time": record["time"]})
        if self.curves.cut(step) or any(kept > step for kept in self.evaluations):
            self._cuts.append(self.tail.offset)
        self.evaluations = {at: one for at, one in self.evaluations.items() if at <= step}
        self.samples = {key: one for key, one in self.samples.items() if _step_of(one) <= step}
        self.scores = {key: one for key, one in self.scores.items() if _step_of(one) <= step}

    def _evaluated(self, record: Record) -> None:
        if type(record.get("step")) is int:
            self.evaluations[record["step"]] = {name: _sound(name, record.get(name)) for name in EVALUATED}

    def _sampled(self, record: Record) -> None:
        if type(record.get("step")) is int:
            self.samples[key_of(record)] = record

    def _scored(self, record: Record) -> None:
        self.scores[str(record.get("metric")), str(record.get("after"))] = record

    def _controlled(self, record: Record) -> None:
        if record.get("command") == "rate" and record.get("done") and isinstance(record.get("arguments"), dict):
            self.rates.append(record)

    def after(self, position: int) -> tuple[int, list[Record], list[Entry]] | None:
        """The new position, the steps and the entries that came after one; None when it must be read anew."""
        offset = position & ((1 << OFFSET_BITS) - 1)
        found = lines_after(self.tail.path, position)
        if found is None or any(cut > offset for cut in self._cuts):
            return None
        records = [record for record in map(parsed, found[1]) if record is not None]
        steps = [_sent(record) for record in records if record["event"] == "step" and _is_step(record)]
        entries = [e for r in records if r["event"] != "step" and (e := entry_of(r)) is not None]
        return found[0], steps, entries


def _step_of(record: Record) -> int:
    return record["step"] if type(record.get("step")) is int else 0


def _is_step(record: Record) -> bool:
    return type(record.get("step")) is int and isinstance(record.get("metrics"), dict)


def _sent(record: Record) -> Record:
    """A step as it leaves: without the names of its items."""
    metrics = {name: number(value) for name, value in record["metrics"].items()}
    seconds = record.get("seconds")
    parts = {name: number(value) for name, value in seconds.items()} if isinstance(seconds, dict) else {}
    return {"step": record["step"], "time": record["time"], "metrics": metrics, "seconds": parts}


def _sound(name: str, value: Any) -> Any:
    """A field of a validation, of the kind that it should be."""
    if name in ("by_time", "baseline_by_time", "by_expert"):
        return {key: number(part) for key, part in value.items()} if isinstance(value, dict) else {}
    return number(value)
