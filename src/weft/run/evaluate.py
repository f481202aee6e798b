"""Validation: the loss on held-out items at fixed noise and fixed times, against the base with its adapter off."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from weft.contracts import Batch, Validated
from weft.events import Evaluated
from weft.run.learner import Learner
from weft.run.shortage import naming


@contextmanager
def averaged(learner: Learner) -> Iterator[None]:
    """Put the moving averages in place of the weights, where a run keeps them; afterwards the weights are back."""
    adapters = learner.model.adapters
    kept: dict[str, dict[str, Tensor]] = {}
    for role, average in learner.ema.items():
        if average.tensors:
            learner.hold()
            kept[role] = {name: p.detach().clone() for name, p in adapters.parameters(role).items()}
            copy_in(adapters.parameters(role), average.tensors)
    try:
        yield
    finally:
        for role, tensors in kept.items():
            copy_in(adapters.parameters(role), tensors)


@torch.no_grad()
def copy_in(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


@contextmanager
def resting(network: nn.Module) -> Iterator[None]:
    """Eval mode, so that nothing is dropped out; afterwards the mode it had."""
    was = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was)


def so_far(batches: Mapping[str, Sequence[Batch]], learner: Learner) -> list[Batch]:
    """The batches of the experiences that have begun; of one that goes through all of them, all."""
    begun, start = set[str](), 0
    for experience in learner.stream:
        if start < learner.step or not begun:
            begun.add(experience.name)
        start = experience.last_step
    known = [own for name, own in batches.items() if name in begun] or list(batches.values())
    return [batch for own in known for batch in own]


@dataclass
class Evaluator:
    """Measures a learner on the same questions each time. The adapter-off losses are measured once and kept.

    An item that cannot be loaded is counted in `failed` and enters no mean; without any item there is no loss, not 0.
    among: chooses the batches that are measured at the moment, in place of a baseline: of a stream of documents those
    of the experiences so far, where a head that has learned nothing is nothing to compare with.
    """

    batches: Sequence[Batch]
    failed: int
    seed: int
    baseline: Tensor | None = None  # (pairs, items)
    among: Callable[[Learner], Sequence[Batch]] | None = None

    def evaluate(self, learner: Learner) -> Evaluated:
        objective = learner.objective
        assert isinstance(objective, Validated), f"{objective} has no fixed measure"
        pairs = objective.measured(learner.experts)
        if self.among is not None:
            self.batches = self.among(learner)
        with resting(learner.model.network), torch.no_grad():
            if self.baseline is None and self.among is None:
                self.baseline = self._losses(learner, objective, adapter=False)
            with averaged(learner):
                losses = self._losses(learner, objective, adapter=True)
        if not self.batches:
            return Evaluated(step=learner.step, loss=None, baseline=None, by_time={}, baseline_by_time={},
                             items=0, failed=self.failed)  # fmt: skip
        weights = torch.cat([objective.weights(batch) for batch in self.batches]).double()  # (items,)
        now = weighted(losses.double(), weights)  # (pairs,)
        before = None if self.baseline is None else weighted(self.baseline.double(), weights)
        several = len(learner.experts) > 1
        times = [" ".join(filter(None, (expert * several, time_of(time)))) for expert, time in pairs]
        return Evaluated(
            step=learner.step,
            loss=float(now.mean()),
            baseline=None if before is None else float(before.mean()),
            by_time=dict(zip(times, now.tolist(), strict=True)) if any(times) else {},
            baseline_by_time=dict(zip(times, before.tolist(), strict=True))
            if any(times) and before is not None
            else {},
            by_expert=by_expert(pairs, now) if several else {},
            items=losses.shape[1],
            failed=self.failed,
            standard_error=None
            if self.baseline is None
            else standard_error((losses.double() - self.baseline.double()).mean(0), weights),
        )

    def _losses(self, learner: Learner, objective: Validated, adapter: bool) -> Tensor:
        """(pairs, items) on the cpu, with the adapters or of the base alone; one expert after the other.

        The data ranks share the batches. Each asks equally often, for sharded networks answer all ranks at once.
        """
        engine = learner.engine
        first = list(accumulate((len(objective.weights(batch)) for batch in self.batches), initial=0))
        pairs = objective.measured(learner.experts)
        found = torch.zeros(len(pairs), first[-1], device=engine.device)
        for row, (expert, time) in enumerate(pairs):
            for start in range(0, len(self.batches), engine.data_world):
                number = start + engine.data_rank
                on_device = engine.put(self.batches[min(number, len(self.batches) - 1)])
                with naming("validation", engine.device), in_use(learner, adapter), engine.computing():
                    losses = objective.measure(learner.model, on_device, expert, time, self.seed)
                if number < len(self.batches):
                    found[row, first[number] : first[number + 1]] = losses
        return engine.total(found).cpu()


def weighted(losses: Tensor, weights: Tensor) -> Tensor:
    """Means (pairs,) of (pairs, items) under weights (items,)."""
    return (losses * weights).sum(1) / weights.sum()


def standard_error(differences: Tensor, weights: Tensor) -> float | None:
    """Of the weighted mean of paired differences (items,): sqrt(n/(n-1) sum w^2 (d - mean)^2) / sum w. Cochran 1977,
    eq. 6.13; with equal weights the usual one. None for a single item."""
    n = len(differences)
    if n < 2:
        return None
    mean = (differences * weights).sum() / weights.sum()
    squares = (weights.square() * (differences - mean).square()).sum()
    return float((n / (n - 1) * squares).sqrt() / weights.sum())


def time_of(time: float | None) -> str:
    return "" if time is None else f"{time:g}"


def by_expert(pairs: Sequence[tuple[str, float | None]], losses: Tensor) -> dict[str, float]:
    """The mean of (pairs,) over each expert's own pairs."""
    names = dict.fromkeys(expert for expert, _ in pairs)
    return {name: float(losses[[expert == name for expert, _ in pairs]].mean()) for name in names}


@contextmanager
def in_use(learner: Learner, adapter: bool = True) -> Iterator[None]:
    """Answer under the adapters that are shown, of every expert at once; or as the base alone."""
    adapters = learner.model.adapters
    with ExitStack() as stack:
        for role in learner.shown if adapter else (None,):
            stack.enter_context(adapters.use(role))
        yield
