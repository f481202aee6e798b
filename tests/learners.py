"""A learner on a small real Wan, streams whose batches are given, and milestones at which nothing happens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.small import config_of, plain_config
from weft.contracts import DEFAULT, Batch, Loss, Model, Phase
from weft.objectives.flow_matching import FlowMatching, Question
from weft.run.assemble import assemble
from weft.run.config import RunConfig
from weft.run.learner import Learner
from weft.run.train import Course, Outcome, train

ROLE = DEFAULT.name
TEXT_WIDTH = 128  # of the shipped text encoder


def small_config(root: Path, model: Path, **change: Any) -> RunConfig:
    """A run's config whose clips are never looked for."""
    return config_of(plain_config(root, model, root / "no clips"), **change)


def learner_of(config: RunConfig, shaken: bool = True) -> Learner:
    """The learner of a config; shaken: its adapter is given weights that change the network, B included."""
    torch.set_num_threads(1)  # tensors this small are slower on several
    learner = assemble(config, config.engine.open())
    if shaken:
        shake(learner)
    return learner


@torch.no_grad()
def shake(learner: Learner, seed: int = 3) -> None:
    chance = torch.Generator().manual_seed(seed)
    for parameter in weights(learner).values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=chance))


def weights(learner: Learner) -> dict[str, Any]:
    """The trained weights; with several roles those of all, under their names."""
    adapters = learner.model.adapters
    if adapters.names == (ROLE,):
        return dict(adapters.parameters(ROLE))
    return {f"{name}.{key}": p for name in adapters.names for key, p in adapters.parameters(name).items()}


def frozen(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Copies that later steps do not move."""
    return {name: t.detach().clone() for name, t in tensors.items()}


def batch_of(items: int, seed: int = 0, key: str = "clip") -> Batch:
    """Latents (B, 16, 2, 4, 4), text of 5 tokens, and the noise and times that Given trains on."""
    chance = torch.Generator().manual_seed(seed)
    shape = (items, 16, 2, 4, 4)
    tensors = {
        "latents": torch.randn(shape, generator=chance),
        "text": torch.randn(items, 5, TEXT_WIDTH, generator=chance),
        "noise": torch.randn(shape, generator=chance),
        "t": torch.rand(items, generator=chance),
    }
    return Batch(tensors, tuple(f"{key} {seed}.{i}" for i in range(items)))


def parts(batch: Batch, *sizes: int) -> list[Batch]:
    """The same items in several batches."""
    edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [Batch({name: t[a:b] for name, t in batch.tensors.items()}, batch.keys[a:b]) for a, b in pairwise(edges)]


class Given(FlowMatching):
    """Flow matching on the noise and the times that a batch brings, so that cutting it up changes no draw."""

    def loss(self, phase, model, batch, state, rng) -> Loss:
        return Loss(self.given_errors(model, batch).sum())

    def given_errors(self, model: Model, batch: Batch) -> Tensor:
        """Each item's error (B,)."""
        return self.errors(model, batch, Question(batch["noise"], batch["t"], ROLE))


@dataclass(frozen=True)
class FixedStream:
    """An experience that repeats the batches it is given."""

    given: Sequence[Batch]
    last_step: int
    name: str = "given"

    def batches(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        return islice(cycle(self.given), start, None)


@dataclass
class NoMilestones:
    """Nothing happens between steps; the names of optimizers that did not move are noted."""

    skips: list[str] = field(default_factory=list)

    def is_due(self, learner: Learner) -> bool:
        return False

    def after_step(self, learner: Learner) -> None: ...
    def after_experience(self, learner: Learner) -> None: ...
    def skipped(self, learner: Learner, phase: Phase, outcome: Outcome) -> None:
        self.skips.extend(outcome.skipped)


def trained(learner: Learner, config: RunConfig, given: Sequence[Batch], milestones: Any = None) -> list[Any]:
    """The events of training through the config's steps on the given batches."""
    told: list[Any] = []
    stream = [FixedStream(given, config.schedule.steps)]
    train(learner, stream, Course(config.schedule, milestones or NoMilestones(), told.append))
    return told
