"""All of a run that moves: what a checkpoint saves, and what a resumed run restores."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.contracts import Engine, Expert, Model, Objective, Rng, State
from weft.math.chance import generator, seed_of
from weft.run.pace import Pace


@dataclass
class MovingAverage:
    """The average of one role's adapter: average += (1 - decay) (weights - average), after each optimizer step."""

    decay: float
    start: int
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def update(self, step: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Follow the weights; up to the start it equals them."""
        if step <= self.start or not self.tensors:
            self.tensors = {name: p.detach().clone() for name, p in parameters.items()}
            return
        averages = [self.tensors[name] for name in parameters]
        weights = [p.detach() for p in parameters.values()]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]


@dataclass
class Learner:
    """A model under training. step: optimizer steps done. drawn: micro-batches of this rank drawn so far."""

    model: Model
    objective: Objective
    state: State
    engine: Engine
    optimizers: dict[str, Optimizer]
    seed: int
    pace: Pace
    ema: dict[str, MovingAverage] = field(default_factory=dict)
    step: int = 0
    drawn: int = 0
    skipped_in_a_row: int = 0

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The networks that are trained."""
        return self.model.family.experts

    @property
    def shown(self) -> tuple[str, ...]:
        """The roles whose adapters are exported, measured and sampled, one for each expert."""
        return self.objective.shown(self.experts)

    def rng(self, phase: str, draw: int) -> Rng:
        """The chance of the micro-batch that was drawn last, number `draw` of its phase on this rank. Dropout draws
        from torch's global generator, so that is seeded for the same place."""
        engine, place = self.engine, (self.step, phase, self.drawn)
        torch.manual_seed(seed_of(self.seed, "global", *place, engine.rank))
        return Rng(
            own=generator(engine.device, self.seed, "own", *place, engine.rank),
            shared=generator("cpu", self.seed, "shared", *place),
            seed=self.seed,
            draw=draw * engine.world + engine.rank,
        )
