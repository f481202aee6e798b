"""Figures of continual runs: the matrix as a heat map, scores over the tasks with intervals, reliability."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from weft.dashboard.continual import Experiment, mean_matrix
from weft.dashboard.plots import Chart, Line, figure
from weft.dashboard.report_parts import Html, folded, number, paragraph, safe, table
from weft.math.calibration import Bin, of_classes, of_labels, reliability
from weft.math.intervals import Interval, t_interval
from weft.run.score_table import Scored

CELL_WIDTH, CELL_HEIGHT, HEADS = 58, 30, 150  # pixels: a cell, and the names of experiences
PALEST, FULLEST = 0.05, 0.5  # opacities between which numbers on cells are read well
LONGEST = 20  # letters of a name
QUIET = 8  # the colour of what is there for comparison
FIRST = 2000  # number of the first of these figures in a page
Of = Callable[[Scored, str, Sequence[str]], Mapping[float, float]]  # a run, a metric, tasks -> place across -> value


def matrix_map(experiences: Sequence[str], tasks: Sequence[str], values: np.ndarray, title: str, low: float,
               high: float) -> Html:  # fmt: skip
    """Rows after learning, columns measured on, the stronger the larger; what was just learned has an edge. values:
    (experiences, tasks), nan where nothing was measured. low, high: of the palest and of the fullest colour."""
    width, height = HEADS + CELL_WIDTH * len(tasks), CELL_HEIGHT * (len(experiences) + 1)
    drawn = [_text(HEADS + CELL_WIDTH * (j + 0.5), 18, _short(task), "middle") for j, task in enumerate(tasks)]
    for i, experience in enumerate(experiences):
        y = CELL_HEIGHT * (i + 1)
        drawn.append(_text(HEADS - 8, y + 19, _short(experience), "end"))
        for j, task in enumerate(tasks):
            drawn.append(_cell(HEADS + CELL_WIDTH * j, y, float(values[i, j]), low, high, experience, task))
    size = f'width="{width}" viewBox="0 0 {width} {height}"'
    told = paragraph(f"{title}. Rows: after learning; columns: measured on.", "quiet")
    shown = f'<svg class="heat scores" role="img" aria-label="{safe(title)}" {size}>{"".join(drawn)}</svg>'
    return Html(f"{shown}{told}")


def _cell(x: float, y: float, value: float, low: float, high: float, experience: str, task: str) -> str:
    told = f"<title>{safe(f'after {experience}, on {task}: {number(value)}')}</title>"
    share = 0.0 if not np.isfinite(value) or high <= low else (value - low) / (high - low)
    opacity = PALEST + (FULLEST - PALEST) * min(max(share, 0.0), 1.0)
    edge = ' class="own"' if experience == task else ""
    box = f'<rect{edge} x="{x + 1}" y="{y + 1}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}"'
    text = _text(x + CELL_WIDTH / 2, y + 19, number(value, 3), "middle", "value")
    return f'{box} fill-opacity="{opacity:.3f}">{told}</rect>{text}'


def _text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    return f'<text{f" class={kind!r}" if kind else ""} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{safe(words)}</text>'


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


# ---- Experiments --------------------------------------------------------------------------------------------------


def matrices(experiments: Sequence[Experiment], metric: str | None) -> Iterator[Html]:
    """The mean matrix of each experiment, all in one scale of colours."""
    found = [(one, *mean_matrix(one, one.metric(metric))) for one in experiments]
    known = np.concatenate([values[np.isfinite(values)] for *_, values in found] or [np.zeros(0)])
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    for one, experiences, tasks, values in found:
        runs = len(one.runs)
        of = f"mean of {runs} seeds" if runs > 1 else "one seed"
        title = f"{one.name}: {one.metric(metric)}, {of}"
        yield Html(f"<h3>{safe(one.name)}</h3>{matrix_map(experiences, tasks, values, title, low, high)}")


def over_tasks(experiments: Sequence[Experiment], metric: str | None) -> Html:
    """Two charts with the intervals over seeds: each task at the end, and the mean of what was learned as it grew."""
    tasks = experiments[0].runs[0].scored.tasks
    named = experiments[0].metric(metric)
    charts = [
        Chart(title=f"{named} on each task at the end", lines=[*_lines(experiments, metric, tasks, _at_the_end)],
              across="task", scale="linear", note=_note(experiments, tasks)),
        Chart(title=f"Mean {named} of what was learned so far", lines=[*_lines(experiments, metric, tasks, _so_far)],
              across="task", scale="linear", note=_note(experiments, tasks)),
    ]  # fmt: skip
    drawn = "\n".join(figure(chart, FIRST + i) for i, chart in enumerate(charts))
    return Html(f'<div class="charts">{drawn}</div>')


def _lines(experiments: Sequence[Experiment], metric: str | None, tasks: Sequence[str], of: Of) -> Iterator[Line]:
    for colour, one in enumerate(experiments, 1):
        each = [of(run.scored, one.metric(metric), tasks) for run in one.runs]
        found = {x: t_interval(known) for x in places(tasks) if (known := [run[x] for run in each if x in run])}
        points = [(x, interval) for x, interval in found.items() if interval is not None]
        yield Line(
            name=one.name, steps=[x for x, _ in points], values=[interval.mean for _, interval in points],
            band=[_edges(interval) for _, interval in points], colour=colour, look="marked",
        )  # fmt: skip


def _edges(interval: Interval) -> tuple[float, float] | None:
    return None if interval.half is None else (interval.mean - interval.half, interval.mean + interval.half)


def _at_the_end(scored: Scored, metric: str, tasks: Sequence[str]) -> Mapping[float, float]:
    matrix = scored.matrix(metric)
    place = dict(zip(tasks, places(tasks), strict=True))
    known = {name: value for name, value in zip(matrix.tasks, matrix.last, strict=True) if np.isfinite(value)}
    return {place[name]: value for name, value in known.items() if name in place}


def _so_far(scored: Scored, metric: str, tasks: Sequence[str]) -> Mapping[float, float]:
    matrix = scored.matrix(metric)
    place = dict(zip(tasks, places(tasks), strict=True))
    ends = [(name if name in place else tasks[-1], i) for i, name in enumerate(matrix.experiences)]
    return {place[name]: value for name, i in ends if (value := matrix.average(i)) is not None}


def places(tasks: Sequence[str]) -> list[float]:
    """Where tasks stand in a chart: years at their numbers, others one after the other from 1 on."""
    years = [float(task) for task in tasks if task.isdecimal() and len(task) == 4]
    return years if len(years) == len(tasks) else [float(i) for i in range(1, len(tasks) + 1)]


def _note(experiments: Sequence[Experiment], tasks: Sequence[str]) -> str:
    several = any(len(one.runs) > 1 for one in experiments)
    band = "The bands are 95 % intervals over seeds." if several else "One seed: no interval."
    if places(tasks)[0] != 1:
        return band
    named = ", ".join(f"{i} {_short(task)}" for i, task in enumerate(tasks, 1))
    return f"{band} Tasks: {named}."


# ---- Reliability --------------------------------------------------------------------------------------------------


def bins_of(runs: Sequence[Scored]) -> list[Bin]:
    """Of all test documents of tasks that were learned, at the end, over all runs."""
    said, came = list[np.ndarray](), list[np.ndarray]()
    for scored in runs:
        last, matrix = scored.rows[-1], scored.matrix(scored.main)
        for j in matrix.seen(len(matrix.experiences) - 1):
            answers = last.tests.get(matrix.tasks[j])
            if answers is not None and len(answers):
                of = of_labels if answers.labels.ndim == 2 else of_classes
                predicted, observed = of(answers.probabilities, answers.labels)  # pyright: ignore[reportArgumentType]
                said.append(predicted)
                came.append(observed)
    return reliability(np.concatenate(said), np.concatenate(came)) if said else []


def reliability_of(named: Sequence[tuple[str, Sequence[Scored]]], place: int = 2) -> Html:
    """What was predicted beside what came, in bins of equally many documents, with the number in each below."""
    found = [(name, bins_of(runs)) for name, runs in named]
    lines = [
        Line(name=name, steps=[one.predicted for one in bins], values=[one.observed for one in bins], colour=colour,
             look="marked")
        for colour, (name, bins) in enumerate(found, 1) if bins
    ]  # fmt: skip
    if not lines:
        return Html("")
    ends = [min(x for line in lines for x in line.steps), max(x for line in lines for x in line.steps)]
    right = Line(name="as it should be", steps=ends, values=ends, colour=QUIET, look="dashed")
    chart = Chart(
        title="Reliability at the end", lines=[*lines, right], across="predicted probability", scale="linear",
        note="Observed share, in 15 bins of equally many documents, of all tasks that were learned.",
    )  # fmt: skip
    rows = [
        (name, bin.count, number(bin.predicted, 3), number(bin.observed, 3)) for name, bins in found for bin in bins
    ]
    each = table("Bins of the reliability plot", ("Of", "Documents", "Predicted", "Observed"), rows)
    return Html(f'<div class="charts">{figure(chart, FIRST + place)}</div>{folded("How many are in each bin", each)}')
