"""What was learned, kept and foreseen: numbers of the matrix R[i][j], the score on task j after learning task i.

Experiences are numbered 1 to T in the order of learning, and tasks so that experience i is trained on task i; there may
be further tasks that are never learned. b[j] is the score before any training. A score that could not be measured (nan)
leaves a mean, which is None when nothing is left in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FORMULAS: Mapping[str, str] = {
    "average": "mean over learned tasks j of R[T][j]",
    "bwt": "backward transfer, 1/(T-1) sum over j<T of R[T][j] - R[j][j] (Lopez-Paz and Ranzato 2017); of scores of "
    "which more is better, below 0: forgotten",
    "bti": "the same sum divided by T, as La-MAML's code reports it under the name BTI",
    "forgetting": "1/(T-1) sum over j<T of (max over l<T of R[l][j]) - R[T][j] (Chaudhry et al. 2018); of errors the "
    "least takes the place of the max, with the sign turned",
    "fwt": "forward transfer, 1/(T-1) sum over j>1 of R[j-1][j] - b[j], b being the scores before training",
    "next": "mean of R[i][i+1] over all i that have a next task: what a model trained to now does on the next one",
    "plasticity": "mean over j of R[j][j], each task when it was just learned",
}
OUTLOOKS: Mapping[str, str] = {
    "fixed": "Eval-Fix (Wild-Time, Yao et al. 2022): trained to the end, the mean over learned tasks, and the mean and "
    "the worst over tasks that never are",
    "stream": "Eval-Stream (the same): after each experience the mean and the worst over the next tasks up to the "
    "horizon, and the mean of these over the experiences",
}


@dataclass(frozen=True)
class Transfer:
    """The numbers that FORMULAS defines, of one metric of one run."""

    average: float | None
    bwt: float | None
    bti: float | None
    forgetting: float | None
    fwt: float | None
    next: float | None
    plasticity: float | None


@dataclass(frozen=True)
class Outlook:
    """Scores on tasks that were learned, and on the average and the worst of those that were not."""

    learned: float | None
    ahead: float | None
    worst: float | None


@dataclass(frozen=True)
class ScoreMatrix:
    """R: of each learned experience the scores on every task. less: less is better, as of errors."""

    experiences: tuple[str, ...]
    tasks: tuple[str, ...]
    values: Array  # (experiences, tasks), nan where nothing could be measured
    untrained: Array | None = None  # b, (tasks,)
    less: bool = False

    @cached_property
    def learned(self) -> tuple[int, ...]:
        """The column of each experience's own task; () where one experience held them all (joint training)."""
        places = [self.tasks.index(name) for name in self.experiences if name in self.tasks]
        return tuple(places) if len(places) == len(self.experiences) else ()

    @property
    def last(self) -> Array:
        """R[T], (tasks,)."""
        return self.values[-1]

    def seen(self, row: int) -> tuple[int, ...]:
        """The columns that were learned by the end of a row; all, where one experience held them all."""
        return self.learned[: row + 1] if self.learned else tuple(range(len(self.tasks)))

    def unseen(self, row: int) -> tuple[int, ...]:
        """The columns that were not learned by the end of a row, in their order."""
        return tuple(j for j in range(len(self.tasks)) if j not in self.seen(row))

    def average(self, row: int) -> float | None:
        """ACC_i: the mean over what was learned by then."""
        return mean(self.values[row, list(self.seen(row))])

    def transfer(self) -> Transfer:
        """All numbers of the matrix. Those that compare tasks or rows need two of them: None."""
        learned = self.learned
        last = len(learned) - 1
        changes = [self.values[last, j] - self.values[i, j] for i, j in enumerate(learned[:-1])]
        known = [c for c in changes if np.isfinite(c)]
        ahead = [(i, self._next(i)) for i in range(len(learned))]
        gains = [] if self.untrained is None else [
            self.values[i, j] - self.untrained[j] for i, j in enumerate(learned[1:])
        ]  # fmt: skip
        return Transfer(
            average=self.average(len(self.experiences) - 1),
            bwt=mean(changes),
            bti=float(np.sum(known)) / (len(known) + 1) if known else None,
            forgetting=mean([self._forgotten(j) for j in learned[:-1]]),
            fwt=mean(gains),
            next=mean([self.values[i, j] for i, j in ahead if j is not None]),
            plasticity=mean([self.values[i, j] for i, j in enumerate(learned)]),
        )

    def _forgotten(self, column: int) -> float:
        before = self.values[:-1, column]
        before = before[np.isfinite(before)]
        if not len(before):
            return float("nan")
        return float(self.last[column] - before.min() if self.less else before.max() - self.last[column])

    def _next(self, row: int) -> int | None:
        """The column after a row's own: of the next experience, after the last the first task that is never learned."""
        if row + 1 < len(self.learned):
            return self.learned[row + 1]
        later = [j for j in self.unseen(row) if j > self.learned[row]]
        return later[0] if later else None

    def fixed(self, row: int) -> Outlook:
        """Eval-Fix: trained up to a row, on what was learned and on all that was not. Yao et al. 2022, Wild-Time,
        arXiv:2211.14238."""
        return self._outlook(row, self.unseen(row))

    def stream(self, horizon: int) -> Outlook:
        """Eval-Stream: after every row on the next `horizon` tasks; the mean over rows of their mean and of their
        worst."""
        each = [self._outlook(row, self.unseen(row)[:horizon]) for row in range(len(self.experiences))]
        each = [one for one in each if one.ahead is not None]
        return Outlook(*(mean([getattr(one, name) for one in each]) for name in ("learned", "ahead", "worst")))

    def _outlook(self, row: int, ahead: Sequence[int]) -> Outlook:
        values = self.values[row, list(ahead)]
        known = values[np.isfinite(values)]
        worst = (known.max() if self.less else known.min()) if len(known) else None
        return Outlook(self.average(row), mean(known), None if worst is None else float(worst))

    def intransigence(self, joint: Sequence[float]) -> float | None:
        """Mean over learned j of joint[j] - R[j][j]: what learning one after the other cost each task when it was new.
        joint: (tasks,), scores of a model trained on all at once. Chaudhry et al. 2018, arXiv:1801.10112."""
        return mean([joint[j] - self.values[i, j] for i, j in enumerate(self.learned)])


def mean(values: Iterable[float | None]) -> float | None:
    """Of the values that are known; None of none."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if known else None
