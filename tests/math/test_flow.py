"""Rectified flow against its closed forms."""

import pytest
import torch

from weft.math.flow import denoised, loss_weight, network_timestep, noised, shifted, unshifted, velocity_target

DATA = torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(1))


def test_time_0_is_data_and_time_1_is_noise():
    torch.testing.assert_close(noised(DATA, NOISE, torch.zeros(3)), DATA, rtol=0, atol=0)
    torch.testing.assert_close(noised(DATA, NOISE, torch.ones(3)), NOISE, rtol=0, atol=0)


def test_the_target_is_noise_minus_data_at_every_time():
    """The derivative of x_t by t, taken numerically in fp64."""
    t, h = torch.tensor([0.1, 0.5, 0.9]), 1e-3
    slope = (noised(DATA, NOISE, t + h) - noised(DATA, NOISE, t - h)) / (2 * h)
    torch.testing.assert_close(slope, velocity_target(DATA, NOISE), rtol=0, atol=2e-3)  # fp32 over h


def test_the_true_velocity_leads_back_to_the_data_from_any_time():
    t = torch.tensor([0.2, 0.6, 1.0])
    x = noised(DATA, NOISE, t)
    torch.testing.assert_close(denoised(x, t, velocity_target(DATA, NOISE)), DATA, rtol=0, atol=1e-6)


def test_the_network_is_asked_in_thousandths_that_are_not_truncated():
    t = torch.tensor([0.8333, 0.00042])
    torch.testing.assert_close(network_timestep(t), torch.tensor([833.3, 0.42]))


def test_half_precision_latents_are_noised_in_fp32():
    """sigma = 0.8333 is 0.8320 in bf16: an error of 1.6e-3 that every step would carry."""
    x = noised(DATA.bfloat16(), NOISE, torch.full((3,), 0.8333))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, 0.1667 * DATA.bfloat16().float() + 0.8333 * NOISE, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shift", "expected"),
    [(3, [0.5, 0.75, 0.9]), (5, [0.625, 0.8333, 0.9375]), (7, [0.7, 0.875, 0.9545]), (12, [0.8, 0.9231, 0.973])],
)
def test_the_shift_map_has_its_known_values(shift, expected):
    t = torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(shifted(t, shift), torch.tensor(expected), rtol=0, atol=5e-5)
    torch.testing.assert_close(unshifted(shifted(t, shift), shift), t)


def test_expert_boundaries_lie_in_shifted_time():
    """0.875 at shift 12 is 0.36842 before the shift, 0.9 at shift 5 is 0.642857."""
    assert unshifted(torch.tensor(0.875), 12).item() == pytest.approx(0.36842, abs=1e-5)
    assert unshifted(torch.tensor(0.9), 5).item() == pytest.approx(0.642857, abs=1e-6)


def test_loss_weights_have_their_closed_forms():
    t = torch.tensor([0.1, 0.5, 1.0])
    torch.testing.assert_close(loss_weight(t, "none"), torch.ones(3))
    torch.testing.assert_close(loss_weight(t, "sigma-sqrt"), torch.tensor([100.0, 4.0, 1.0]))
    torch.testing.assert_close(loss_weight(t, "cosmap"), 2 / (torch.pi * torch.tensor([0.82, 0.5, 1.0])))
