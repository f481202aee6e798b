"""Which checkpoints a run writes, by passes over the data, and which it keeps."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite


def due_by_epoch(before: int, after: int, epoch_draws: int | None, every: float) -> bool:
    """Whether the draws from `before` to `after` went past a whole multiple of `every` passes over the data. Never
    where the length of the data is not known."""
    if not every or not epoch_draws:
        return False
    between = Fraction(str(every)) * epoch_draws  # draws; exact, for 0.1 is no binary fraction
    return after // between > before // between


@dataclass(frozen=True)
class Retention:
    """What is kept: the newest checkpoints, and beside them those with the lowest validation loss. adapters: whether
    global_step_N/ goes with the checkpoint of its step."""

    newest: int = 3
    best: int = 0
    adapters: bool = False

    def surplus(self, losses: Mapping[int, float | None]) -> list[int]:
        """Steps whose checkpoints go, of all that there are with their losses; None where none was measured."""
        steps = sorted(losses)
        measured = {step: loss for step, loss in losses.items() if loss is not None and isfinite(loss)}
        kept = {*steps[-self.newest :], *sorted(measured, key=lambda step: (measured[step], step))[: self.best]}
        return [step for step in steps if step not in kept]
