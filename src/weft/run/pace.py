"""How often each phase of a run comes: learning rates and stratified draws follow a phase's own steps."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from weft.contracts import Expert, Objective


@dataclass
class Pace:
    """The steps of each phase in a run of `total` steps: experts take turns, and a generator moves every k-th step."""

    objective: Objective
    experts: Sequence[Expert]
    total: int
    steps: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for step in range(self.total):
            for phase in self.objective.phases(step, self.experts):
                self.steps.setdefault(phase.name, []).append(step)

    def micro_batches(self, step: int) -> int:
        """Micro-batches of all phases until this step, for each that a phase draws in a step."""
        return sum(bisect_left(steps, step) for steps in self.steps.values())

    def done(self, phase: str, step: int) -> int:
        """How many steps the phase has had before this one."""
        return bisect_left(self.steps[phase], step)

    def of(self, phase: str) -> int:
        """How many steps it has in the whole run."""
        return len(self.steps[phase])
