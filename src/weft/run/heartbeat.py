"""heartbeat.rank{N}.json: every two seconds a rank says that its process lives, and when its main thread last moved.

Two things are told apart so: a process that is gone beats no more, and one that is stuck beats on while `progress`
stands still. No torch here, for the dashboard reads these files too.
"""

import json
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event as Flag
from threading import Thread
from typing import Any, Self

from weft import events
from weft.durable import HALF_WRITTEN
from weft.events import Event
from weft.run.folder import born, is_alive

FORMAT = 1
EVERY = 2.0  # seconds between two beats
STEM = "heartbeat.rank"
REQUIRED = ("pid", "host", "rank", "time", "progress", "phase")
# Here minutes can pass before there is a unit to count: weights are read, prompts encoded, tensors copied.
UNCOUNTED = ("starting", "caching", "sampling", "saving")
BUSY = 0.01  # share of one core's time: less is a process that only waits


@dataclass(frozen=True)
class Doing:
    """What the main thread is at; replaced as a whole, since another thread reads it."""

    phase: str
    done: int | None = None
    total: int | None = None


class Heartbeat:
    """Hears a run's events, and a sign of each micro-batch, in the main thread; a thread of its own writes the file."""

    def __init__(self, run: Path, rank: int = 0, world: int = 1, every: float | None = None) -> None:
        self.path = run / f"{STEM}{rank}.json"
        self._draft = run / f"{HALF_WRITTEN}{self.path.name}"
        self._every = EVERY if every is None else every
        self._who = {"pid": os.getpid(), "born": born(os.getpid()), "host": platform.node(), "rank": rank,
                     "world": world}  # fmt: skip
        self._doing = Doing("starting")
        self._step, self._steps = 0, None
        self._slowest: dict[str, float] = {}  # by phase: what is usual in the second validation, the first has shown
        self._signed = time.monotonic()  # by the main thread alone
        self._worked, self._spent = self._signed, time.process_time()  # both by the beating thread alone
        self._ended = Flag()
        self._thread = Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.path.unlink(missing_ok=True)

    def sign(self) -> None:
        """The main thread has come one piece further."""
        now, phase = time.monotonic(), self._doing.phase
        if now - self._signed > self._slowest.get(phase, 0.0):
            self._slowest[phase] = now - self._signed
        self._signed = now

    def micro_batch(self) -> None:
        """The main thread has learned from a micro-batch: whatever was told before it, now it trains."""
        self.sign()
        self._train()

    def __call__(self, event: Event) -> None:
        self.sign()
        doing = self._doing
        match event:
            case events.PhaseStarted():
                self._doing = Doing(event.phase, 0 if event.phase in UNCOUNTED and event.total else None,
                                    event.total if event.phase in UNCOUNTED else None)  # fmt: skip
            case events.Progress():
                # Not its note: that names an item of the training data, and a beat is for all to see.
                self._doing = Doing(event.phase, event.done, event.total)
            case events.Sampled() if doing.phase == "sampling":
                self._doing = Doing("sampling", (doing.done or 0) + 1, doing.total)
            case events.RunStarted():
                self._step, self._steps = event.step, event.total_steps
            case events.StepEnded():
                self._step = event.step
                self._train()

    def _train(self) -> None:
        if self._doing.phase != "training":
            self._doing = Doing("training")

    def record(self) -> dict[str, Any]:
        """The beat as it is written. time, progress: seconds since 1970, the second counted back from the first, so
        that a clock that is set meanwhile moves both."""
        doing, now = self._doing, time.time()
        silent = time.monotonic() - max(self._signed, self._worked)
        return {
            "format": FORMAT,
            **self._who,
            "time": round(now, 3),
            "every": self._every,
            "progress": round(now - silent, 3),
            "phase": doing.phase,
            "step": self._step,
            "total_steps": self._steps,
            "done": doing.done,
            "total": doing.total,
            "slowest": round(self._slowest.get(doing.phase, 0.0), 3),
        }

    def write(self) -> None:
        """Replace the file. Not forced to the disk: after a power cut there is nobody whose beat would count."""
        self._draft.write_text(json.dumps(self.record()))
        self._draft.replace(self.path)

    def _beat(self) -> None:
        while True:
            self._look_at_work()
            # A full disk or a server that is away must not end the training from here. The next beat tries again; the
            # main thread meets the same in its own files, where it is told; and readers see an old beat.
            with suppress(OSError):
                self.write()
            if self._ended.wait(self._every):
                return

    def _look_at_work(self) -> None:
        """Where nothing can be counted yet, the processor's time is the sign: who waits for a pipe, a lock or another
        rank uses none."""
        spent, doing = time.process_time() - time.thread_time(), self._doing  # without this thread's own
        if doing.phase in UNCOUNTED and not doing.done and spent - self._spent > BUSY * self._every:
            self._worked = time.monotonic()
        self._spent = spent


def read_heartbeats(run: Path) -> dict[int, dict[str, Any]]:
    """Rank -> its last beat, living or not. Files that are half there, or none of ours, are left out."""
    found = {}
    for path in run.glob(f"{STEM}*.json"):
        beat = _read(path)
        if beat is not None:
            found[beat["rank"]] = beat
    return dict(sorted(found.items()))


def remove_stale(run: Path) -> None:
    """Delete the beats of an earlier start, which may have had more ranks. To be called before any rank of this start
    beats; a process that still lives on this machine keeps its own."""
    for path in run.glob(f"{STEM}*.json"):
        beat = _read(path)
        if beat is None or not _lives_here(beat):
            path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        beat = json.loads(path.read_text())
    except (OSError, ValueError):  # ended meanwhile, or cut off by a power cut
        return None
    return beat if isinstance(beat, dict) and all(name in beat for name in REQUIRED) else None


def _lives_here(beat: Mapping[str, Any]) -> bool:
    return beat["host"] == platform.node() and is_alive(beat["pid"], beat.get("born"))
