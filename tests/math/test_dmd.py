"""The matching gradient and its surrogate against arithmetic and a second way to compute."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from weft.math.dmd import guided, learned_mean, matching_gradient, surrogate_loss

SHAPE = (2, 3, 4, 2, 2)
FIRST = torch.tensor([[True, False, False, False], [False, False, False, False]])


def drawn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


SAMPLE, FAKE, REAL = drawn(0), drawn(1), drawn(2)


def test_the_gradient_is_the_difference_of_the_estimates_over_the_mean_distance_to_the_teachers():
    """By hand: |1 - 3| and |1 - 7| have the mean 4, and (5 - 3) / 4, (5 - 7) / 4 are left."""
    sample, fake = torch.full((1, 1, 1, 1, 2), 1.0), torch.full((1, 1, 1, 1, 2), 5.0)
    real = torch.tensor([3.0, 7.0]).reshape(1, 1, 1, 1, 2)
    assert matching_gradient(sample, fake, real).flatten().tolist() == [0.5, -0.5]


def test_the_normaliser_is_each_samples_own_so_that_a_neighbour_changes_nothing():
    """Trap 43: with a batch mean, one far sample would still all others."""
    far = SAMPLE.clone()
    far[1] *= 1e4
    together = matching_gradient(far, FAKE, REAL)
    for i in range(2):
        alone = matching_gradient(far[i : i + 1], FAKE[i : i + 1], REAL[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


def test_a_scale_of_all_three_is_no_scale_of_the_gradient():
    """Numerator and normaliser grow alike."""
    assert_close(matching_gradient(8 * SAMPLE, 8 * FAKE, 8 * REAL), matching_gradient(SAMPLE, FAKE, REAL))


@pytest.mark.parametrize("given", [None, FIRST])
def test_given_frames_take_no_part_in_the_normaliser_the_gradient_or_the_loss(given):
    """As if they had been cut off; and what stands in them does not matter."""
    gradient = matching_gradient(SAMPLE, FAKE, REAL, given)
    cut = 1 if given is not None else 0
    sample, fake, real = (t[:1, :, cut:] for t in (SAMPLE, FAKE, REAL))
    assert_close(gradient[:1, :, cut:], matching_gradient(sample, fake, real))
    assert not gradient[:1, :, :cut].any()
    loss = surrogate_loss(SAMPLE, gradient, given)
    assert_close(loss[:1], surrogate_loss(sample, gradient[:1, :, cut:]))
    wild = SAMPLE.clone()
    wild[:1, :, :cut] = 1e6
    assert torch.equal(matching_gradient(wild, FAKE, REAL, given), gradient)
    assert torch.equal(surrogate_loss(wild, gradient, given), loss)


@pytest.mark.parametrize(("given", "learned"), [(None, (4, 4)), (FIRST, (3, 4))])
def test_the_surrogates_gradient_is_the_matching_gradient_over_the_numbers_of_the_mean(given, learned):
    sample = SAMPLE.clone().requires_grad_()
    gradient = matching_gradient(SAMPLE, FAKE, REAL, given)
    (found,) = torch.autograd.grad(surrogate_loss(sample, gradient, given).sum(), sample)
    numbers = torch.tensor([frames * 3 * 2 * 2 for frames in learned])
    assert_close(found, gradient / numbers.reshape(-1, 1, 1, 1, 1))


def test_the_surrogate_is_half_the_mean_square_of_the_gradient():
    gradient = matching_gradient(SAMPLE, FAKE, REAL)
    assert_close(surrogate_loss(SAMPLE, gradient), 0.5 * gradient.square().flatten(1).mean(1))


def test_nothing_but_the_sample_has_a_gradient():
    sample, fake, real = (t.clone().requires_grad_() for t in (SAMPLE, FAKE, REAL))
    surrogate_loss(sample, matching_gradient(sample, fake, real).detach()).sum().backward()
    assert sample.grad is not None and fake.grad is None and real.grad is None


@pytest.mark.parametrize("fake", [REAL, FAKE])
def test_a_sample_that_is_exactly_the_teachers_has_no_gradient(fake):
    """0 / 0, and x / 0 whose largest finite number would overflow every sum."""
    assert not matching_gradient(REAL, fake, REAL).any()


def test_one_exact_sample_leaves_its_neighbour_as_it_is():
    sample = torch.cat([REAL[:1], SAMPLE[1:]])
    gradient = matching_gradient(sample, FAKE, REAL)
    assert not gradient[0].any() and torch.equal(gradient[1:], matching_gradient(SAMPLE[1:], FAKE[1:], REAL[1:]))


@pytest.mark.parametrize("broken", ["sample", "fake", "real"])
def test_a_number_that_is_none_is_not_hidden(broken):
    """The loop finds it in the gradient, skips the step and writes an incident."""
    told = {"sample": SAMPLE.clone(), "fake": FAKE.clone(), "real": REAL.clone()}
    told[broken][0, 0, 0, 0, 0] = torch.nan
    gradient = matching_gradient(**told)
    assert gradient[0].isnan().any() and gradient[1].isfinite().all()


def test_half_precision_estimates_are_compared_in_fp32():
    halves = [t.bfloat16() for t in (SAMPLE, FAKE, REAL)]
    found = matching_gradient(*halves)
    assert found.dtype == surrogate_loss(halves[0], found).dtype == torch.float32
    assert torch.equal(found, matching_gradient(*(t.float() for t in halves)))


def test_the_mean_over_learned_frames_is_that_of_the_frames_alone():
    assert_close(learned_mean(SAMPLE, FIRST), torch.stack([SAMPLE[0, :, 1:].mean(), SAMPLE[1].mean()]))


def test_guidance_4_in_our_convention_is_guidance_3_in_self_forcings():
    """Trap 45: u + g (c - u) and c + g' (c - u)."""
    c, u = SAMPLE, FAKE
    assert_close(guided(c, u, 4.0), c + 3.0 * (c - u))
    assert torch.equal(guided(c, u, 0.0), u)
    assert_close(guided(c, u, 1.0), c)


def test_guidance_of_velocities_is_guidance_of_the_estimates_of_the_data():
    """x - t v is linear in v."""
    x, t = drawn(3), 0.7
    assert_close(x - t * guided(FAKE, REAL, 4.0), guided(x - t * FAKE, x - t * REAL, 4.0), rtol=1e-5, atol=1e-5)
