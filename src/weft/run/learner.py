"""All of a run that moves: what a checkpoint saves, and what a resumed run restores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import Optimizer

from weft.contracts import Engine, Experience, Expert, Model, Objective, Rng, State
from weft.math.chance import generator, seed_of
from weft.run.moving_average import MovingAverage
from weft.run.pace import Pace


@dataclass
class Learner:
    """A model under training. step: optimizer steps done. drawn: micro-batches that all ranks have drawn so far.
    rates: of optimizers whose learning rate at the top of the schedule was set while training. copying: waits for a
    checkpoint that still copies weights, moments and averages."""

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
    copying: Callable[[], None] | None = None
    _parameters: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The networks that are trained."""
        return self.model.family.experts

    @property
    def shown(self) -> tuple[str, ...]:
        """The roles whose adapters are exported, measured and sampled, one for each expert."""
        return self.objective.shown(self.experts)

    def hold(self) -> None:
        """Called before weights, moments or averages change: until a checkpoint that is being made has copied them."""
        if self.copying is not None:
            self.copying()
            self.copying = None

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Of a role's adapter; looked for once, since in hundreds of layers that takes as long as an optimizer step."""
        if role not in self._parameters:
            self._parameters[role] = self.model.adapters.parameters(role)
        return self._parameters[role]

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
        seed_global(engine.device, seed_of(self.seed, "global", *place, number, *part))
        done = self.pace.done(phase, self.step)
        return Rng(
            own=generator(engine.device, self.seed, "own", *place, number),
            shared=generator("cpu", self.seed, "shared", *place, micro_batch),
            seed=self.seed,
            draw=done * accumulate * engine.data_world + number,
            done=done,
        )


def seed_global(device: torch.device, seed: int) -> None:
    """Seed torch's global generators of the host and of one device; `torch.manual_seed` would go to every device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[number].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
