"""The moving average of an adapter's weights, kept in one stretch of memory where the weights lie in one."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weft.math.end_to_end import home_of, stretch_of
from weft.math.sharded import held


class MovingAverage:
    """The average of one role's adapter: average += (1 - decay) (weights - average), after each optimizer step that
    moved. It begins at the first of them; up to the step `start` it equals the weights."""

    def __init__(self, decay: float, start: int) -> None:
        self.decay, self.start = decay, start
        self._tensors: dict[str, Tensor] = {}
        self._begun: Tensor | None = None  # () bool, on the device
        self._weights: Tensor | None = None  # the stretch in which they lie
        self._flat: Tensor | None = None  # the average of that stretch

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The average by the parameters' names; empty before it has begun. The host waits for the device to say so."""
        return self._tensors if self._begun is not None and bool(self._begun) else {}

    @tensors.setter
    def tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._begun = torch.tensor(True, device=next(iter(tensors.values())).device) if tensors else None
        self._weights = self._flat = None

    @torch.no_grad()
    def update(self, step: int, parameters: Mapping[str, nn.Parameter], moved: Tensor | None = None) -> None:
        """Follow the weights after an optimizer step. moved: () bool, whether it moved them, on their device; None: it
        did. The host reads nothing."""
        if not self._stands(parameters):
            self._lay(parameters)
        begun, rate = self._begun, 1.0 if step <= self.start else 1 - self.decay
        assert begun is not None
        moved = torch.ones_like(begun) if moved is None else moved.to(begun.device)
        weight = torch.where(begun, rate, 1.0) * moved
        if self._flat is not None and self._weights is not None:
            self._flat.lerp_(self._weights, weight)
        else:
            averages = [held(self._tensors[name]) for name in parameters]
            weights = [held(p.detach()) for p in parameters.values()]
            torch._foreach_lerp_(averages, weights, [weight] * len(weights))  # pyright: ignore[reportPrivateImportUsage]
        self._begun = begun | moved

    def _stands(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether what is kept fits the weights where they are now."""
        if self._tensors.keys() != parameters.keys():
            return False
        if self._weights is None:
            return stretch_of([held(p.detach()) for p in parameters.values()]) is None
        home = home_of(self._weights)
        return all(home_of(p) == home for p in parameters.values())

    def _lay(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Room for the average, beginning with the weights where it has no numbers yet."""
        before, own = self._tensors, {name: held(p.detach()) for name, p in parameters.items()}
        self._weights = stretch_of(list(own.values()))
        if self._weights is None:
            self._flat = None
            self._tensors = {name: before.get(name, p.detach().clone()) for name, p in parameters.items()}
        else:
            first, self._flat = self._weights.storage_offset(), self._weights.clone()
            self._tensors = {
                name: self._flat.as_strided(t.shape, t.stride(), t.storage_offset() - first) for name, t in own.items()
            }
            for name in before.keys() & own.keys():
                self._tensors[name].copy_(before[name])
        if self._begun is None:
            self._begun = torch.tensor(False, device=next(iter(own.values())).device)
