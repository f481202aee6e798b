"""What hears the events of a run: the log in its folder, and the lines or the bar on the terminal."""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn

from weft import events
from weft.events import Event

PLAIN_SECONDS = 10.0  # between two lines of progress when the output is no terminal
SMOOTHING = 0.9  # share of the earlier mean that stays at each step


class EventLog:
    """Appends each event as one line of JSON with the time, and hands it to the system at once, so that a killed
    process loses nothing. Progress within a phase is not kept."""

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._now = now
        torn = path.is_file() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._file: TextIO = path.open("a")
        if torn:  # a process was killed within a line
            self._file.write("\n")

    def __call__(self, event: Event) -> None:
        if not isinstance(event, events.Progress):
            record = finite({"time": round(self._now(), 3), **event.record()})
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def finite(tree: Any) -> Any:
    """The same with null for numbers that are not finite, which JSON has no words for."""
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, Mapping):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return tree


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole event of a log; a line that was cut off by a kill, or that a disk has damaged, is no event."""
    for line in path.read_bytes().split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event


def read_steps(path: Path) -> dict[int, dict[str, Any]]:
    """Step -> its record. A resumed run repeats steps of the killed one: the later record counts, and steps beyond
    the last resume that were never repeated are not the run's."""
    steps: dict[int, dict[str, Any]] = {}
    for event in read_events(path):
        if event["event"] == "run_started":
            steps = {step: record for step, record in steps.items() if step <= event["step"]}
        elif event["event"] == "step":
            steps[event["step"]] = event
    return steps


class Eta:
    """Seconds left, from the pace of recent steps; the first steps of a process are slower and do not count, nor does
    a single one in which the process was held: a machine that slept, Ctrl-Z."""

    WARM_UP = 2
    HELD = 10  # times the pace; two such steps in a row are the new pace

    def __init__(self) -> None:
        self._pace: float | None = None
        self._seen = 0
        self._held = False

    def step(self, seconds: float) -> None:
        self._seen += 1
        self._held = self._pace is not None and seconds > self.HELD * self._pace and not self._held
        if self._seen > self.WARM_UP and not self._held:
            self._pace = seconds if self._pace is None else 0.9 * self._pace + 0.1 * seconds

    @property
    def pace(self) -> float | None:
        return self._pace

    def left(self, steps: int) -> float | None:
        return None if self._pace is None else self._pace * steps


class DataWait:
    """Which share of recent steps the loop spent waiting for its data, and the sentence when that is too much."""

    STEPS = 50
    LIMIT = 0.10  # of the steps' time

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque(maxlen=self.STEPS)  # seconds: for data, in total
        self._said = False

    def step(self, seconds: Mapping[str, float]) -> None:
        self._recent.append((seconds["data"], seconds["total"]))

    @property
    def share(self) -> float | None:
        """None before the first step."""
        total = sum(whole for _, whole in self._recent)
        return sum(waited for waited, _ in self._recent) / total if total else None

    def complaint(self) -> str | None:
        """A sentence, once, when so many steps have waited too long."""
        share = self.share
        if self._said or share is None or share <= self.LIMIT or len(self._recent) < self.STEPS:
            return None
        self._said = True
        return (
            f"the loop waits for data {share:.0%} of the time: the last {self.STEPS} steps waited "
            f"{sum(waited for waited, _ in self._recent):.1f} s for batches. With data.cache: disk all is encoded "
            "once and then only read; where that is set, and of streams and documents, which have none, the disk, the "
            "network or the free cores are too slow for these batches."
        )


class Losses:
    """The moving mean of each phase's loss: two experts that take turns are two curves."""

    def __init__(self) -> None:
        self.means: dict[str, float] = {}

    def step(self, metrics: Mapping[str, float | None]) -> tuple[str, float | None]:
        """Take in a step; its first phase and that one's loss, None where it was not finite."""
        found = {n.removesuffix("/loss"): value for n, value in metrics.items() if n.endswith("/loss")}
        for phase, loss in found.items():
            if loss is not None and math.isfinite(loss):
                mean = self.means.get(phase, loss)
                self.means[phase] = SMOOTHING * mean + (1 - SMOOTHING) * loss
        phase = next(iter(found), "")
        loss = found.get(phase)
        return phase, loss if loss is not None and math.isfinite(loss) else None

    def line(self) -> str:
        """The means in few words, under their phases' names when there are several."""
        named = len(self.means) > 1
        return (
            "  ".join(f"{phase} {mean:.4f}" if named else f"{mean:.4f}" for phase, mean in self.means.items()) or "--"
        )


