"""The numbers of a run's steps in columns: what a resume cut off is gone, and what it repeats counts anew."""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy

from weft.dashboard.tail import number
from weft.dashboard.thinning import Floats, kept, smoothed

EPOCH = 1e8  # ends of a range above it are seconds since 1970, below it steps
PREFIXES = ("", "seconds/", "memory/", "speed/")
DIGITS = 7  # that are sent of a number


@dataclass
class Column:
    """One series: the records that have it, by their places in the steps, and its values there, NaN for a gap."""

    places: array = field(default_factory=lambda: array("i"))
    values: array = field(default_factory=lambda: array("d"))


def per_second(items: Any, seconds: Any) -> float | None:
    """How many items a second a step learned from; None where it does not say."""
    count, total = number(items), number(seconds.get("total")) if isinstance(seconds, dict) else None
    return count / total if count and total else None


class Curves:
    """Columns of one rank's log. A series is called as in the metrics, or `seconds/PART`. `memory/used` is bytes,
    `speed/items` items of all ranks per second, of text tokens."""

    def __init__(self) -> None:
        self.columns: dict[str, Column] = {}
        self._columns: dict[str, dict[str, Column]] = {prefix: {} for prefix in PREFIXES}  # without prefix
        self._steps, self._times = array("q"), array("d")
        self._ordered = True

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def names(self) -> list[str]:
        return sorted(name for name, column in self.columns.items() if column.places)

    @property
    def last_step(self) -> int | None:
        return max(self._steps) if not self._ordered else self._steps[-1] if self._steps else None

    def add(self, record: Mapping[str, Any]) -> bool:
        """Take in a step's record. False when it is none that can be drawn."""
        step, time, metrics = record.get("step"), number(record.get("time")), record.get("metrics")
        seconds = record.get("seconds")
        if type(step) is not int or not 0 <= step < 1 << 53 or time is None or not isinstance(metrics, dict):
            return False
        if self._steps and step <= self._steps[-1]:
            self._ordered = False
        place = len(self._steps)
        self._steps.append(step)
        self._times.append(time)
        self._put("", place, metrics)
        if isinstance(seconds, dict):
            self._put("seconds/", place, seconds)
        if (memory := number(record.get("memory"))) is not None:
            self._put("memory/", place, {"used": memory})
        if (speed := per_second(record.get("items"), seconds)) is not None:
            self._put("speed/", place, {"items": speed})
        return True

    def _put(self, prefix: str, place: int, values: Mapping[str, Any]) -> None:
        known = self._columns[prefix]
        for name, value in values.items():
            column = known.get(name)
            if column is None:
                column = known[name] = self.columns.setdefault(prefix + name, Column())
            column.places.append(place)
            column.values.append(value if type(value) is float else _float(value))

    def cut(self, step: int) -> bool:
        """Forget the steps beyond one, for a run that goes on from there. Whether there were any."""
        self.settle()
        keep = bisect_right(self._steps, step)
        if keep == len(self._steps):
            return False
        del self._steps[keep:], self._times[keep:]
        for column in self.columns.values():
            end = bisect_left(column.places, keep)
            del column.places[end:], column.values[end:]
        return True

    def settle(self) -> None:
        """Bring steps that came out of order into it; of those that came twice the later record stays."""
        if self._ordered:
            return
        steps = numpy.array(self._steps)
        order = numpy.argsort(steps, kind="stable")
        order = order[numpy.append(steps[order][1:] != steps[order][:-1], True)]
        place_of = numpy.full(len(steps), -1)
        place_of[order] = numpy.arange(len(order))
        self._times = array("d", numpy.array(self._times)[order].tobytes())
        self._steps = array("q", steps[order].astype(numpy.int64).tobytes())
        for column in self.columns.values():
            places, values = place_of[numpy.array(column.places)], numpy.array(column.values)
            sorting = numpy.argsort(places, kind="stable")
            sorting = sorting[places[sorting] >= 0]
            column.places = array("i", places[sorting].astype(numpy.int32).tobytes())
            column.values = array("d", values[sorting].tobytes())
        self._ordered = True

    def column(self, name: str) -> tuple[Floats, Floats, Floats]:
        """Steps, times (s since 1970) and values of a series; empty for one that is not there."""
        self.settle()
        column = self.columns.get(name, Column())
        places = numpy.array(column.places, dtype=numpy.intp)
        steps, times = numpy.array(self._steps, dtype=float), forward(numpy.array(self._times, dtype=float))
        values = numpy.array(column.values, dtype=float)
        values[~numpy.isfinite(values)] = numpy.nan
        return steps[places], times[places], values

    def drawn(self, name: str, start: float | None, end: float | None, points: int, beta: float) -> dict[str, list]:
        """A series within a range of steps (or of times), in at most so many points, as it is sent to a page."""
        steps, times, values = self.column(name)
        means = smoothed(values, beta)
        axis = times if max(abs(start or 0), abs(end or 0)) > EPOCH else steps
        inside = numpy.ones(len(axis), bool)
        if start is not None:
            inside &= axis >= start
        if end is not None:
            inside &= axis <= end
        steps, times, values, means = steps[inside], times[inside], values[inside], means[inside]
        chosen = kept(values, points)
        return {
            "steps": steps[chosen].astype(int).tolist(),
            "times": numpy.round(times[chosen], 3).tolist(),
            "values": plain(values[chosen]),
            "smoothed": plain(means[chosen]),
        }


def forward(times: Floats) -> Floats:
    """Times that never go back. Where a clock was set back, what came before it is moved back as far: the last clock
    counts, and no curve folds over itself."""
    back = numpy.minimum(numpy.diff(times), 0.0)
    if not back.any():
        return times
    return times + numpy.append(numpy.cumsum(back[::-1])[::-1], 0.0)


def plain(values: Floats) -> list[float | None]:
    """Numbers for JSON, in few digits; None for a gap."""
    return [float(f"{value:.{DIGITS}g}") if value == value else None for value in values.tolist()]


def _float(value: Any) -> float:
    """A number of another kind, NaN for what is none."""
    known = number(value)
    return numpy.nan if known is None else float(known)
