"""run.rank{N}.log: what a run says, a line each with its time, and how its process ended when it ended badly.

`2026-11-21 15:27:32 info  training zorp: step 0 of 400, ...`; the level is info, warn or bad. Lines without a time go
on with the one above them: tracebacks, and what faulthandler writes when C code crashes or SIGUSR1 asks for it. Nothing
of the training data stands here, and no values of variables.
"""

import faulthandler
import os
import re
import signal
import time
import traceback
from collections.abc import Iterable
from io import FileIO
from pathlib import Path

from weft import events
from weft.errors import WeftError
from weft.events import Event
from weft.run.listeners import sentence

OF_ITS_OWN = (events.RunStarted, events.Incident, events.RunEnded)  # what a rank says that does not speak for the run
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (info|warn|bad) ")
CRASHED = "Fatal Python error"  # how faulthandler begins when a process dies of a signal


class RunLog:
    """Hears a rank's events and appends to its log. Only one is open in a process at a time, for the crash handler of a
    process has one file."""

    def __init__(self, run: Path, rank: int = 0) -> None:
        self.path = run / f"run.rank{rank}.log"
        self._rank = rank
        # Without a buffer: a line that a full disk refuses must not come up again when the file is closed.
        self._file: FileIO = self.path.open("ab", buffering=0)
        # Who has switched it on before us (python -X faulthandler, a test) wants its words elsewhere.
        self._catches = not faulthandler.is_enabled()
        self._answers = os.name == "posix" and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
        if self._catches:
            faulthandler.enable(self._file)
        if self._answers:
            faulthandler.register(signal.SIGUSR1, self._file)

    def __call__(self, event: Event) -> None:
        if self._rank and not isinstance(event, OF_ITS_OWN):
            return
        text = said_of_phase(event) if isinstance(event, events.PhaseStarted) else sentence(event)
        if text:
            self._write(level_of(event), text)

    def failed(self, error: BaseException) -> None:
        """Where an error came from that nobody had foreseen; of one that the user can mend the run's end says all."""
        if not isinstance(error, WeftError):
            self._write("bad", "".join(traceback.format_exception(error)))

    def _write(self, level: str, text: str) -> None:
        first, *more = text.rstrip("\n").split("\n")
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = [f"{stamp} {level:<4} {first}", *(f"  {line}" for line in more)]
        self._file.write(("\n".join(lines) + "\n").encode("utf-8", errors="replace"))

    def close(self) -> None:
        """Give back the signals before the file that they write to is gone."""
        if self._answers:
            faulthandler.unregister(signal.SIGUSR1)
        if self._catches:
            faulthandler.disable()
        self._file.close()


def said_of_phase(event: events.PhaseStarted) -> str:
    """The phase, and how much is ahead."""
    return event.phase if event.total is None else f"{event.phase}, {event.total} to do"


def level_of(event: Event) -> str:
    """info, warn (something to look at) or bad (the run ended by it)."""
    match event:
        case events.RunEnded(outcome="failed"):
            return "bad"
        case events.Notice() | events.Incident():
            return "warn"
        case events.Evaluated() if event.failed or event.loss is None:
            return "warn"
        case events.Controlled() if not event.done:
            return "warn"
    return "info"


def levelled(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Each line of a run's log with its level."""
    found, level = [], "info"
    for line in lines:
        if stamped := LINE.match(line):
            level = stamped[1]
        elif line.startswith(CRASHED):
            level = "bad"
        found.append((line, level))
    return found
