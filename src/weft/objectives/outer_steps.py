"""Optimizers around optimizers: steps that learned rates stretch, and gradients that are clipped group by group.

An engine may leave to an optimizer whether it moves, and by what the gradient is divided: torch's contract of fused
kernels, `found_inf` and `grad_scale`, which is passed on here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

FLAGS = ("grad_scale", "found_inf")
Sizes = Callable[[], Mapping[str, Tensor]]  # by the name of what is trained


class Around(Optimizer):
    """What a kind of step does before and after that of the optimizer inside, whose groups and state are its own."""

    def __init__(self, inner: Optimizer) -> None:
        # torch's own is not called: it would make groups of its own.
        self.inner = inner
        self.defaults = inner.defaults
        vars(self)["_step_supports_amp_scaling"] = vars(inner).get("_step_supports_amp_scaling", False)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.state

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def pass_on(self) -> None:
        """The step of the optimizer inside, with what the engine has said of it."""
        said = {name: vars(self)[name] for name in FLAGS if name in vars(self)}
        vars(self.inner).update(said)
        try:
            self.inner.step()
        finally:
            for name in said:
                delattr(self.inner, name)

    def named(self) -> dict[str, nn.Parameter]:
        """What it moves, by name."""
        return named(self)


class StretchedStep(Around):
    """Another optimizer's step, each number of it stretched by a factor: with Adam a factor of the gradient would be
    divided out again. Not in the paper; measured best (`docs/guides/continual.md`)."""

    def __init__(self, inner: Optimizer, factors: Sizes) -> None:
        super().__init__(inner)
        self.factors = factors

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the loop computes gradients beforehand"
        own = self.named()
        before = {name: parameter.clone() for name, parameter in own.items()}
        self.pass_on()
        factors = self.factors()
        for name, parameter in own.items():
            # A factor of 1, and a step that was not taken, leave the bits as they are.
            stretched = before[name] + (parameter - before[name]) * factors[name]
            parameter.copy_(torch.where(factors[name] == 1, parameter, stretched))


class ClippedGroups(Around):
    """Another optimizer's step by a gradient of which each group is cut to a length of its own; 0: no group is."""

    def __init__(self, inner: Optimizer, length: float) -> None:
        super().__init__(inner)
        self.length = length

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the loop computes gradients beforehand"
        scale = vars(self).get("grad_scale")
        for group in self.param_groups if self.length else ():
            found = [p.grad for p in group["params"] if p.grad is not None]
            if found:
                norm = nn.utils.get_total_norm(found)
                limit = self.length if scale is None else self.length * scale
                for gradient in found:  # as torch.nn.utils.clip_grad_norm_ does
                    gradient.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        self.pass_on()


class RateDescent(Optimizer):
    """w - rate * gradient with a rate for each number: the paper's outer step. The schedule's factor is `lr`."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, parameters: Mapping[str, nn.Parameter], rates: Sizes) -> None:
        group = {"params": list(parameters.values()), "names": list(parameters), "lr": 1.0, "base_lr": 1.0}
        super().__init__([group], {"lr": 1.0})
        self.rates = rates
        vars(self)["_step_supports_amp_scaling"] = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the loop computes gradients beforehand"
        rates, lr = self.rates(), self.param_groups[0]["lr"]
        for name, parameter in named(self).items():
            if parameter.grad is None:
                continue
            gradient = parameter.grad if self.grad_scale is None else parameter.grad / self.grad_scale
            way = rates[name] * gradient if lr == 1 else lr * rates[name] * gradient
            if self.found_inf is not None:
                way = torch.where(self.found_inf > 0, 0.0, way)
            parameter.sub_(way)


def named(optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """What an optimizer moves, by name."""
    groups = optimizer.param_groups
    return {n: p for group in groups for n, p in zip(group["names"], group["params"], strict=True)}
