"""Scales of charts: round ticks, their labels, and the place of a value between them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

SIDE = 1000.0  # units of the drawing area in both directions; the page stretches it to its width
NICE = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Axis:
    """From a value to its place in the drawing. down: the place counts from the lower edge."""

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]
    log: bool = False
    down: bool = False

    @classmethod
    def across(cls, low: float, high: float, least: float) -> "Axis":
        """As long as the values; its ticks lie within, at distances of at least so much."""
        if low == high:
            low, high = low - 1, high + 1
        ticks = tuple(tick for tick in nice_ticks(low, high, 6, least) if low <= tick <= high)
        return cls(low, high, ticks, labels_of(ticks))

    @classmethod
    def up(cls, low: float, high: float, log: bool) -> "Axis":
        """From a tick to a tick around the values."""
        if log:
            ticks = log_ticks(low, high) if low < high else (low / 2, low, low * 2)
            return cls(min(low, ticks[0]), max(high, ticks[-1]), ticks, labels_of(ticks, alone=True), log, True)
        if low == high:
            low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
        ticks = nice_ticks(low, high, 5)
        return cls(ticks[0], ticks[-1], ticks, labels_of(ticks), log, True)

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log10(max(number, 1e-300)) for number in (value, low, high))
        share = (value - low) / (high - low)
        return SIDE * (1 - share if self.down else share)


def nice_ticks(low: float, high: float, about: int, least: float = 0.0) -> tuple[float, ...]:
    """Round numbers at even distances, not below the least: the first is at most low, the last at least high."""
    rough = max((high - low) / about, least)
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(nice * power for nice in NICE if nice * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / width + 1e-9), math.ceil(high / width - 1e-9)
    return tuple(round(i * width, 12 - math.floor(math.log10(width))) for i in range(first, last + 1))


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten from below low to above high; with 2 and 5 between them where there are few, thinned where many."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    if last - first > 2:
        stride = math.ceil((last - first) / 7)
        return tuple(10.0**power for power in range(first, last + stride, stride))
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    below = max(tick for tick in ticks if tick <= low * (1 + 1e-9))
    above = min((tick for tick in ticks if tick >= high * (1 - 1e-9)), default=ticks[-1])
    return tuple(float(f"{tick:.3g}") for tick in ticks if below <= tick <= above)


def labels_of(ticks: Sequence[float], alone: bool = False) -> tuple[str, ...]:
    """The ticks in as few signs as tell them apart. alone: each by itself, as on a log scale."""
    if alone:
        return tuple(_alone(tick) for tick in ticks)
    greatest = max(map(abs, ticks), default=0.0)
    for least, scale, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if greatest >= least:
            return tuple(f"{tick / scale:g}{unit}" if tick else "0" for tick in ticks)
    if 0 < greatest < 1e-3:
        return tuple(_alone(tick) for tick in ticks)
    width = min((b - a for a, b in pairwise(ticks)), default=greatest or 1.0)
    digits = max(0, -math.floor(math.log10(width) + 1e-9))
    return tuple(f"{tick:.{digits}f}" for tick in ticks)


def _alone(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e4:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:g}"
