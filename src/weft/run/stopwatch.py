"""Seconds of a step by part, read when the step is long over: a device that works ahead of the host is not stopped."""

from collections.abc import Callable
from time import perf_counter

import torch

Mark = float | torch.cuda.Event


class Stopwatch:
    """Adds the time since the last lap to a named part.

    On a GPU a lap is an event among its work, so that parts are the device's own time, and waiting for data is what it
    waited; `seconds` may then be asked when the device has come so far. wait: called before each reading of the host's
    clock, where the device is waited for in its place; without it only the whole step is to be trusted on other devices
    that work ahead.
    """

    def __init__(self, wait: Callable[[], None] | None = None, device: torch.device | None = None) -> None:
        self._wait = wait
        self._by_events = device is not None and device.type == "cuda" and wait is None
        self._laps: list[tuple[str, Mark]] = []
        self._start = self._now()
        self._end: Mark | None = None

    def _now(self) -> Mark:
        if self._by_events:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        if self._wait:
            self._wait()
        return perf_counter()

    def lap(self, part: str) -> None:
        self._laps.append((part, self._now()))

    def stop(self) -> None:
        """The step ends here."""
        self._end = self._now()

    def seconds(self) -> dict[str, float]:
        """Each part, and 'total' from the start to where it was stopped, or until now."""
        end = self._now() if self._end is None else self._end
        parts: dict[str, float] = {}
        last = self._start
        for part, mark in self._laps:
            parts[part] = parts.get(part, 0.0) + between(last, mark)
            last = mark
        return {**parts, "total": between(self._start, end)}


def between(first: Mark, second: Mark) -> float:
    """Seconds from one mark to another."""
    if isinstance(first, float) and isinstance(second, float):
        return second - first
    assert isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event)
    return first.elapsed_time(second) / 1000


class Unmeasured(Stopwatch):
    """Of work that is being recorded: its parts come later, all in one."""

    def _now(self) -> Mark:
        return 0.0
