"""The matrix of low rank nearest to a given one, exactly or by random sampling, with the exact share that it holds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

EXACT = 512  # the shorter side up to which all singular values are computed
OVERSAMPLED = 16  # directions that are sampled beyond those asked for
POWERS = 3  # times that the sample is multiplied by D D'
FIRST = 16  # rank that is tried first when a share is asked for
CHUNK = 1 << 22  # numbers that are held in fp64 at once
SAMPLED = 1 << 20  # numbers of a weight whose rounding is looked at


@dataclass(frozen=True)
class LowRank:
    """left (m, r) diag(values) right (r, n) in fp64, with orthonormal left and right and the largest value first.

    energy: ||D||_F^2 of the matrix D that it stands for.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    energy: float

    @property
    def captured(self) -> float:
        """||L||_F^2 / ||D||_F^2, which is 1 - ||D - L||_F^2 / ||D||_F^2, for L projects D; 1 of a D of zeros."""
        return min(1.0, float(self.values.square().sum()) / self.energy) if self.energy else 1.0

    @property
    def missed(self) -> float:
        """||D - L||_F^2."""
        return max(0.0, self.energy - float(self.values.square().sum()))

    def truncated(self, rank: int) -> "LowRank":
        """The largest values alone."""
        return replace(self, left=self.left[:, :rank], values=self.values[:rank], right=self.right[:rank])

    def rank_holding(self, share: float) -> int | None:
        """The smallest rank whose captured share is at least so large; None where all of this holds less."""
        held = self.values.square().cumsum(0) >= share * self.energy
        return int(held.nonzero()[0]) + 1 if held.any() else None

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (m, r) and A (r, n) in fp32 whose product this is, of equal lengths: the root of a value on either side."""
        root = self.values.sqrt()
        return (self.left * root).float(), (root[:, None] * self.right).float()


def nearest(matrix: Tensor, rank: int, chance: torch.Generator) -> LowRank:
    """The matrix of at most so large a rank that is nearest to D (m, n), on its device.

    Small ones by all singular values (Eckart and Young 1936); of others the range is sampled and sharpened by powers,
    Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1. chance: a generator on the host.
    """
    short = min(matrix.shape)
    if short <= EXACT or 2 * (rank + OVERSAMPLED) >= short:
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    else:
        basis = _range_of(matrix, rank + OVERSAMPLED, chance)
        core = torch.cat([basis.mT @ part.double() for part in _columns(matrix)], 1)
        inner, values, right = torch.linalg.svd(core, full_matrices=False)
        left = basis @ inner
    return LowRank(left, values, right, energy_of(matrix)).truncated(rank)


def nearest_holding(matrix: Tensor, share: float, most: int, chance: torch.Generator) -> LowRank:
    """The nearest matrix of the smallest rank that captures such a share of ||D||_F^2, or of the rank `most` where none
    up to that does."""
    rank = min(FIRST, most)
    while True:
        found = nearest(matrix, rank, chance)
        enough = found.rank_holding(share)
        if enough is not None:
            return found.truncated(enough)
        if len(found.values) < rank or rank == most:
            return found
        rank = min(2 * rank, most)


def energy_of(matrix: Tensor) -> float:
    """||D||_F^2, summed in fp64."""
    return float(sum(part.double().square().sum() for part in _columns(matrix.flatten()[None])))


def share_of_noise(rows: int, columns: int, rank: int) -> float:
    """The largest share of ||D||_F^2 that a rank can hold of independent numbers of mean 0: no singular value of such a
    matrix is larger than sqrt(rows) + sqrt(columns) times their deviation. Bai and Yin 1993."""
    return min(1.0, rank * (rows**0.5 + columns**0.5) ** 2 / (rows * columns))


def rounding_energy(weight: Tensor, dtype: torch.dtype) -> float:
    """The sum of squares that is expected of W's errors in a dtype, told from up to a million of its numbers: of even
    places between two floats the variance is the square of their distance over 12."""
    numbers = weight.flatten()
    numbers = numbers[:: (numbers.numel() // SAMPLED) | 1]  # an odd step meets all places of rows of even length
    exponents = torch.frexp(numbers.float()).exponent  # of w = m 2^e with m in [0.5, 1)
    distances = torch.ldexp(torch.full(numbers.shape, torch.finfo(dtype).eps / 2, dtype=torch.float64), exponents.cpu())
    squares = distances.square() * (numbers != 0).cpu()
    return float(squares.mean()) * weight.numel() / 12


def _range_of(matrix: Tensor, width: int, chance: torch.Generator) -> Tensor:
    """An orthonormal basis (m, width) in fp64 of nearly all that a matrix (m, n) reaches."""
    sample = torch.randn(matrix.shape[1], width, generator=chance).to(matrix)
    reached = matrix @ sample
    for _ in range(POWERS):
        reached = matrix @ _orthonormal(matrix.mT @ _orthonormal(reached))
    return _orthonormal(reached.double())


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns)[0]


def _columns(matrix: Tensor) -> Iterator[Tensor]:
    """Some columns at a time: a copy of the whole in fp64 would be twice as large as the matrix."""
    return iter(matrix.split(max(1, CHUNK // matrix.shape[0]), 1))
