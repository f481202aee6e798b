"""What a scored run comes to: the matrix of each metric, its averages and transfers, summary.json, and the table of it.

Without torch, so that commands and the dashboard read runs with it.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from weft.math import scores, transfer
from weft.math.transfer import ScoreMatrix
from weft.run.folder import write_json
from weft.run.predictions import UNTRAINED, Row, read_rows

SUMMARY = "summary.json"
FORMAT = 1
HORIZON = 3  # tasks to come that Eval-Stream looks at
SHORT = (("ACC", "average"), ("BWT", "bwt"), ("forgetting", "forgetting"), ("FWT", "fwt"), ("next", "next"))
BESIDE = ("auroc", "macro_auroc", "auprc", "macro_auprc", "ece")  # whose mean over the last row is told beside the main


@dataclass(frozen=True)
class Scored:
    """A run's rows as matrices. main: the metric that is told first: accuracy, of documents with several labels micro
    F1."""

    rows: tuple[Row, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """As they are named in the last row, the main one first."""
        return tuple(self.rows[-1].scores)

    @property
    def main(self) -> str:
        return self.metrics[0]

    @property
    def experiences(self) -> tuple[str, ...]:
        return tuple(row.after for row in self.rows if row.after != UNTRAINED)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """All tasks that are tested on; with them any that was learned one after the other and has no test document."""
        tested = list(dict.fromkeys(task for row in self.rows for task in row.tests))
        missing = [name for name in self.experiences if name not in tested]
        return tuple(tested + missing * any(name in tested for name in self.experiences))

    def matrix(self, metric: str) -> ScoreMatrix:
        """R of a metric. Before the first experience was learned it has no rows."""
        first = next((row for row in self.rows if row.after == UNTRAINED), None)
        learned = [self._values(row, metric) for row in self.rows if row.after != UNTRAINED]
        values = np.stack(learned) if learned else np.zeros((0, len(self.tasks)))
        untrained = None if first is None else self._values(first, metric)
        return ScoreMatrix(self.experiences, self.tasks, values, untrained, metric in scores.LESS_IS_BETTER)

    def _values(self, row: Row, metric: str) -> transfer.Array:
        found = row.scores.get(metric, {})
        return np.asarray([np.nan if (v := found.get(task)) is None else v for task in self.tasks], np.float64)

    def final(self, metric: str) -> float | None:
        """The mean of a metric over what was learned, at the end; None where the run has no such metric."""
        return self.matrix(metric).average(len(self.experiences) - 1) if metric in self.metrics else None


def scored_run(run: Path) -> Scored | None:
    """The rows that a run has so far; None when nothing was learned yet. Raises RunError for damaged files."""
    rows = tuple(read_rows(run))
    return Scored(rows) if any(row.after != UNTRAINED for row in rows) else None


# ---- summary.json -------------------------------------------------------------------------------------------------


def summary_of(found: Scored, gradient_evaluations: float | None) -> dict[str, Any]:
    """All numbers of a run as plain data, with the formulas behind their names; null for what could not be measured."""
    metrics = {}
    for metric in found.metrics:
        matrix = found.matrix(metric)
        metrics[metric] = {
            "matrix": [_known(row) for row in matrix.values],
            "untrained": None if matrix.untrained is None else _known(matrix.untrained),
            **asdict(matrix.transfer()),
            "fixed": asdict(matrix.fixed(len(found.experiences) - 1)),
            "stream": {"horizon": HORIZON, **asdict(matrix.stream(HORIZON))},
        }
    last = found.rows[-1]
    return {
        "format": FORMAT,
        "main": found.main,
        "experiences": list(found.experiences),
        "tasks": list(found.tasks),
        "documents": {task: len(answers) for task, answers in last.tests.items()},
        "threshold": last.threshold,
        "metrics": metrics,
        "gradient_evaluations": gradient_evaluations,
        "formulas": {
            **transfer.FORMULAS,
            **transfer.OUTLOOKS,
            **{name: scores.FORMULAS[name] for name in found.metrics},
        },
    }


def write_summary(run: Path, gradient_evaluations: float | None) -> None:
    """Write what a run's predictions come to beside them, in summary.json; nothing when nothing was learned."""
    found = scored_run(run)
    if found is not None:
        write_json(run / SUMMARY, summary_of(found, gradient_evaluations))


def _known(values: transfer.Array) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


# ---- The table ----------------------------------------------------------------------------------------------------


def table_lines(found: Scored) -> list[str]:
    """The matrix of the main metric in plain columns, and the numbers below it."""
    matrix = found.matrix(found.main)
    rows = [("after learning", *matrix.tasks, "mean learned")]
    if matrix.untrained is not None:
        rows.append((UNTRAINED, *map(digits, matrix.untrained), ""))
    for i, name in enumerate(matrix.experiences):
        rows.append((name, *map(digits, matrix.values[i]), digits(matrix.average(i))))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{found.main} on the test documents of each task"]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return [*lines, _numbers(found, matrix)]


def _numbers(found: Scored, matrix: ScoreMatrix) -> str:
    of = asdict(matrix.transfer())
    told = [f"{name} {digits(of[key])}" for name, key in SHORT if of[key] is not None]
    told += [f"{metric} {digits(found.final(metric))}" for metric in BESIDE if found.final(metric) is not None]
    return "  ".join(told)


def digits(value: float | None) -> str:
    """Three digits, a dash where nothing could be measured."""
    return "-" if value is None or not np.isfinite(value) else f"{value:.3f}"
