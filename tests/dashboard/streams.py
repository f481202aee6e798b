"""Runs that were scored on a stream of years, as the trainer leaves them: predictions, events, config."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.dashboard.written import RunWriter
from weft import events
from weft.run.predictions import UNTRAINED, Answers, Row, keys_of, write_row
from weft.run.score_table import write_summary

YEARS = ("2019", "2020", "2021")
DOCUMENTS: Mapping[str, Any] = {
    "family": {"kind": "encoder", "source": "models/bert", "labels": ["no", "yes"]},
    "adapter": {"kind": "lora", "rank": 8},
    "objective": {"kind": "traditional"},
    "optimizer": {"kind": "adamw", "lr": 1e-3},
    "data": {"kind": "documents", "path": "notes.csv", "year": "year"},
}
N = 20  # test documents of a year


def answered(right: int, seed: int = 0) -> Answers:
    """Twenty documents of two classes in turn, of which the first so many are answered right, with some spread."""
    chance = np.random.default_rng(seed)
    labels = np.arange(N) % 2
    sure = chance.uniform(0.6, 0.95, N)
    sure = np.where(np.arange(N) < right, sure, 1 - sure)
    p = np.where(labels == 1, sure, 1 - sure)
    keys = keys_of([f"{n}" for n in range(N)])
    return Answers(np.stack([1 - p, p], 1), labels, keys, np.arange(N) // 2)


def scored_stream(
    folder: Path, right: Sequence[Sequence[int]], seed: int = 0, cost: float = 60.0, **config: Any
) -> Path:
    """A run over two years of three, whose rows have so many right of twenty; the first row is of the untrained
    model."""
    merged = {**{k: dict(v) for k, v in DOCUMENTS.items()}, "seed": seed}
    for section, values in config.items():
        merged[section] = {**merged.get(section, {}), **values}
    run = RunWriter(folder, time.time() - 400, merged, steps=20)
    run.begin()
    names, step = (UNTRAINED, *YEARS[: len(right) - 1]), 0
    for number, (after, counts) in enumerate(zip(names, right, strict=True)):
        while step < 10 * number:
            step += 1
            run.step(step)
        tests = {year: answered(count, seed) for year, count in zip(YEARS, counts, strict=True)}
        row = Row(number, after, step, tests, {after: answered(15, 99)} if number else {})
        write_row(run.folder, row)
        for metric, of in row.scores.items():
            told = {task: float("nan") if value is None else value for task, value in of.items()}
            run.tell(events.Scored(step=step, after=after, metric=metric, scores=told))
    run.end(step)
    write_summary(run.folder, cost)
    return run.folder
