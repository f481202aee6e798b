"""A learning rate for each trained tensor, row or number, that is itself learned: its values, and what moves it.

Rates are paired with what is trained by name. Those of the head and of the rest are groups with beginnings, rates and
clips of their own: a head's gradients are larger by orders of magnitude (`docs/guides/continual.md`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from weft.contracts import Model, as_encoder
from weft.errors import ConfigError
from weft.objectives.meta_learning import Rates
from weft.objectives.outer_steps import ClippedGroups

GROUPS = ("adapter", "head")


@dataclass
class LearnedRates:
    """Rates as an objective carries them from step to step. values: what is learned, by the name of what it moves: the
    rate itself, or its logarithm. groups: name -> adapter or head."""

    recipe: Rates
    groups: Mapping[str, str]
    values: dict[str, nn.Parameter] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Rates, model: Model, trained: Mapping[str, nn.Parameter]) -> "LearnedRates":
        """Fresh rates of all that is trained."""
        rates = cls(recipe, groups_of(model, trained))
        for name, parameter in trained.items():
            rates.values[name] = nn.Parameter(rates.first(name, empty_rate(parameter, recipe.granularity)))
        return rates

    def first(self, name: str, like: Tensor) -> Tensor:
        """What a rate begins with, in the form in which it is learned."""
        start = self.recipe.start_of(self.groups[name])
        return torch.full_like(like, log(start) if self.recipe.param == "exp" else start)

    @torch.no_grad()
    def steps(self, bounded: bool = True) -> dict[str, Tensor]:
        """The rates. bounded: none below 0; otherwise as published for CIFAR, where an inner step may go uphill."""
        return {name: self._step(value.detach(), bounded) for name, value in self.values.items()}

    def _step(self, value: Tensor, bounded: bool) -> Tensor:
        if self.recipe.param == "exp":
            return value.exp()
        return value.relu() if bounded else value

    @torch.no_grad()
    def through(self, found: Mapping[str, Tensor], bounded: bool = True) -> dict[str, Tensor]:
        """Gradients of the rates -> those of what is learned."""
        slopes = {name: self._slope(value.detach(), bounded) for name, value in self.values.items()}
        return {name: gradient * slopes[name] for name, gradient in found.items()}

    def _slope(self, value: Tensor, bounded: bool) -> Tensor:
        if self.recipe.param == "exp":
            return value.exp()
        return (value > 0).to(value.dtype) if bounded else torch.ones_like(value)

    @torch.no_grad()
    def grown(self) -> dict[str, Tensor]:
        """How many times its beginning each rate is: exactly 1 until it moves."""
        out = {}
        for name, value in self.values.items():
            first = self.first(name, value.detach())
            out[name] = (value - first).exp() if self.recipe.param == "exp" else value.relu() / first
        return out

    @torch.no_grad()
    def told(self) -> dict[str, Tensor]:
        """Of each group the mean rate, the smallest, and the share that is no longer above 0: () each."""
        numbers: dict[str, Tensor] = {}
        for group in GROUPS:
            own = [self._step(v.detach(), False).flatten() for n, v in self.values.items() if self.groups[n] == group]
            if own:
                every = torch.cat(own)
                numbers |= {f"rate_{group}": every.mean(), f"rate_{group}_min": every.min(),
                            f"rate_{group}_dead": (every <= 0).float().mean()}  # fmt: skip
        return numbers

    def optimizer(self) -> Optimizer:
        """What moves them: each group by its own rate, after its own clip, and without weight decay."""
        recipe = self.recipe
        groups: list[dict[str, Any]] = []
        for group in GROUPS:
            own = {name: value for name, value in self.values.items() if self.groups[name] == group}
            if own:
                lr = recipe.lr_of(group)
                groups.append({"params": list(own.values()), "names": list(own), "lr": lr, "base_lr": lr})
        fused = next(iter(self.values.values())).device.type in ("cpu", "cuda")
        kind = Adam if recipe.optimizer == "adam" else SGD
        return ClippedGroups(kind(groups, lr=recipe.lr, weight_decay=0.0, fused=fused), recipe.clip)

    # ---- Checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        return {"rates": {name: value.detach() for name, value in self.values.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError for rates of other tensors, or of another granularity."""
        saved = state["rates"]
        odd = [
            name
            for name in sorted(saved.keys() | self.values.keys())
            if name not in saved or name not in self.values or saved[name].shape != self.values[name].shape
        ]
        if odd:
            raise ConfigError(
                f"objective.rates: the checkpoint has others, first that of '{odd[0]}'. Go on with the same adapter, "
                "objective.rates.granularity and labels, or start a new run."
            )
        for name, value in self.values.items():
            value.copy_(saved[name])


def groups_of(model: Model, trained: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Name of a trained tensor -> head, where a module that is trained whole holds it, or adapter."""
    heads = tuple(f"{path}." for path in as_encoder(model.family).heads(model.network))
    return {name: "head" if name.startswith(heads) else "adapter" for name in trained}


def empty_rate(parameter: Tensor, granularity: str) -> Tensor:
    """Zeros in the shape of a tensor's rates: (...) as it is, (rows, 1, ...), or (). At least fp32."""
    shape = {
        "element": parameter.shape,
        "row": parameter.shape[:1] + (1,) * (parameter.dim() - 1),
        "tensor": (),
    }[granularity]
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros(shape, dtype=dtype, device=parameter.device)
