"""AdamW over flat memory: weights, moments and gradient lie end to end, and a step is a handful of kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from weft.math.end_to_end import EndToEnd

# Above so many numbers kernels are long and little is gained, while the flat gradient is a second one for a moment; and
# on a CPU fresh memory for it costs more than the step (malloc keeps 32 MiB, and gives back what is larger).
LARGEST = {"cuda": 2**28, "cpu": 2**23}


def can_be_flat(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether parameters are plain fp32 tensors on one device that has torch's fused AdamW."""
    first = parameters[0]
    alike = all(
        p.device == first.device and p.dtype == torch.float32 and p.is_contiguous() and not isinstance(p, DTensor)
        for p in parameters
    )
    return alike and sum(p.numel() for p in parameters) <= LARGEST.get(first.device.type, 0)


@dataclass(frozen=True)
class Memory:
    """What an optimizer moves. weights: (length,) fp32. steps: (tensors,) fp32, all equal. parts: of each group its
    weights, both moments and a count of steps, in that memory."""

    where: EndToEnd
    weights: Tensor
    steps: Tensor
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    addresses: list[int]  # of the parameters, while nobody has given them other memory


class FlatAdamW(AdamW):
    """Fused AdamW whose weights and moments lie end to end, each group's for itself; so does the gradient, which is
    gathered at a step and lives only in it. Groups, state and `state_dict` are torch's own, per parameter: views, so
    that its checkpoints and torch.optim.AdamW's are the same thing. Loss scaling and the guard against a gradient that
    is not finite are torch's contract of fused optimizers: `grad_scale` divides it, `found_inf` 1 moves nothing.

    A parameter without a gradient is left alone: such a step, and those after it, are torch's, tensor by tensor, as
    counts of steps then differ. The memory is laid at the first step, and again when somebody has replaced a
    parameter's data or loaded a state.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        assert can_be_flat(self.parameters), "these parameters cannot lie end to end"
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        self._memory: Memory | None = None
        self._gradient: Tensor | None = None
        self._room: Tensor | None = None  # for a gradient, in host memory
        self._uneven = False  # whether counts of steps differ, or may

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def apart(self) -> AdamW:
        """The same optimizer before its first step, of tensors that lie each for itself."""
        assert not self.state, "its memory is laid already"
        own = {key: value for key, value in self.defaults.items() if key in ("lr", "betas", "eps", "weight_decay")}
        return AdamW([dict(group) for group in self.param_groups], fused=True, **own)

    # ---- The gradient ----------------------------------------------------------------------------------------------

    def gather(self) -> Tensor | None:
        """Take the parameters' gradients for the next step, and give the flat one (length,). None when the step must
        be made tensor by tensor; then they stay where they are."""
        if self._gradient is not None:
            return self._gradient
        parameters = self.parameters
        gradients = [p.grad for p in parameters]
        here = [gradient for gradient in gradients if gradient is not None]
        if len(here) < len(parameters):
            self._uneven = self._uneven or bool(here)
            return None
        memory = self._laid()
        if memory is not None:
            self._gradient = memory.where.laid(here, room=self._room)
            if self._gradient.device.type == "cpu":  # where freed memory is given back, and fresh pages take time
                self._room = self._gradient
            clear(parameters)
        return self._gradient

    def gather_from(self, summed: Callable[[EndToEnd], tuple[Tensor, Sequence[bool]]]) -> None:
        """Take for the next step what the processes' gradients come to: a flat one, and which parameters have any."""
        memory, parameters = self._laid(), self.parameters
        where = memory.where if memory is not None else EndToEnd([parameters])
        flat, there = summed(where)
        if memory is not None and all(there):
            self._gradient = flat
            return
        self._uneven = self._uneven or any(there)
        for parameter, part, has in zip(parameters, where.views(flat), there, strict=True):
            parameter.grad = part if has else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._gradient = None
        super().zero_grad(set_to_none)

    # ---- A step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradient, self._gradient = self.gather(), None
        if gradient is None:
            super().step()
        else:
            assert self._memory is not None
            self._move(self._memory, gradient)
        return loss

    def _move(self, memory: Memory, gradient: Tensor) -> None:
        memory.steps.add_(1)
        for group, part, bounds in zip(self.param_groups, memory.parts, memory.where.bounds, strict=True):
            weights, first, second, step = part
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                [weights], [cut(gradient, bounds)], [first], [second], [], [step], lr=group["lr"], beta1=beta1,
                beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
                grad_scale=self.grad_scale, found_inf=self.found_inf,
            )  # fmt: skip
        if self.found_inf is not None:
            memory.steps.sub_(self.found_inf)
        increment_version(self.parameters)  # of the views: what others made of a parameter's last numbers is stale

    # ---- Memory ----------------------------------------------------------------------------------------------------

    def _laid(self) -> Memory | None:
        """The memory, laid anew where need be; None when counts of steps differ."""
        memory, parameters = self._memory, self.parameters
        if self._uneven:
            return None
        if memory is not None:
            if list(map(Tensor.data_ptr, parameters)) == memory.addresses:
                return memory
        elif not self._is_even():
            self._uneven = True
            return None
        self._memory = memory = self._lay(parameters)
        return memory

    def _is_even(self) -> bool:
        """Whether all parameters have been moved as often; asked where a state was loaded, and there the host waits."""
        counts = [self.state[p]["step"] for p in self.parameters if self.state.get(p)]
        if not counts:
            return True
        return len(counts) == len(self.parameters) and bool((torch.stack(counts) == counts[0]).all())

    @torch.no_grad()
    def _lay(self, parameters: Sequence[nn.Parameter]) -> Memory:
        where = EndToEnd([group["params"] for group in self.param_groups])
        weights = where.laid([p.detach() for p in parameters])
        states = [self.state[p] for p in parameters]
        if all(states):
            first, second = (where.laid([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq"))
            steps = torch.stack([state["step"] for state in states])
        else:
            first, second = torch.zeros_like(weights), torch.zeros_like(weights)
            steps = torch.zeros(len(parameters), device=weights.device)
        own = zip(
            parameters, states, steps.unbind(), where.views(weights), where.views(first), where.views(second),
            strict=True,
        )  # fmt: skip
        for parameter, state, step, weight, average, square in own:
            parameter.data = weight
            state.update(step=step, exp_avg=average, exp_avg_sq=square)
        step = states[0]["step"]
        parts = [(cut(weights, at), cut(first, at), cut(second, at), step) for at in where.bounds]
        return Memory(where, weights, steps, parts, list(map(Tensor.data_ptr, parameters)))


def cut(flat: Tensor, bounds: tuple[int, int]) -> Tensor:
    """A stretch of a flat tensor, without a copy."""
    begin, end = bounds
    return flat.narrow(0, begin, end - begin)


def clear(parameters: Sequence[nn.Parameter]) -> None:
    """Drop the gradients."""
    for parameter in parameters:
        parameter.grad = None
