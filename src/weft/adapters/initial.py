"""First values of an adapter. They depend on (seed, adapter name, path) alone: not on backend, device or order."""

import hashlib
from collections.abc import Callable, Mapping
from math import sqrt

import torch
from torch import Tensor, nn

OVERSAMPLING = 8  # directions beyond the rank, which make the last ones sharp; Halko et al. 2011, section 4.2


def chance_of(seed: int, name: str, place: str) -> torch.Generator:
    """A generator on the CPU for one place of one adapter."""
    digest = hashlib.sha256(f"{seed}\0{name}\0{place}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def kaiming(shape: torch.Size, chance: torch.Generator) -> Tensor:
    """fp32 on the CPU: U(-1/sqrt(fan), 1/sqrt(fan)), fan being all but the first size: PEFT's kaiming_uniform with
    a = sqrt 5."""
    return nn.init.kaiming_uniform_(torch.empty(shape, device="cpu", dtype=torch.float32), a=sqrt(5), generator=chance)


def kaiming_but(
    zero: str, chance: Callable[[str], torch.Generator], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Random values for all tensors of a product but one, which is zero: together they are nothing."""
    return {end: torch.zeros(shape) if end == zero else kaiming(shape, chance(end)) for end, shape in shapes.items()}


def initial_magnitude(weight: Tensor) -> Tensor:
    """DoRA's magnitude (out,): the norm of each row of W, taken in fp32. arXiv:2402.09353, section 4.1."""
    return torch.linalg.vector_norm(weight.detach().float(), dim=1)


def principal_factors(
    weight: Tensor, rank: int, scale: float, iterations: int | None, seed: int
) -> tuple[Tensor, Tensor]:
    """PiSSA: A (r, in) and B (out, r) with scale B A the best rank-r approximation of W (out, in).

    arXiv:2404.02948, eq. 2 and 3. iterations: of the randomised SVD (Halko et al. 2011, arXiv:0909.4061); None: exact.
    """
    if iterations is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        devices = [weight.device] if weight.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)  # it draws from the device's own generator
            u, s, v = torch.svd_lowrank(weight, q=min(rank + OVERSAMPLING, *weight.shape), niter=iterations)
        vh = v.mT
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
