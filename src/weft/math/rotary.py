"""Rotary positions in real numbers: neighbouring pairs of a head's numbers are turned by angles of their place.

Su et al. 2021, arXiv:2104.09864, eq. 34. A pair (a, b) becomes (a c - b s, b c + a s): x cos + swapped(x) sin, with sin
negative at even places. Letters: N tokens, H heads, D width of a head.
"""

import torch
from torch import Tensor


def signed(sin: Tensor) -> Tensor:
    """(..., D) of the sines (..., D / 2) of pairs, with the signs that `turned` expects."""
    return torch.stack([-sin, sin], -1).flatten(-2)


def doubled(cos: Tensor) -> Tensor:
    """(..., D) of the cosines (..., D / 2) of pairs."""
    return cos.repeat_interleave(2, -1)


def swapped(x: Tensor) -> Tensor:
    """(b, a) for each pair (a, b) of x (..., D)."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., N, H, D) turned by tables (..., N, 1, D), which may carry a factor of each token too."""
    return x * cos + swapped(x) * sin
