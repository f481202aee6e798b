"""A meta-learner's loss of a micro-batch, and what a network must be for it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from weft.contracts import DEFAULT, Batch, Loss, Model, NoState, Rng, State
from weft.errors import ConfigError
from weft.math.meta import MetaGradient, Weights, carrying, first_order, names_in, second_order
from weft.math.sharded import held
from weft.objectives.learned_rates import LearnedRates, empty_rate, groups_of
from weft.objectives.meta_learning import LearningRates, MetaLearner
from weft.objectives.rows import Rows, current, replayed, row_losses

ROLE = DEFAULT.name


class Stepping(Protocol):
    """Where the rates of inner steps come from."""

    def steps(self, bounded: bool = True) -> dict[str, Tensor]: ...


@dataclass
class FixedRates(NoState):
    """Rates that stay, by the name of what they move."""

    values: Mapping[str, Tensor]

    @classmethod
    def of(cls, rate: float, head_rate: float, model: Model) -> "FixedRates":
        trained = model.adapters.parameters(ROLE)
        groups = groups_of(model, trained)
        sizes = {"adapter": rate, "head": head_rate}
        return cls({n: torch.full_like(empty_rate(p, "tensor"), sizes[groups[n]]) for n, p in trained.items()})

    def steps(self, bounded: bool = True) -> dict[str, Tensor]:
        return dict(self.values)


def meta_loss(objective: MetaLearner, model: Model, batch: Batch, state: State, rng: Rng) -> Loss:
    """The mean loss after the inner steps, counted for each document that is asked then, with its gradient. Metrics:
    of learned rates, what `LearnedRates.told` says."""
    refuse_scaled_losses(batch["ids"].device)
    rows = current(batch)
    # Each glance at a batch cuts it anew.
    order = torch.randperm(len(rows.labels), generator=rng.own, device=rows.labels.device)
    chunks, later = rows.ordered(order).chunks(objective.inner_steps), rows.beside(replayed(batch))
    trained = model.adapters.parameters(ROLE)
    with resting_dropout(model.network, objective.dropout):
        found = asked(objective, model, state, trained, chunks, later)
    tensors, gradients = dict[str, Tensor](trained), dict(found.weights)
    metrics: dict[str, Tensor] = {}
    if isinstance(state, LearnedRates):
        own = state.through(found.rates, isinstance(objective, LearningRates) and objective.inner_relu)
        tensors |= {f"rates/{name}": value for name, value in state.values.items()}
        gradients |= {f"rates/{name}": gradient for name, gradient in own.items()}
        metrics = {name: number * later.known() for name, number in state.told().items()}
    return Loss(carrying(found.loss, tensors, gradients, later.known()), metrics)


def asked(
    objective: MetaLearner,
    model: Model,
    state: State,
    trained: Mapping[str, nn.Parameter],
    chunks: list[Rows],
    later: Rows,
) -> MetaGradient:
    """The gradient by the objective's order."""
    bounded = not isinstance(objective, LearningRates) or objective.inner_relu
    rates, clip = cast(Stepping, state).steps(bounded), objective.inner_clip
    names = names_in(model.network, trained)
    if objective.order == "first":
        return first_order(
            trained, rates, [lambda c=c: mean_loss(model, c) for c in chunks], lambda: mean_loss(model, later), clip
        )

    def at(fast: Weights, rows: Rows) -> Tensor:
        return mean_loss(replace(model, weights={names[name]: tensor for name, tensor in fast.items()}), rows)

    return second_order(
        trained, rates, [lambda fast, c=c: at(fast, c) for c in chunks], lambda fast: at(fast, later), clip
    )


def mean_loss(model: Model, rows: Rows) -> Tensor:
    """Mean over the documents with a label, ()."""
    return row_losses(model.logits(rows.question()), rows.labels).sum() / rows.known().clamp(min=1)


@contextmanager
def resting_dropout(network: nn.Module, dropout: bool) -> Iterator[None]:
    """Inside, modules answer as in evaluation unless dropout is wanted; each is as it was afterwards."""
    before = {} if dropout else {module: module.training for module in network.modules()}
    if not dropout:
        network.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def refuse_scaled_losses(device: torch.device) -> None:
    """Raises ConfigError under fp16, which an engine may have chosen for itself."""
    if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16:
        raise ConfigError(
            "engine.precision: this device multiplies in fp16, whose losses must be scaled, and the objective takes "
            "gradients of losses that are not. Write engine.precision=fp32."
        )


def check_network(objective: MetaLearner, model: Model) -> None:
    """Raises ModelError or ConfigError for a network whose weights inner steps cannot move, or that notes down what it
    sees in them."""
    trained = model.adapters.parameters(ROLE)
    if any(held(parameter) is not parameter for parameter in trained.values()):
        raise ConfigError(
            f"parallel.shard: objective '{objective.kind}' moves weights between a block's runs, and here they lie in "
            "parts. Write parallel.shard=1."
        )
    names_in(model.network, trained)
    if objective.dropout:
        noting = [path for path, m in model.network.named_modules() if getattr(m, "running_mean", None) is not None]
        if noting:
            raise ConfigError(
                f"objective.dropout: '{noting[0]}' keeps running statistics, which inner steps on parts of a batch "
                "would spoil. Write objective.dropout=false."
            )
