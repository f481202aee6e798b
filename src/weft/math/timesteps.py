"""Densities of training times as quantile functions, so that ranges are cut and strata drawn without distortion.

A density is given by Q(u), the inverse of its cumulative distribution F(t). A time in [low, high] is
Q(F(low) + u (F(high) - F(low))) for uniform u: exactly the density restricted to the range, as rejection would give.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.math.chance import generator
from weft.math.flow import shifted, unshifted
from weft.math.sending import sent


@dataclass(frozen=True)
class Density:
    """logit(t before the shift) is normal(mean, std), or t before the shift is uniform when std is None.

    shift 1 moves nothing. Uniform: std None. Sigmoid of scale k: mean 0, std k. Logit-normal: Esser et al. 2024,
    eq. 19. Shift: applied to either, once, and to the density alone: x_t is made from the same t.
    """

    mean: float = 0.0
    std: float | None = None
    shift: float = 1.0

    def quantile(self, u: Tensor) -> Tensor:
        """Times (B,) fp32 of probabilities u (B,), computed in fp64."""
        u = u.double()
        t = u if self.std is None else torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        return shifted(t, self.shift).float()

    def cumulative(self, t: Tensor) -> Tensor:
        """Probability (B,) fp64 that a draw is below t."""
        t = unshifted(t.double(), self.shift)
        return t if self.std is None else torch.special.ndtr((torch.logit(t) - self.mean) / self.std)


def draw_times(density: Density, u: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Times (B,) fp32 of the density cut to [low, high], from uniform u (B,)."""
    # On the host: a () tensor of it is a number to the device, and nothing waits for a copy.
    bounds = density.cumulative(torch.tensor([low, high], dtype=torch.float64))
    t = density.quantile(bounds[0] + u.double() * (bounds[1] - bounds[0]))
    return t.clamp(low, high)  # fp32 rounding must not leave the range


def stratified(uniform: Tensor, first: int, strata: int, seed: int) -> Tensor:
    """Uniform draws (B,), number first to first+B-1 of a run, made even: each run of `strata` draws hits each of the
    `strata` equal parts of [0, 1] once, in an order shuffled anew for each round. One draw alone is still uniform,
    whatever the numbers; evenness needs numbers without gaps or repeats, as batches of one size give.
    """
    orders: dict[int, list[int]] = {}
    cells: list[float] = []
    for number in range(first, first + len(uniform)):
        cycle, place = divmod(number, strata)
        if cycle not in orders:
            orders[cycle] = torch.randperm(strata, generator=generator("cpu", seed, "strata", cycle)).tolist()
        cells.append(orders[cycle][place])
    return (sent(torch.tensor(cells, dtype=torch.float64), uniform.device) + uniform.double()) / strata
