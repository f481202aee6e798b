"""Continual runs by experiment: those whose configs differ in their seed alone, with means, intervals, paired tests."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.dashboard.configs import UNLIKE_BY_NATURE
from weft.dashboard.report_parts import duration
from weft.dashboard.small_files import json_of
from weft.dashboard.tail import number
from weft.math.intervals import Interval, Paired, paired, t_interval
from weft.run.listeners import read_steps
from weft.run.score_table import SUMMARY, Scored, scored_run

if TYPE_CHECKING:
    from weft.dashboard.comparison import Side

OF_A_SEED = (*UNLIKE_BY_NATURE, "seed")  # keys in which runs of one experiment differ
ABSENT = "–"
Rows = list[tuple[str, list[str]]]


@dataclass(frozen=True)
class SeedRun:
    """One run of an experiment. evaluations: forward and backward passes of a batch in all its steps; None until it has
    ended. seconds: of its steps alone."""

    side: "Side"
    scored: Scored
    seed: int
    evaluations: float | None
    seconds: float | None

    def number(self, name: str, metric: str) -> float | None:
        """One of NUMBERS."""
        return NUMBERS[name](self, metric)


@dataclass(frozen=True)
class Experiment:
    """Runs with one config and different seeds, by seed."""

    name: str
    runs: tuple[SeedRun, ...]

    @cached_property
    def by_seed(self) -> Mapping[int, SeedRun]:
        return {run.seed: run for run in self.runs}

    def interval(self, name: str, metric: str) -> Interval | None:
        """The mean over seeds of a number, None where no run has it."""
        values = [run.number(name, metric) for run in self.runs]
        return t_interval([value for value in values if value is not None])

    def against(self, other: "Experiment", name: str, metric: str) -> Paired | None:
        """This one less the other, seed by seed; None without a common seed."""
        pairs = [
            (self.by_seed[seed].number(name, metric), other.by_seed[seed].number(name, metric))
            for seed in self.by_seed
            if seed in other.by_seed
        ]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        return paired([a for a, _ in known], [b for _, b in known])

    def metric(self, wanted: str | None) -> str:
        """The metric that was asked for, or the runs' main one."""
        return wanted if wanted is not None else self.runs[0].scored.main


def _transfer(name: str) -> "Callable[[SeedRun, str], float | None]":
    return lambda run, metric: getattr(run.scored.matrix(metric).transfer(), name)


def _final(*metrics: str) -> "Callable[[SeedRun, str], float | None]":
    return lambda run, _: next((v for m in metrics if (v := run.scored.final(m)) is not None), None)


NUMBERS: Mapping[str, Callable[[SeedRun, str], float | None]] = {
    "ACC": _transfer("average"),
    "BWT": _transfer("bwt"),
    "forgetting": _transfer("forgetting"),
    "FWT": _transfer("fwt"),
    "next task": _transfer("next"),
    "AUROC": _final("auroc", "macro_auroc"),
    "AUPRC": _final("auprc", "macro_auprc"),
    "ECE": _final("ece"),
}
COMPARED = ("ACC", "BWT", "forgetting", "next task", "AUROC", "ECE")  # of which paired differences are told
MEANINGS = {
    "ACC": "average", "BWT": "bwt", "forgetting": "forgetting", "FWT": "fwt", "next task": "next",
}  # fmt: skip


# ---- Which runs are one experiment --------------------------------------------------------------------------------


def experiments_of(sides: "Sequence[Side]") -> list[Experiment]:
    """The continual runs among these, those of one experiment together, in the order in which they are named."""
    groups: dict[tuple[str, int], list[SeedRun]] = {}
    for side in sides:
        folder = side.store.folder(side.run["id"])
        found = scored_run(folder)
        if found is not None and found.experiences:
            seed = side.resolved.get("seed")
            evaluations = number(json_of(folder / SUMMARY).get("gradient_evaluations"))
            run = SeedRun(side, found, seed if type(seed) is int else 0, evaluations, _seconds(side))
            alike, again = _alike(side.resolved, run.seed), 0
            while any(one.seed == run.seed for one in groups.get((alike, again), ())):
                again += 1  # the same seed once more is a repetition, and no further evidence
            groups.setdefault((alike, again), []).append(run)
    named = [(_common_name(runs), runs) for runs in groups.values()]
    taken = [name for name, _ in named]
    return [
        Experiment(name if taken.count(name) == 1 else runs[0].side.name, tuple(sorted(runs, key=lambda run: run.seed)))
        for name, runs in named
    ]


def _alike(resolved: Mapping[str, Any], seed: int) -> str:
    """A config without what a seed decides: the seeds that follow from it, and its number in names of folders."""
    told = {key: value for key, value in resolved.items() if key not in OF_A_SEED}
    if told.get("family.seed") == seed:
        del told["family.seed"]
    return re.sub(rf"(seed[-_]?){seed}(?!\d)", r"\1*", json.dumps(told, sort_keys=True))


