"""The thinned history in a GPU's file, in columns: hundreds of runs are remembered at once, with 1000 points each."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from weft.dashboard.small_files import json_of
from weft.dashboard.tail import number
from weft.dashboard.thinning import Floats

COLUMNS = ("step", "time", "loss", "smoothed_loss", "lr", "seconds")


@dataclass(frozen=True)
class History:
    """Column -> values, NaN where there is none; phases: whose loss each point has."""

    columns: Mapping[str, Floats] = field(default_factory=lambda: {name: numpy.empty(0) for name in COLUMNS})
    phases: tuple[str, ...] = ()

    def points(self) -> list[dict[str, Any]]:
        """As in the file."""
        rows = zip(*(self.columns[name].tolist() for name in COLUMNS), strict=True)
        points = [{n: v if v == v else None for n, v in zip(COLUMNS, row, strict=True)} for row in rows]
        return [{**point, "step": int(point["step"])} for point in points if point["step"] is not None]

    def since(self, time: float) -> list[dict[str, Any]]:
        """step, time and seconds of the points that were made since a moment."""
        names = ("step", "time", "seconds")
        table = numpy.stack([self.columns[name] for name in names], axis=1)
        sound = table[numpy.isfinite(table).all(1) & (table[:, 1] >= time)]
        return [dict(zip(names, row, strict=True)) for row in sound.tolist()]

    def spark(self, count: int) -> list[float]:
        """At most so many values of the smoothed loss of the phase that was last, evenly thinned."""
        mine = numpy.array([phase == self.phases[-1] for phase in self.phases], dtype=bool)
        losses = self.columns["smoothed_loss"][mine]
        known = losses[numpy.isfinite(losses)]
        if len(known) > count:
            known = known[numpy.linspace(0, len(known) - 1, count).round().astype(int)]
        return [float(f"{loss:.4g}") for loss in known.tolist()]


def gpu_json_of(path: Path) -> dict[str, Any]:
    """A GPU's file, its history in columns."""
    facts = json_of(path)
    return {**facts, "history": history(facts.get("history"))} if facts else facts


def history(found: Any) -> History:
    points: Sequence[Mapping[str, Any]] = [p for p in found if isinstance(p, dict)] if isinstance(found, list) else []
    columns = {name: numpy.array([_float(point.get(name)) for point in points], dtype=float) for name in COLUMNS}
    return History(columns, tuple(sys.intern(str(point.get("phase"))) for point in points))


def _float(value: Any) -> float:
    known = number(value)
    return numpy.nan if known is None else float(known)
