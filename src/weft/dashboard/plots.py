"""Line charts as inline SVG of our own: sizes in percent, colours and fonts of the page, readable without a script."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeGuard

from weft.dashboard.scales import SIDE, Axis

TALL = 8.0  # how many times the 98th percentile a value must be for the scale to become logarithmic by itself
WHOLE = ("step", "task")  # of these there are no halves


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve. values: None or not finite is a gap. look: strong, faint (raw data), dashed, points, or
    marked: a line with its points.

    band: (lower, upper) for each value, drawn behind it.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float | None]
    colour: int = 1  # of --series-1 to --series-8
    look: str = "strong"
    band: Sequence[tuple[float, float] | None] = ()

    def finite(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in zip(self.steps, self.values, strict=True) if _is_number(y)]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What is drawn in one figure. scale: linear, log, or auto, which is log when a few values dwarf the rest."""

    title: str
    lines: Sequence[Line]
    unit: str = ""
    across: str = "step"
    scale: str = "auto"
    note: str = ""  # a sentence below the title
    from_zero: bool = False
    thin_to: int = 1200  # points of a curve that are drawn; each bucket keeps its least and its greatest
    rules: Sequence[float] = ()  # positions across of thin upright lines
    wide: bool = False  # over the whole width of the page


def figure(chart: Chart, number: int) -> str:
    """A <figure> with its drawing, legend and a description for those who do not see it. number: unique in the page."""
    lines = [line for line in chart.lines if line.finite()]
    if not lines:
        head = f"<figcaption>{escape(chart.title)}</figcaption>"
        return f'<figure class="chart">{head}<p class="none">No values.</p></figure>'
    log = _is_log(chart, lines)
    across, up = _axes(chart, lines, log)
    unit = " · ".join(part for part in (chart.unit, "log scale" if log else "") if part)
    parts = [
        f'<figure class="chart{" wide" if chart.wide else ""}">',
        f"<figcaption>{escape(chart.title)}{f' <small>{escape(unit)}</small>' if unit else ''}</figcaption>",
        f'<p class="note">{escape(chart.note)}</p>' if chart.note else "",
        _legend(chart, lines),
        f'<svg role="img" aria-labelledby="t{number} d{number}" class="plot">',
        f'<title id="t{number}">{escape(chart.title)}</title>',
        f'<desc id="d{number}">{escape(_description(chart, lines))}</desc>',
        *_grid(across, up),
        f'<svg viewBox="0 0 {SIDE:g} {SIDE:g}" preserveAspectRatio="none" width="100%" height="100%">',
        *(f'<path class="rule" d="M{across.place(x):.1f} 0V{SIDE:g}"/>' for x in chart.rules),
        *(drawn for line in lines for drawn in _drawn(line, across, up, chart.thin_to)),
        "</svg>",
        f'<text class="across" x="100%" y="100%" dy="34" text-anchor="end">{escape(chart.across)}</text>',
        "</svg></figure>",
    ]
    return "\n".join(part for part in parts if part)


def _axes(chart: Chart, lines: Sequence[Line], log: bool) -> tuple[Axis, Axis]:
    steps = [x for line in lines for x, _ in line.finite()] + list(chart.rules)
    values = [y for line in lines for _, y in line.finite()] + [0.0] * (chart.from_zero and not log)
    values += [y for line in lines for pair in line.band if pair for y in pair if y > 0 or not log]
    least = 1.0 if chart.across in WHOLE else 0.0
    return Axis.across(min(steps), max(steps), least), Axis.up(min(values), max(values), log)


def _is_log(chart: Chart, lines: Sequence[Line]) -> bool:
    values = sorted(y for line in lines for _, y in line.finite())
    if values[0] <= 0 or chart.scale == "linear":  # there is no logarithm of 0
        return False
    return chart.scale == "log" or values[-1] > TALL * values[int(0.98 * (len(values) - 1))]


# ---- Marks --------------------------------------------------------------------------------------------------------


