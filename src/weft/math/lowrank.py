"""Arithmetic of low-rank changes dW = scale B A, with A (r, in) and B (out, r). Pure; sums are taken in fp32."""

from torch import Tensor


def delta_weight(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """dW (out, in) = scale B A, in fp32. Hu et al. 2021, arXiv:2106.09685, eq. 3."""
    return scale * (b.float() @ a.float())


def delta_norm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """||scale B A||_F without forming the (out, in) matrix: its square is the sum of (B'B) * (A A')."""
    a, b = a.float(), b.float()
    # The Gram matrices are (r, r); rounding can take a vanishing sum below zero.
    return scale * ((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0).sqrt()


def norm_ratio(norm: Tensor, limit: float) -> Tensor:
    """What dW is multiplied with so that its norm stays at the limit: min(n', m) / n' with n' = max(n, m / 2).

    The floor m / 2 keeps a new adapter, whose norm is zero, from a division by it. Scale-weight-norms of kohya's and
    musubi's trainers.
    """
    floored = norm.clamp_min(limit / 2)
    return floored.clamp_max(limit) / floored