def _common_name(runs: Sequence[SeedRun]) -> str:
    """What the names of runs have in common, without their seeds; of folders that are called by their seeds alone, that
    of the folder around them."""
    if len(runs) == 1:
        return runs[0].side.name
    alike = commonprefix(sorted({_without_seed(run) for run in runs}))  # noqa: RUF071  # letter by letter: names
    return alike.rstrip("-_.") or runs[0].side.name


def _without_seed(run: SeedRun) -> str:
    plain = re.sub(rf"[-_.]?(seed)?[-_.]?{run.seed}$", "", run.side.name)
    return plain or run.side.store.folder(run.side.run["id"]).absolute().parent.name


def _seconds(side: "Side") -> float | None:
    """Of all steps together, without scoring and saving."""
    log = side.store.folder(side.run["id"]) / "events.rank0.jsonl"
    steps = read_steps(log).values() if log.is_file() else ()
    seconds = [number((step.get("seconds") or {}).get("total")) for step in steps]
    known = [value for value in seconds if value is not None]
    return sum(known) if known else None


def representatives(sides: "Sequence[Side]", experiments: Sequence[Experiment]) -> "list[Side]":
    """Of each experiment the run with the least seed, and every run that belongs to none: what is told of single runs
    is told of these."""
    among = {id(run.side): experiment for experiment in experiments for run in experiment.runs}
    return [side for side in sides if (one := among.get(id(side))) is None or one.runs[0].side is side]


# ---- What is told of them -----------------------------------------------------------------------------------------


def means(experiments: Sequence[Experiment], metric: str | None = None) -> Rows:
    """Rows of (number, of each experiment its mean over seeds and the half-width of its 95 % interval)."""
    rows: Rows = [("seeds", [_seeds(one) for one in experiments])]
    for name in NUMBERS:
        found = [one.interval(name, one.metric(metric)) for one in experiments]
        if any(found):
            rows.append((name, [spread(interval) for interval in found]))
    return [*rows, *_costs(experiments)]


def _seeds(experiment: Experiment) -> str:
    seeds = [run.seed for run in experiment.runs]
    return f"one ({seeds[0]}): no interval" if len(seeds) == 1 else f"{len(seeds)} ({', '.join(map(str, seeds))})"


def _costs(experiments: Sequence[Experiment]) -> Rows:
    """What the experiments cost: the ground on which they may be compared."""
    evaluations = [_mean(run.evaluations for run in one.runs) for one in experiments]
    seconds = [_mean(run.seconds for run in one.runs) for one in experiments]
    return [
        ("gradient evaluations", [ABSENT if value is None else f"{value:,.0f}" for value in evaluations]),
        ("time of the steps", [duration(value) for value in seconds]),
    ]


def differences_between(experiments: Sequence[Experiment], metric: str | None = None) -> Rows:
    """Rows of (number, of each experiment after the first its difference to it, seed by seed), and below them how many
    times its cost. A gain that cost more is told with the cost beside it."""
    first, others = experiments[0], experiments[1:]
    rows: Rows = []
    for name in COMPARED:
        found = [one.against(first, name, first.metric(metric)) for one in others]
        if any(found):
            rows.append((name, [difference(one) for one in found]))
    costs: Mapping[str, Callable[[SeedRun], float | None]] = {
        "gradient evaluations": lambda run: run.evaluations, "time of the steps": lambda run: run.seconds,
    }  # fmt: skip
    for name, of in costs.items():
        base = _mean(of(run) for run in first.runs)
        rows.append((name, [_times(_mean(of(run) for run in one.runs), base) for one in others]))
    return rows


def spread(interval: Interval | None) -> str:
    """The mean, and half the width of its interval where there is more than one value."""
    if interval is None:
        return ABSENT
    return f"{interval.mean:.3f}" + ("" if interval.half is None else f" ± {interval.half:.3f}")


def difference(found: Paired | None) -> str:
    """A paired difference with its interval, and p of the t-test and of all sign flips."""
    if found is None:
        return ABSENT
    of = found.difference
    if of.half is None:
        return f"{of.mean:+.3f} (one pair)"
    flips = "" if found.flips is None else f", {found.flips:.3f} by sign flips"
    return f"{of.mean:+.3f} ± {of.half:.3f} (p {found.t:.3f}{flips}; {of.n} pairs)"


def _times(cost: float | None, base: float | None) -> str:
    return ABSENT if cost is None or not base else f"× {cost / base:.2f}"


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def mean_matrix(experiment: Experiment, metric: str) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
    """Experiences, tasks, and the mean over seeds of R (experiences, tasks), over the rows that all runs have."""
    matrices = [run.scored.matrix(metric) for run in experiment.runs]
    least = min(matrices, key=lambda one: len(one.experiences))
    rows = len(least.experiences)
    return least.experiences, least.tasks, np.mean([one.values[:rows] for one in matrices], axis=0)
