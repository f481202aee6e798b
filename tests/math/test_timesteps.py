"""Densities of training times against their closed forms."""

import math

import pytest
import torch

from tests.math.scipy_free import normal_cdf
from weft.math.timesteps import Density, draw_times, stratified

GRID = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
DENSITIES = {
    "uniform": (Density(), lambda t: t),
    "sigmoid of scale 1.5": (Density(std=1.5), lambda t: normal_cdf(math.log(t / (1 - t)) / 1.5)),
    "logit-normal(0.5, 0.8)": (Density(0.5, 0.8), lambda t: normal_cdf((math.log(t / (1 - t)) - 0.5) / 0.8)),
    "uniform shifted by 5": (Density(shift=5.0), lambda t: t / (5 - 4 * t)),
    "sigmoid shifted by 3": (
        Density(std=1.0, shift=3.0),
        lambda t: normal_cdf(math.log((t / (3 - 2 * t)) / (1 - t / (3 - 2 * t)))),
    ),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_a_density_has_its_closed_form(name):
    density, cdf = DENSITIES[name]
    expected = torch.tensor([cdf(t) for t in GRID.tolist()], dtype=torch.float64)
    torch.testing.assert_close(density.cumulative(GRID), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(density.quantile(expected).double(), GRID, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", DENSITIES)
def test_drawn_times_follow_the_density(name):
    """Kolmogorov-Smirnov at 20,000 draws: beyond 1.95/sqrt(n) only one sample in a thousand."""
    density, cdf = DENSITIES[name]
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    t = draw_times(density, u).double().sort().values
    empirical = torch.arange(1, len(t) + 1, dtype=torch.float64) / len(t)
    theory = torch.tensor([cdf(min(max(x, 1e-9), 1 - 1e-9)) for x in t.tolist()], dtype=torch.float64)
    assert (empirical - theory).abs().max() < 1.95 / math.sqrt(len(t))


@pytest.mark.parametrize("bounds", [(0.875, 1.0), (0.0, 0.9), (0.3, 0.4)])
def test_a_range_keeps_the_density_as_rejection_would(bounds):
    density, (low, high) = Density(std=1.0, shift=5.0), bounds
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    free = draw_times(density, u)
    rejected = free[(free >= low) & (free <= high)].sort().values
    cut = draw_times(density, u[: len(rejected)], low, high).sort().values
    assert cut.min() >= low and cut.max() <= high
    distance = (cut - rejected).abs().max() / (high - low)
    assert distance < 4 / math.sqrt(len(rejected))


def test_strata_are_each_hit_once_in_every_round():
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([stratified(torch.rand(3, generator=generator), 3 * i, 12, seed=7) for i in range(20)])
    rounds = (draws.reshape(5, 12) * 12).long().sort(dim=1).values
    assert (rounds == torch.arange(12)).all()


def test_two_rounds_are_shuffled_differently():
    middle = torch.full((32,), 0.5)
    cells = (stratified(middle, 0, 16, seed=0) * 16).long()
    assert cells[:16].tolist() != cells[16:].tolist()


def test_a_stratified_draw_depends_on_its_number_alone():
    u = torch.rand(8, generator=torch.Generator().manual_seed(0))
    whole = stratified(u, 40, 16, seed=3)
    parts = torch.cat([stratified(u[:5], 40, 16, seed=3), stratified(u[5:], 45, 16, seed=3)])
    assert torch.equal(whole, parts)