def clock(seconds: float | None) -> str:
    """1:02:03, 2:03, or -- when it is not known."""
    if seconds is None:
        return "--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sentence(event: Event) -> str | None:
    """What a run says of an event, on the terminal and in its log; None of steps and phases, which each shows its own
    way."""
    if isinstance(event, events.Scored) and event.metric not in MAIN_SCORES:
        return None  # a row has seven numbers for each task; the log of events and the summary have them all
    tell = SENTENCES.get(type(event))
    return tell(event) if tell else None


def _run_started(event: events.RunStarted) -> str:
    origin = f", resumed from {event.resumed_from}" if event.resumed_from else ""
    return (
        f"training {event.name}: step {event.step} of {event.total_steps}, "
        f"{event.trainable:,} trainable parameters on {event.device}{origin}"
    )


def _evaluated(event: events.Evaluated) -> str:
    if event.loss is None:
        return f"step {event.step}: validation measured nothing, {event.failed} items failed"
    failed = f", {event.failed} items FAILED" if event.failed else ""
    each = ", ".join(f"{name} {loss:.4f}" for name, loss in event.by_expert.items())
    each = f" ({each})" if each else ""
    beside = "" if event.baseline is None else f", without the adapter {event.baseline:.4f}"
    return f"step {event.step}: validation loss {event.loss:.4f}{each}{beside} ({event.items} items{failed})"


def _controlled(event: events.Controlled) -> str:
    asked = " ".join([event.command, *(str(value) for value in event.arguments.values() if value is not None)])
    why = f": {event.reason}" if event.reason else ""
    return f"step {event.step}: {asked} ({event.by}) {'done' if event.done else 'refused'}{why}"


def _scored(event: events.Scored) -> str:
    scores = ", ".join(f"{name} {value:.4f}" for name, value in event.scores.items())
    return f"step {event.step}: after {event.after}, {event.metric}: {scores}"


MAIN_SCORES = ("accuracy", "micro_f1")
SENTENCES: Mapping[type[Event], Callable[[Any], str]] = {
    events.Notice: lambda event: event.text,
    events.RunStarted: _run_started,
    events.Evaluated: _evaluated,
    events.Incident: lambda event: (
        f"step {event.step}: {event.reason}; nothing was learned from it ({event.in_a_row} in a row)"
    ),
    events.Saved: lambda event: f"step {event.step}: saved {event.folder}",
    events.Sampled: lambda event: f"step {event.step}: sample {event.file}",
    events.Exported: lambda event: f"adapter: {event.folder}",
    events.Controlled: _controlled,
    events.Scored: _scored,
    events.RunEnded: lambda event: (
        f"{event.outcome} at step {event.step}" + (f": {event.reason}" if event.reason else "")
    ),
}


class Terminal:
    """A bar with phase, loss, speed and time left on a terminal; a plain line now and then elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._live = self.console.is_terminal
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"), console=self.console, transient=True,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._eta = Eta()
        self._wait = DataWait()
        self._losses = Losses()
        self._said = 0.0
        self._total = 0
        self._handlers: Mapping[type[Event], Callable[[Any], None]] = {
            events.PhaseStarted: self._phase,
            events.Progress: self._progress,
            events.RunStarted: self._run_started,
            events.StepEnded: self._step,
            events.RunEnded: lambda event: self.close(),
        }

    def __call__(self, event: Event) -> None:
        handler = self._handlers.get(type(event))
        if handler:
            handler(event)
        if text := sentence(event):
            self._say(text)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def _show(self, phase: str, done: int, total: int, note: str) -> None:
        if self._live:
            self._bar.start()
            if phase not in self._tasks:
                self._tasks[phase] = self._bar.add_task(phase, total=total, note="")
            self._bar.update(self._tasks[phase], description=phase, completed=done, total=total, note=note)
            if done >= total:
                self._bar.remove_task(self._tasks.pop(phase))
        elif done >= total or time.monotonic() - self._said >= PLAIN_SECONDS:
            self._said = time.monotonic()
            self._say(f"{phase} {done}/{total}  {note}".rstrip())

    def _phase(self, event: events.PhaseStarted) -> None:
        if event.total is None and not self._live:
            self._say(f"{event.phase} …")
        elif "training" in self._tasks:
            self._bar.update(self._tasks["training"], description=event.phase)

    def _progress(self, event: events.Progress) -> None:
        self._show(event.phase, event.done, event.total, event.note)

    def _run_started(self, event: events.RunStarted) -> None:
        self._total = event.total_steps

    def _step(self, event: events.StepEnded) -> None:
        self._losses.step(event.metrics)
        self._eta.step(event.seconds["total"])
        self._wait.step(event.seconds)
        pace = f"{self._eta.pace:.2f} s/step" if self._eta.pace else "warming up"
        left = clock(self._eta.left(self._total - event.step))
        self._show("training", event.step, self._total, f"loss {self._losses.line()}  {pace}  {left} left")
        if complaint := self._wait.complaint():
            self._say(complaint)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live:
            self._bar.stop()
