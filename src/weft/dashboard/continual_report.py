"""What a page says of continual learning: the matrix, its numbers with their formulas, experiments side by side."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from weft.dashboard.continual import MEANINGS, Experiment, differences_between, means
from weft.dashboard.continual_charts import matrices, matrix_map, over_tasks, reliability_of
from weft.dashboard.report_parts import Html, folded, number, paragraph, table
from weft.math import scores as scoring
from weft.math import transfer
from weft.math.calibration import calibration_in_the_large, calibration_slope
from weft.math.intervals import grouped_bootstrap
from weft.run.predictions import Answers
from weft.run.score_table import HORIZON, Scored, scored_run

OTHERS = {"AUROC": "auroc", "AUPRC": "auprc", "ECE": "ece"}
DRAWS, MOST = 300, 20_000  # of a bootstrap, and documents of a task up to which it is made
TOPS = (5, 8, 15)  # of P@k
CALIBRATION = {
    "In the large": "the intercept a of P(positive) = sigmoid(a + log odds of the prediction): above 0 too few were "
    "predicted",
    "Slope": "b of P(positive) = sigmoid(a + b x log odds): below 1 the predictions are too sure",
    "P@k": "mean share of a document's labels among the k that are most probable",
}
MATRIX = "R[i][j]: the score on task j after learning task i"


# ---- One run ------------------------------------------------------------------------------------------------------


def of_run(scores: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """The matrix of each metric; where the predictions are there, a picture of it, its numbers and reliability."""
    if scores["metric"] is None:
        return
    yield matrix_table(scores["metric"], scores["experiences"], scores["metrics"][scores["metric"]])
    found = scored_run(folder)
    if found is not None:
        yield from _pictures(found)
    others = [
        matrix_table(metric, scores["experiences"], one)
        for metric, one in scores["metrics"].items()
        if metric != scores["metric"]
    ]
    if others:
        yield folded("The other metrics", "\n".join(others))
    if found is not None:
        yield formulas(found.metrics)


def _pictures(found: Scored) -> Iterator[str]:
    matrix = found.matrix(found.main)
    known = [value for row in matrix.values for value in row if value == value]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    yield matrix_map(matrix.experiences, matrix.tasks, matrix.values, found.main, low, high)
    rows = [(name, *map(number, asdict(found.matrix(name).transfer()).values())) for name in found.metrics]
    yield table("What was kept and foreseen, of each metric", ("Metric", *transfer.FORMULAS), rows)
    yield ahead(found)
    yield each_task(found)
    yield reliability_of([("this run", [found])])


def ahead(found: Scored) -> Html:
    """Eval-Fix and Eval-Stream of the main metric, where there were tasks that were not learned yet."""
    matrix = found.matrix(found.main)
    kinds = {
        "Eval-Fix": matrix.fixed(len(found.experiences) - 1),
        f"Eval-Stream, {HORIZON} ahead": matrix.stream(HORIZON),
    }
    rows = [
        (name, number(one.learned), number(one.ahead), number(one.worst))
        for name, one in kinds.items()
        if one.ahead is not None
    ]
    head = ("Protocol", "Learned tasks", "Tasks ahead, mean", "Tasks ahead, worst")
    return table(f"{found.main} on tasks to come", head, rows) if rows else Html("")


def each_task(found: Scored) -> Html:
    """At the end, of each task: how sure its score is as patients go, and whether its probabilities are right."""
    last = {task: answers for task, answers in found.rows[-1].tests.items() if len(answers)}
    grouped = any(answers.groups is not None for answers in last.values())
    rows = []
    for task, answers in last.items():
        value = found.rows[-1].scores[found.main].get(task)
        rows.append((task, len(answers), number(value, 3), _interval(answers), *_extras(answers)))
    names = _extra_names(next(iter(last.values()))) if last else ()
    of = "documents of one group are drawn together" if grouped else "each document by itself: no groups are known"
    caption = f"At the end, of each task; the 95 % interval is a bootstrap of its test documents, {of}"
    return table(caption, ("Task", "Documents", found.main, "Interval", *names), rows) if rows else Html("")


def _interval(answers: Answers) -> str:
    groups = answers.groups if answers.groups is not None else np.arange(len(answers))

    def score(rows: np.ndarray) -> float | None:
        return scoring.main_score(answers.probabilities[rows], answers.labels[rows])

    if len(answers) > MOST:  # sure enough to tell without it
        return "–"
    edges = grouped_bootstrap(score, groups, DRAWS, seed=0)
    return "–" if edges is None else f"{edges[0]:.3f} to {edges[1]:.3f}"


def _extra_names(answers: Answers) -> tuple[str, ...]:
    if answers.labels.ndim == 2:
        return tuple(f"P@{k}" for k in TOPS if answers.probabilities.shape[1] >= k)
    return ("Share positive", "In the large", "Slope") if answers.probabilities.shape[1] == 2 else ()


def _extras(answers: Answers) -> list[str]:
    p, labels = answers.probabilities, answers.labels
    if labels.ndim == 2:
        truth = np.asarray(labels, np.float64)
        return [number(scoring.precision_at(k, p, truth), 3) for k in TOPS if p.shape[1] >= k]
    if p.shape[1] != 2:
        return []
    positive = labels == 1
    large, slope = calibration_in_the_large(p[:, 1], positive), calibration_slope(p[:, 1], positive)
    return [number(value, 3) for value in (scoring.prevalence(positive), large, slope)]


def matrix_table(metric: str, experiences: Sequence[str], table_of: Mapping[str, Any]) -> Html:
    """Rows: after learning; columns: measured on. What had been learned by then is strong."""
    rows = [_line(row) for row in ([table_of["untrained"]] if table_of["untrained"] else []) + list(table_of["rows"])]
    head = ("After learning", "Step", *experiences, "Mean of learned")
    return table(f"{metric} on each experience; bold: learned by then", head, rows)


def _line(row: Mapping[str, Any]) -> tuple[object, ...]:
    cells = [
        Html(f'<span class="past">{number(value, 3)}</span>') if i < row["learned"] else number(value, 3)
        for i, value in enumerate(row["values"])
    ]
    past = [value for value in row["values"][: row["learned"]] if value is not None]
    return (row["after"], row["step"], *cells, number(sum(past) / len(past), 3) if past else "–")


def formulas(metrics: Sequence[str]) -> Html:
    """What each name stands for."""
    told = [*transfer.FORMULAS.items(), *CALIBRATION.items(), *((name, scoring.FORMULAS[name]) for name in metrics)]
    return folded("The formulas", table(MATRIX, ("Name", "Is"), told))


# ---- Experiments --------------------------------------------------------------------------------------------------


def of_experiments(experiments: Sequence[Experiment], metric: str | None = None) -> Iterator[str]:
    """A table of means with intervals over seeds, paired differences to the first, and the figures."""
    names = [one.name for one in experiments]
    main = experiments[0].metric(metric)
    caption = f"Means over seeds ± 95 % t-interval; ACC, BWT, forgetting, FWT and next task of {main}"
    yield table(caption, ("Number", *names), [(what, *of) for what, of in means(experiments, metric)])
    if len(experiments) > 1:
        rows = [(what, *of) for what, of in differences_between(experiments, metric)]
        yield table(f"Difference to {names[0]}, seed by seed, and the cost beside it", ("Number", *names[1:]), rows)
    if any(len(one.runs) < 3 for one in experiments):
        yield paragraph("Fewer than three seeds say little of chance: train more before believing a difference.")
    yield over_tasks(experiments, metric)
    yield from matrices(experiments, metric)
    yield reliability_of([(one.name, [run.scored for run in one.runs]) for one in experiments])
    meanings = {name: transfer.FORMULAS[of] for name, of in MEANINGS.items()}
    meanings |= {name: f"at the end, the mean over tasks: {scoring.FORMULAS[of]}" for name, of in OTHERS.items()}
    meanings["gradient evaluations"] = "forward and backward passes of one batch in all steps of a run"
    meanings["p"] = "of the two-sided paired t-test over seeds; by sign flips: of the exact permutation test"
    yield folded("The formulas", table(MATRIX, ("Name", "Is"), [*meanings.items()]))