def thinned(points: Sequence[tuple[float, float | None]], most: int) -> list[tuple[float, float | None]]:
    """At most about so many points: of each bucket the least and the greatest, in their order, and one gap if any."""
    if len(points) <= most:
        return list(points)
    kept: list[tuple[float, float | None]] = []
    size = len(points) / max(1, most // 3)
    for i in range(max(1, most // 3)):
        bucket = range(round(i * size), round((i + 1) * size))
        numbers = [(y, j) for j in bucket if _is_number(y := points[j][1])]
        gap = [j for j in bucket if not _is_number(points[j][1])][:1]
        kept += [points[j] for j in sorted({*gap, *(j for _, j in (min(numbers), max(numbers)))} if numbers else gap)]
    return kept


def _drawn(line: Line, across: Axis, up: Axis, most: int) -> list[str]:
    colour = _colour(line)
    points = thinned(list(zip(line.steps, line.values, strict=True)), most)
    runs: list[list[str]] = [[]]
    for x, y in points:
        if _is_number(y) and not (up.log and y <= 0):
            runs[-1].append(f"{across.place(x):.1f} {up.place(y):.1f}")
        elif runs[-1]:
            runs.append([])
    drawn = _band(line, across, up, colour)
    alone = [run[0] for run in runs if len(run) == 1]
    whole = [run for run in runs if len(run) > 1]
    if whole and line.look != "points":
        look = "strong" if line.look == "marked" else line.look
        drawn.append(f'<path class="{look} {colour}" d="{"".join("M" + "L".join(run) for run in whole)}"/>')
    dots = [place for run in runs for place in run] if line.look in ("points", "marked") else alone
    if dots:  # a line of no length with round ends is a dot, and stays round however the page stretches the drawing
        drawn.append(f'<path class="dots {colour}" d="{"".join(f"M{place}h0" for place in dots)}"/>')
    return drawn


def _band(line: Line, across: Axis, up: Axis, colour: str) -> list[str]:
    pairs = zip(line.steps, line.band, strict=True) if line.band else ()
    known = [(across.place(x), up.place(pair[0]), up.place(pair[1])) for x, pair in pairs if pair]
    if len(known) < 2:
        return [f'<path class="whisker {colour}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>' for x, low, high in known]
    outline = [f"{x:.1f} {high:.1f}" for x, _, high in known] + [f"{x:.1f} {low:.1f}" for x, low, _ in reversed(known)]
    return [f'<path class="band {colour}" d="M{"L".join(outline)}Z"/>']


def _grid(across: Axis, up: Axis) -> list[str]:
    drawn = []
    for tick, label in zip(up.ticks, up.labels, strict=True):
        y = f"{up.place(tick) / SIDE:.2%}"
        drawn.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        drawn.append(f'<text x="-8" y="{y}" dy="4" text-anchor="end">{label}</text>')
    for tick, label in zip(across.ticks, across.labels, strict=True):
        x = f"{across.place(tick) / SIDE:.2%}"
        drawn.append(f'<text x="{x}" y="100%" dy="18" text-anchor="middle">{label}</text>')
    return drawn


def _legend(chart: Chart, lines: Sequence[Line]) -> str:
    marks = [(line.name, line.look.replace("marked", "strong"), _colour(line)) for line in lines]
    marks += [("resumed", "rule", "")] if chart.rules else []
    rows = []
    for name, look, colour in marks if len(marks) > 1 else ():
        look, d = ("dots", "M8 5h0") if look == "points" else (look, "M0 5H16")
        mark = f'<path class="{look} {colour}" d="{d}"/>'
        rows.append(f'<li><svg width="16" height="10" aria-hidden="true">{mark}</svg>{escape(name)}</li>')
    return f'<ul class="legend">{"".join(rows)}</ul>' if rows else ""


def _colour(line: Line) -> str:
    return f"s{(line.colour - 1) % 8 + 1}"


def _description(chart: Chart, lines: Sequence[Line]) -> str:
    told = []
    for line in lines:
        points = line.finite()
        values = [y for _, y in points]
        (first, begin), (last, end) = points[0], points[-1]
        told.append(
            f"{line.name}: {begin:.4g} at {chart.across} {first:g}, {end:.4g} at {last:g}; "
            f"between {min(values):.4g} and {max(values):.4g}."
        )
    return " ".join(told)


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
