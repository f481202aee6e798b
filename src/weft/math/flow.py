"""Rectified flow: the one place where time, noise level and the network's timestep are computed, all from one fp32 t.

t is in [0, 1], 0 is data, 1 is noise; sigma = t; the network is asked at T = 1000 t (a float, never truncated).
Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206.
"""

import torch
from torch import Tensor

TIMESTEPS = 1000.0  # the networks' unit of time


def per_item(values: Tensor, like: Tensor) -> Tensor:
    """(B,) reshaped so that it broadcasts over the other axes of like."""
    return values.reshape(-1, *([1] * (like.dim() - 1)))


def noised(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) data + t noise, in fp32. Esser et al. 2024, eq. 13."""
    sigma = per_item(t.float(), data)
    return (1 - sigma) * data.float() + sigma * noise.float()


def velocity_target(data: Tensor, noise: Tensor) -> Tensor:
    """dx/dt = noise - data, which does not depend on t; fp32."""
    return noise.float() - data.float()


def denoised(x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """The data that a velocity at (x, t) points to: x - t v."""
    return x.float() - per_item(t.float(), x) * velocity.float()


def network_timestep(t: Tensor) -> Tensor:
    """T = 1000 t in fp32, as Wan and HunyuanVideo take it."""
    return t.float() * TIMESTEPS


def shifted(t: Tensor, shift: float) -> Tensor:
    """Move times toward noise: s t / (1 + (s - 1) t). Esser et al. 2024, eq. 23."""
    return shift * t / (1 + (shift - 1) * t)


def unshifted(t: Tensor, shift: float) -> Tensor:
    """The inverse of shifted."""
    return t / (shift - (shift - 1) * t)


def loss_weight(t: Tensor, scheme: str) -> Tensor:
    """Weight (B,) of each item's loss at its time. Esser et al. 2024, section 3.1.

    none: 1. sigma-sqrt: t^-2. cosmap: 2 / (pi (1 - 2 t + 2 t^2)).
    """
    t = t.float()
    if scheme == "none":
        return torch.ones_like(t)
    if scheme == "sigma-sqrt":
        return t.clamp_min(1e-3) ** -2  # t is at least 1/1000 in the reference's table of 1000 timesteps
    assert scheme == "cosmap", f"unknown weighting {scheme}"
    return 2 / (torch.pi * (1 - 2 * t + 2 * t**2))
