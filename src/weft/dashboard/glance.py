"""What the list of runs wants of a log without reading its steps: how the run began, what it does, how it ended."""

from collections import deque
from pathlib import Path
from typing import Any

from weft.dashboard.tail import Tail, number, parsed

Record = dict[str, Any]
WHOLE = 8 << 20  # bytes of a log that is always read whole
HEAD, END = 64 << 10, 1 << 20  # bytes read of a longer one
A_STEP = b'"event": "step"'  # stands within the first letters of a step's line, as our own log writes it
STEPS = 64  # last ones that are kept


class Glance:
    """The events of a log but for its steps, of which the last few are kept; it is read on as it grows."""

    def __init__(self, log: Path) -> None:
        self._tail = Tail(log)
        self._whole = False
        self._forget()

    def _forget(self) -> None:
        self.first_time: float | None = None
        self.last_time: float | None = None
        self.begun: Record | None = None  # the last run_started
        self.ended: Record | None = None  # the last run_ended, unless something began after it
        self.phase: Record | None = None
        self.evaluations: list[Record] = []
        self.paused: list[tuple[float, float]] = []  # from, to; s since 1970
        self.stepped = False  # since the last phase began
        self._steps: deque[bytes] = deque(maxlen=STEPS)
        self._read: list[Record] | None = None  # the same as records

    @property
    def steps(self) -> list[Record]:
        """Records of the last steps since the model was ready."""
        if self._read is None:
            self._read = [record for record in map(parsed, self._steps) if record and type(record.get("step")) is int]
        return self._read

    @property
    def total_steps(self) -> int | None:
        total = self.begun.get("total_steps") if self.begun else None
        return total if type(total) is int else None

    def look(self, whole: bool) -> None:
        """Read what came since. whole: also what lies between the head and the end of a log that is long."""
        if whole and not self._whole and self._tail.offset:
            self._tail = Tail(self._tail.path)
            self._forget()
        if not self._tail.offset and not whole and _size(self._tail.path) > WHOLE:
            self._take(self._tail.read(HEAD).lines)
            self._tail.skip_to(_size(self._tail.path) - END)
        elif not self._tail.offset:
            self._whole = True
        while True:
            found = self._tail.read()
            if found.reset:
                self._forget()
            self._take(found.lines)
            if not found.more:
                return

    def _take(self, lines: list[bytes]) -> None:
        if lines:
            self._read = None
        for line in lines:
            if A_STEP in line[:80]:
                self._steps.append(line)
                self.stepped = True
            elif (record := parsed(line)) is not None:
                self._hear(record)
        if lines and (last := parsed(lines[-1])) is not None:
            self.last_time = max(last["time"], self.last_time or 0.0)

    def _hear(self, record: Record) -> None:
        at, kind = record["time"], record["event"]
        if self.first_time is None:
            self.first_time = at
        self.last_time = max(at, self.last_time or 0.0)
        if kind == "phase":
            self._enter(record)
        elif kind == "run_started" and type(record.get("step")) is int:
            self.begun, self.ended, self.paused = record, None, []
            self._steps.clear()  # by their place, not by their times: a clock may be set back
            self.evaluations = [one for one in self.evaluations if one["step"] <= record["step"]]
        elif kind == "run_ended":
            self.ended = record
        elif kind == "evaluated" and type(record.get("step")) is int and number(record.get("loss")) is not None:
            self.evaluations.append({name: record.get(name) for name in ("step", "loss", "baseline")})

    def _enter(self, record: Record) -> None:
        if self.phase is not None and self.phase.get("phase") == "paused":
            self.paused.append((self.phase["time"], record["time"]))
        if record.get("phase") == "starting":
            self.ended = None
        self.phase, self.stepped = record, False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
