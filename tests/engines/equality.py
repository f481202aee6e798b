"""The same training on any number of processes: micro-batches are dealt out, and what was learned comes back whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.learners import ROLE, Given, batch_of, parts, small_config
from weft.contracts import Batch
from weft.objectives.flow_matching import Question
from weft.run.assemble import assemble
from weft.run.learner import Learner

STEPS = 5
# fp32 sums of a gradient's parts differ by the order of adding, about 1e-7; AdamW divides by the root of the second
# moment, and five steps of it leave less than twenty times that.
BOUND = 2e-6
MAX_NORM = 0.05  # below the gradients' own length, so that clipping is part of what must agree


@dataclass(frozen=True)
class Case:
    """What is trained, and how processes share it."""

    parallel: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    family: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    micro_batches: int = 4  # of a step, on all processes together


@dataclass(frozen=True)
class Learned:
    """losses and norms of each step, the whole adapter after the last one, and its answer without gradients."""

    losses: list[float]
    norms: list[float]
    adapter: dict[str, Tensor]
    answer: Tensor


def learner_of(model: Path, case: Case) -> Learner:
    """A learner whose adapters change the network, with the same numbers on any mesh."""
    change = {"parallel": case.parallel, "engine": case.engine, "family": case.family, "adapter": case.adapter}
    config = small_config(model.parent, model, **change)
    learner = assemble(config, config.engine.open(config.parallel))
    for name in learner.model.adapters.names:
        shake(learner, name)
    return learner


def shake(learner: Learner, name: str) -> None:
    chance, adapters = torch.Generator().manual_seed(3), learner.model.adapters
    tensors = adapters.state_dict(name)
    noise = {key: 0.1 * torch.randn(t.shape, generator=chance) for key, t in tensors.items()}
    adapters.load_state_dict(name, {key: t + noise[key] for key, t in tensors.items()})


def taught(learner: Learner, batches: Sequence[Batch], role: str = ROLE, expert: str = ROLE) -> Tensor:
    """One step's gradient on this process's share of some batches; the mean loss of all items."""
    engine = learner.engine
    mine = batches[engine.data_rank :: engine.data_world]
    items = sum(len(batch.keys) for batch in batches)
    total = torch.zeros(())
    with learner.model.adapters.use(role):
        for number, batch in enumerate(mine, start=1):
            with engine.computing():
                here = engine.put(batch)
                loss = Given().errors(learner.model, here, Question(here["noise"], here["t"], expert)).sum()
            engine.backward(loss / items, last=number == len(mine))
            total += loss.detach()
    return engine.total(total) / items


def learned(model: Path, case: Case) -> Learned:
    """What five steps of AdamW make of a small model, on all processes that there are."""
    learner = learner_of(model, case)
    losses, norms = [], []
    for step in range(STEPS):
        batches = parts(batch_of(case.micro_batches, seed=step), *[1] * case.micro_batches)
        losses.append(float(taught(learner, batches)))
        (optimizer,) = learner.optimizers.values()
        norms.append(float(learner.engine.step(optimizer, MAX_NORM).norm))
    with learner.model.adapters.use(ROLE), learner.engine.computing():
        answer = Given().measure(learner.model, batch_of(1), "default", 0.5, 0)
    adapter = {name: t.clone() for name, t in learner.model.adapters.state_dict(ROLE).items()}
    return Learned(losses, norms, adapter, answer)


def all_learned(model: Path, cases: Mapping[str, Case]) -> dict[str, Learned]:
    """Several cases in the same processes, one after the other."""
    return {name: learned(model, case) for name, case in cases.items()}


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative error of a tensor."""
    assert found.keys() == expected.keys() and expected
    return max(float((found[k] - expected[k]).norm() / expected[k].norm()) for k in expected)
