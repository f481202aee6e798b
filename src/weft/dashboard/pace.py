"""How long a run will still take: at the pace of the clock on the wall, for validation and saving take time, too."""

from collections.abc import Mapping, Sequence
from typing import Any

from weft.dashboard.tail import number

WARM_UP = 2  # steps of a process that are slower than the rest


def eta(points: Sequence[Mapping[str, Any]], paused: Sequence[tuple[float, float]], recent: float | None,
        left: int) -> float | None:  # fmt: skip
    """Seconds left, None while nothing can be said.

    points: step, time and seconds of steps of this process, in order, evenly thinned or not. recent: seconds of a step
    lately. What the wall clock counted beyond the steps, pauses aside, will be needed for the coming steps alike.
    """
    if left <= 0:
        return 0.0
    if recent is None or len(points) <= WARM_UP:
        return None
    return left * (recent + overhead(points, paused))


def overhead(points: Sequence[Mapping[str, Any]], paused: Sequence[tuple[float, float]]) -> float:
    """Seconds a step that went by between the steps: in validation, samples, checkpoints."""
    first, last = points[0], points[-1]
    steps = last["step"] - first["step"]
    if steps <= 0:
        return 0.0
    waited = sum(min(end, last["time"]) - start for start, end in paused if first["time"] <= start < last["time"])
    wall = last["time"] - first["time"] - waited
    within = [point["seconds"] for point in points[1:]]  # the first point's own time is before the interval
    return max(0.0, wall / steps - sum(within) / len(within))


def points_of_steps(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """step, time and seconds of the records of steps."""
    found = []
    for record in records:
        seconds = record.get("seconds")
        total = number(seconds.get("total")) if isinstance(seconds, dict) else None
        if total is not None:
            found.append({"step": record["step"], "time": record["time"], "seconds": total})
    return found
