"""Validation: the loss on held-out items at fixed noise and fixed times, against the base with its adapter off."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.contracts import Batch, Validated
from weft.events import Evaluated
from weft.run.learner import Learner


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
    baseline: list[Tensor] | None = None

    def evaluate(self, learner: Learner) -> Evaluated:
        objective = learner.objective
        assert isinstance(objective, Validated), f"{objective} has no fixed measure"
        role = learner.objective.roles[0]
        with resting(learner.model.network), torch.no_grad():
            if self.baseline is None:
                self.baseline = list(self._losses(learner, objective, None))
            with averaged(learner):
                losses = list(self._losses(learner, objective, role))
        times = [f"{time:g}" for time in objective.validation_times]
        if not losses:
            return Evaluated(step=learner.step, loss=None, baseline=None, by_time={}, baseline_by_time={},
                             items=0, failed=self.failed)  # fmt: skip
        now, before = torch.cat(losses, 1).double(), torch.cat(self.baseline, 1).double()  # (times, items)
        difference = (now - before).mean(0)  # (items,)
        error = float(difference.std() / math.sqrt(len(difference))) if len(difference) > 1 else None
        return Evaluated(
            step=learner.step,
            loss=float(now.mean()),
            baseline=float(before.mean()),
            by_time=dict(zip(times, now.mean(1).tolist(), strict=True)),
            baseline_by_time=dict(zip(times, before.mean(1).tolist(), strict=True)),
            items=now.shape[1],
            failed=self.failed,
            standard_error=error,
        )

    def _losses(self, learner: Learner, objective: Validated, role: str | None) -> Iterable[Tensor]:
        """For each batch the losses (times, B) on the cpu."""
        for batch in self.batches:
            on_device = learner.engine.put(batch)
            with learner.model.adapters.use(role), learner.engine.computing():
                rows = [
                    objective.measure(learner.model, on_device, time, self.seed) for time in objective.validation_times
                ]
            yield torch.stack(rows).cpu()
