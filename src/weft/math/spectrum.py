"""How large a change of a layer is and how many directions it has, by matrices no larger than its rank. In fp64."""

import torch
from torch import Tensor


def effective_rank(values: Tensor) -> Tensor:
    """exp of the entropy of the shares of singular values (..., r), (...); 0 where all are 0. Roy and Vetterli 2007,
    definition 1: 1 for one direction, r for r equal ones, and a scale makes no difference."""
    total = values.sum(-1)
    shares = values / total.clamp_min(torch.finfo(values.dtype).tiny).unsqueeze(-1)
    return torch.special.entr(shares).sum(-1).exp() * (total > 0)


def gram(rows: Tensor) -> Tensor:
    """X X' (r, r) of X (r, n), summed in fp64: in fp32 the root of what it loses would be as large as small singular
    values are. On the device of X, but for those that have no fp64."""
    wide = rows.to("cpu" if rows.device.type == "mps" else rows.device, torch.float64)
    return wide @ wide.mT


def norm_of_product(gram_b: Tensor, gram_a: Tensor) -> Tensor:
    """||B A||_F (...) from B'B and A A', both (..., r, r): its square is the sum of their products number by number."""
    # Rounding can take a vanishing sum below zero.
    return (gram_b * gram_a).sum((-2, -1)).clamp_min(0).sqrt()


def values_of_product(gram_b: Tensor, gram_a: Tensor) -> Tensor:
    """The r singular values (..., r) of B A, smallest first, from B'B and A A', both (..., r, r).

    With S the symmetric root of B'B, (B A)(B A)' has the eigenvalues of S A A' S besides zeros.
    """
    squares, directions = torch.linalg.eigh(gram_b)
    root = directions * squares.clamp_min(0).sqrt().unsqueeze(-2)  # B'B = root root'
    return torch.linalg.eigvalsh(root.mT @ gram_a @ root).clamp_min(0).sqrt()


def row_squares(weight: Tensor, numbers: int = 1 << 22) -> Tensor:
    """Sum of squares of each row (out,) of a weight (out, ...), in fp32, so many numbers at a time: a copy of the whole
    would be larger than a weight in 16 bits."""
    flat = weight.flatten(1)
    parts = [part.float().square().sum(1) for part in flat.split(max(1, numbers // max(1, flat.shape[1])))]
    return torch.cat(parts)


def rotation_less_one(angles: Tensor, size: int, series: int | None) -> Tensor:
    """R - I (blocks, size, size) of the rotations by angles (blocks, size (size - 1) / 2), those of the planes in the
    order of an upper triangle; in fp64 on the host, where nothing cancels.

    series None: Cayley's R = (I - Q) (I + Q)^-1, Qiu et al. 2023, arXiv:2306.07280, section 4. Else the series
    I + 2 Q + 2 Q^2 + ... of (I + Q) (I - Q)^-1 up to Q^(series - 1), arXiv:2506.19847, of whose last term PEFT takes
    the half, and never less than Q^3 when there are more terms than two.
    """
    rows, columns = torch.triu_indices(size, size, 1)
    skew = torch.zeros(len(angles), size, size, dtype=torch.float64)
    skew[:, rows, columns] = angles.to("cpu", torch.float64)
    skew = skew - skew.mT
    if series is None:
        return torch.linalg.solve(torch.eye(size, dtype=skew.dtype) + skew, -2 * skew, left=False)
    if series == 2:
        return 2 * skew
    power, total = skew, 2 * skew
    for _ in range(max(series, 4) - 3):
        power = power @ skew
        total = total + 2 * power
    return total + power @ skew
