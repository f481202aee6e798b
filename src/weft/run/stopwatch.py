"""Seconds of a step by part."""

from collections.abc import Callable
from time import perf_counter


class Stopwatch:
    """Adds the time since the last lap to a named part. wait: called before each reading when parts run on a device
    that works ahead of the host; without it only the whole step is to be trusted there."""

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        self._wait = wait
        self._parts: dict[str, float] = {}
        self._last = self._start = perf_counter()

    def lap(self, part: str) -> None:
        if self._wait:
            self._wait()
        now = perf_counter()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Each part, and 'total' since the start."""
        return {**self._parts, "total": perf_counter() - self._start}
