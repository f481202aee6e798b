"""Distribution-matching distillation: the gradient that moves a student's samples toward the teacher's distribution.

Yin et al. 2023, arXiv:2311.18828 (DMD); Yin et al. 2024, arXiv:2405.14867 (DMD2). Both differences of scores are
written as differences of estimates of the data: at one (x_t, t) the score is (x0 (1 - t) - x_t) / t^2 up to sign.
"""

import torch
from torch import Tensor


def learned_mean(values: Tensor, given: Tensor | None) -> Tensor:
    """The mean (B,) of values (B, C, F, H, W) over the frames that are not given; given: (B, F) bool. In fp32."""
    if given is None:
        return values.float().flatten(1).mean(1)
    by_frame = values.float().mean((1, 3, 4))  # (B, F)
    return (by_frame * ~given).sum(1) / (~given).sum(1)


def matching_gradient(sample: Tensor, fake: Tensor, real: Tensor, given: Tensor | None = None) -> Tensor:
    """(fake - real) / mean |sample - real|, each item by its own mean; 0 where frames are given. arXiv:2311.18828,
    eq. 7 and 8.

    sample: what the student made. fake, real: what critic and teacher take it for, once noised: all (B, C, F, H, W).
    """
    distance = learned_mean((sample.float() - real.float()).abs(), given).reshape(-1, 1, 1, 1, 1)
    # A sample that is exactly the teacher's has no direction to go. What is no number stays none: the loop must see it.
    gradient = torch.where(distance == 0, 0.0, (fake.float() - real.float()) / distance)
    return gradient if given is None else gradient.masked_fill(given[:, None, :, None, None], 0.0)


def surrogate_loss(sample: Tensor, gradient: Tensor, given: Tensor | None = None) -> Tensor:
    """(B,) fp32: 1/2 mean (x - stop(x - g))^2, whose gradient by the sample is g over the numbers of the mean."""
    target = (sample.float() - gradient).detach()
    return 0.5 * learned_mean((sample.float() - target).square(), given)


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """u + g (c - u): Wan's and VideoX-Fun's convention. Self-Forcing writes c + g' (c - u), where g' = g - 1."""
    return unconditional + guidance * (conditional - unconditional)
