"""Dropout on the rank activations, between A and B. One function for both backends, so that they draw alike."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class RankDropout:
    """Three ways to thin h = A x (B, ..., r) while training; probabilities of being dropped."""

    activation: float  # each number by itself, kept ones scaled by 1 / (1 - p)
    rank: float  # a rank of an item for all of its tokens, kept ones scaled by 1 / (1 - p)
    module: float  # the whole layer's change for this call, not rescaled

    @property
    def acts(self) -> bool:
        return bool(self.activation or self.rank or self.module)

    def thin(self, h: Tensor) -> Tensor:
        """h (B, ..., r) thinned. Chance comes from the device's own generator, which recomputation replays."""
        if self.activation:
            h = functional.dropout(h, self.activation)
        if self.rank:
            keep = torch.rand(h.shape[0], h.shape[-1], device=h.device) > self.rank
            between = (1,) * (h.dim() - 2)
            h = h * (keep / (1 - self.rank)).to(h.dtype).view(h.shape[0], *between, h.shape[-1])
        if self.module:
            # A product, not a branch: all ranks make the same calls, and every parameter gets a gradient (zero).
            h = h * (torch.rand((), device=h.device) >= self.module).to(h.dtype)
        return h
