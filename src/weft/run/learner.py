"""All of a run that moves: what a checkpoint saves, and what a resumed run restores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.contracts import Engine, Experience, Expert, Model, Objective, Rng, State
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
    """A model under training. step: optimizer steps done. drawn: micro-batches that all ranks have drawn so far.
    rates: of optimizers whose learning rate at the top of the schedule was set while training."""

    model: Model
    objective: Objective
    state: State
    engine: Engine
    optimizers: dict[str, Optimizer]
    seed: int
    pace: Pace
    ema: dict[str, MovingAverage] = field(default_factory=dict)
    stream: Sequence[Experience] = ()
    step: int = 0
    drawn: int = 0
    skipped_in_a_row: int = 0
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The networks that are trained."""
        return self.model.family.experts

    @property
    def shown(self) -> tuple[str, ...]:
        """The roles whose adapters are exported, measured and sampled, one for each expert."""
        return self.objective.shown(self.experts)

    def top_rate(self, optimizer: str) -> float:
        """The learning rate at the top of the schedule: the config's, unless another was set."""
        configured: float = self.optimizers[optimizer].param_groups[0]["base_lr"]
        return self.rates.get(optimizer, configured)

    def rng(self, phase: str, micro_batch: int, accumulate: int) -> Rng:
        """The chance of one of the `accumulate` micro-batches of this rank in this step, counted from 0.

        It is that of the draw, whichever rank has it. Dropout draws from torch's global generator, so that is seeded
        for the same place; the ranks of a sequence group hold other tokens, and drop others.
        """
        engine, place = self.engine, (self.step, phase)
        number = micro_batch * engine.data_world + engine.data_rank
        part = (engine.sequence.rank,) if engine.sequence else ()
        torch.manual_seed(seed_of(self.seed, "global", *place, number, *part))
        done = self.pace.done(phase, self.step)
        return Rng(
            own=generator(engine.device, self.seed, "own", *place, number),
            shared=generator("cpu", self.seed, "shared", *place, micro_batch),
            seed=self.seed,
            draw=done * accumulate * engine.data_world + number,
            done=done,
        )
