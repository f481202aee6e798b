"""Validation: the loss on held-out items at fixed noise and fixed times, against the base with its adapter off."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

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


@dataclass
class Evaluator:
    """Measures a learner on the same questions each time. The adapter-off losses are measured once and kept.

    An item that cannot be loaded is counted in `failed` and enters no mean; without any item there is no loss, not 0.
    """

    batches: Sequence[Batch]
    failed: int
    seed: int
    baseline: Tensor | None = None  # (pairs, items)

    def evaluate(self, learner: Learner) -> Evaluated:
        objective = learner.objective
        assert isinstance(objective, Validated), f"{objective} has no fixed measure"
        pairs = objective.measured(learner.experts)
        with resting(learner.model.network), torch.no_grad():
            if self.baseline is None:
                self.baseline = self._losses(learner, objective, adapter=False)
            with averaged(learner):
                losses = self._losses(learner, objective, adapter=True)
        if not self.batches:
            return Evaluated(step=learner.step, loss=None, baseline=None, by_time={}, baseline_by_time={},
                             items=0, failed=self.failed)  # fmt: skip
        now, before = losses.double(), self.baseline.double()  # (pairs, items)
        difference = (now - before).mean(0)  # (items,)
        error = float(difference.std() / math.sqrt(len(difference))) if len(difference) > 1 else None
        several = len(learner.experts) > 1
        times = [f"{expert} {time:g}" if several else f"{time:g}" for expert, time in pairs]
        return Evaluated(
            step=learner.step,
            loss=float(now.mean()),
            baseline=float(before.mean()),
            by_time=dict(zip(times, now.mean(1).tolist(), strict=True)),
            baseline_by_time=dict(zip(times, before.mean(1).tolist(), strict=True)),
            by_expert=by_expert(pairs, now) if several else {},
            items=now.shape[1],
            failed=self.failed,
            standard_error=error,
        )

    def _losses(self, learner: Learner, objective: Validated, adapter: bool) -> Tensor:
        """(pairs, items) on the cpu, with the adapters or of the base alone; one expert after the other."""
        rows = []
        for expert, time in objective.measured(learner.experts):
            row = []
            for batch in self.batches:
                on_device = learner.engine.put(batch)
                with naming("validation", learner.engine.device), in_use(learner, adapter), learner.engine.computing():
                    row.append(objective.measure(learner.model, on_device, expert, time, self.seed).cpu())
            rows.append(torch.cat(row) if row else torch.zeros(0))
        return torch.stack(rows)


def by_expert(pairs: Sequence[tuple[str, float]], losses: Tensor) -> dict[str, float]:
    """The mean of (pairs, items) over each expert's own pairs."""
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
