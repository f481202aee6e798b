"""First values of an adapter. They depend on (seed, adapter name, path) alone: not on backend, device or order."""

import hashlib
from math import sqrt

import torch
from torch import Tensor, nn


def initial_a(seed: int, name: str, path: str, shape: torch.Size) -> Tensor:
    """A (r, in), fp32 on the CPU: U(-1/sqrt(in), 1/sqrt(in)), which is PEFT's kaiming_uniform with a = sqrt 5.

    B begins at zero, so that a new adapter changes nothing.
    """
    digest = hashlib.sha256(f"{seed}\0{name}\0{path}".encode()).digest()
    chance = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return nn.init.kaiming_uniform_(torch.empty(shape, device="cpu"), a=sqrt(5), generator=chance)


def initial_magnitude(weight: Tensor) -> Tensor:
    """DoRA's magnitude (out,): the norm of each row of W, taken in fp32. arXiv:2402.09353, section 4.1."""
    return torch.linalg.vector_norm(weight.detach().float(), dim=1)
