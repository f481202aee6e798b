"""The nearest matrix of low rank, against matrices whose singular values are known."""

from math import e, sqrt

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from weft.math.low_rank_of import (
    EXACT,
    OVERSAMPLED,
    POWERS,
    energy_of,
    nearest,
    nearest_holding,
    rounding_energy,
    share_of_noise,
)


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_values(values: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix in fp64 with these singular values, and no others than 0."""
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=chance(seed + at), dtype=torch.float64))[0]
        for at, size in enumerate((rows, columns))
    )
    return left * values @ right.mT


SMALL, LARGE = (40, 60), (EXACT + 88, 700)  # decomposed, and sampled


@pytest.mark.parametrize("size", [SMALL, LARGE, LARGE[::-1]])
def test_a_matrix_of_a_rank_is_found_again_and_its_factors_are_of_equal_lengths(size):
    values = torch.tensor([5.0, 2, 1, 0.1], dtype=torch.float64)
    matrix = with_values(values, *size)
    found = nearest(matrix.float(), 4, chance())
    assert_close(found.values, values, rtol=1e-5, atol=0)
    b, a = found.factors()
    assert_close(b @ a, matrix.float(), rtol=0, atol=1e-6)
    assert_close(b.norm(dim=0), a.norm(dim=1))
    assert found.captured == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_what_is_captured_is_what_the_difference_says(size):
    matrix = with_values(0.8 ** torch.arange(30.0, dtype=torch.float64), *size).float()
    found = nearest(matrix, 6, chance())
    b, a = found.factors()
    missed = (matrix.double() - b.double() @ a.double()).square().sum()
    assert_close(found.missed, float(missed), rtol=1e-5, atol=0)
    assert_close(found.captured, 1 - float(missed) / energy_of(matrix), rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("decay", ["slow", "flat"])
def test_a_sampled_range_misses_no_more_than_the_published_bound(decay, seed):
    """Halko, Martinsson and Tropp 2011, corollary 10.10, for the expected error in the spectral norm. What is missed in
    all directions together is within 1 % of the least that can be missed where values fall, and 3 % where none does."""
    count, rank = 600, 24
    steps = torch.arange(1.0, count + 1, dtype=torch.float64)
    values = steps**-0.5 if decay == "slow" else torch.ones(count, dtype=torch.float64)
    matrix = with_values(values, 640, 720, seed)
    found = nearest(matrix.float(), rank, chance(seed))
    rest = matrix - found.left * found.values @ found.right
    k, p = rank, OVERSAMPLED
    factor = 1 + sqrt(k / (p - 1)) + e * sqrt(k + p) / p * sqrt(min(matrix.shape) - k)
    # Cutting the sampled range down to the rank adds at most the next value once more (their theorem 9.3).
    bound = float(values[k]) * (factor ** (1 / (2 * POWERS + 1)) + 1)
    assert float(torch.linalg.matrix_norm(rest, 2)) <= bound
    least = float(values[k:].square().sum())
    assert found.missed <= least * (1.01 if decay == "slow" else 1.03)
    assert found.missed >= least * (1 - 1e-6)


def test_the_same_seed_finds_the_same_factors():
    matrix = torch.randn(*LARGE, generator=chance(3))
    one, other = (nearest(matrix, 8, chance(1)).factors() for _ in range(2))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize(("share", "rank"), [(0.5, 1), (0.74, 1), (0.76, 2), (0.9375, 2), (0.98, 3), (0.99, 4)])
def test_the_rank_is_the_smallest_that_holds_the_share(size, share, rank):
    """Values 2^-i: the first r hold 1 - 4^-r of the sum of squares, but for the end of the series."""
    matrix = with_values(0.5 ** torch.arange(20.0, dtype=torch.float64), *size)
    found = nearest_holding(matrix.float(), share - 1e-6, 32, chance())
    assert len(found.values) == rank
    assert found.captured == pytest.approx(1 - 0.25**rank, abs=1e-6)


def test_the_rank_grows_as_far_as_it_may():
    """Forty equal values: each holds a fortieth."""
    matrix = with_values(torch.ones(40, dtype=torch.float64), *LARGE).float()
    assert len(nearest_holding(matrix, 0.9, 128, chance()).values) == 36
    short = nearest_holding(matrix, 0.9, 20, chance())
    assert (len(short.values), short.captured) == (20, pytest.approx(0.5))


def test_a_rank_beyond_the_matrix_is_the_matrix():
    matrix = torch.randn(5, 7, generator=chance())
    found = nearest(matrix, 32, chance())
    assert len(found.values) == 5
    b, a = found.factors()
    assert_close(b @ a, matrix)
    assert len(nearest_holding(matrix, 1.0, 64, chance()).values) <= 5


def test_no_matrix_is_held_by_nothing():
    assert nearest(torch.zeros(4, 3), 2, chance()).captured == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("deviation", [1.0, 0.02])
def test_the_energy_of_rounding_is_told_from_the_weight_alone(dtype, deviation):
    weight = deviation * torch.randn(1500, 1200, generator=chance())
    weight[0] = 0
    lost = energy_of(weight.to(dtype).float() - weight)
    assert rounding_energy(weight, dtype) == pytest.approx(lost, rel=0.02)


@pytest.mark.parametrize("rank", [1, 8, 32])
def test_noise_is_held_no_more_than_its_share(rank):
    noise = torch.randn(*LARGE, generator=chance(5))
    share = share_of_noise(*LARGE, rank)
    assert 0.75 * share < nearest(noise, rank, chance()).captured < 1.01 * share
