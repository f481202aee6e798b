"""Flow matching against the same sums made by hand with the same draws."""

from math import exp
from statistics import NormalDist

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from tests.learners import ROLE, batch_of, parts
from weft.contracts import Batch, Denoise, NoState, Rng
from weft.math.chance import generator
from weft.objectives.flow_matching import FlowMatching, LogitNormal, Question, Shift, Sigmoid, Uniform

DENSITIES = [Uniform(), Sigmoid(scale=1.3), LogitNormal(mean=0.5), Shift(shift=5.0), Shift(shift=12.0, scale=None)]


def rng(seed: int = 0, draw: int = 0) -> Rng:
    return Rng(generator("cpu", seed, "own"), generator("cpu", seed, "shared"), seed, draw)


def small_batch(items: int) -> Batch:
    latents = torch.randn(items, 1, 1, 2, 2, generator=torch.Generator().manual_seed(4))
    return Batch({"latents": latents, "text": torch.zeros(items, 1, 2)}, tuple(map(str, range(items))))


def drawn(seed: int, latents: Tensor) -> tuple[Tensor, Tensor]:
    """The uniform numbers and the noise that the objective draws, in its order."""
    chance = rng(seed).own
    return torch.rand(len(latents), generator=chance), torch.randn(latents.shape, generator=chance)


def test_the_loss_is_the_velocitys_squared_error_summed_over_items(learner):
    batch = batch_of(2)
    u, noise = drawn(9, batch["latents"])
    expected = torch.zeros(())
    with learner.model.adapters.use(ROLE), torch.no_grad():
        for i, t in enumerate(u):
            data = batch["latents"][i : i + 1]
            x = (1 - t) * data + t * noise[i : i + 1]
            text = torch.cat([batch["text"][i : i + 1], torch.zeros(1, 59, 128)], 1)
            velocity = learner.model.network(x, t[None] * 1000, text, return_dict=False)[0]
            expected += ((noise[i : i + 1] - data) - velocity).square().mean()
        objective = FlowMatching(timesteps=Uniform(), strata=1)
        loss = objective.loss("train", learner.model, batch, NoState(), rng(9))
    assert_close(loss.total, expected)
    assert_close(loss.metrics["unweighted_loss"], expected)
    assert objective.count(batch) == 2


def test_the_shift_moves_the_density_once_and_x_is_made_from_the_very_t_that_is_asked(zero, asked):
    """t = 5 s / (1 + 4 s) with s = sigmoid(normal quantile of u), by the standard library."""
    batch = small_batch(64)
    u, noise = drawn(1, batch["latents"])
    s = [1 / (1 + exp(-NormalDist().inv_cdf(value))) for value in u.tolist()]
    FlowMatching(timesteps=Shift(shift=5.0), strata=1).loss("train", zero, batch, NoState(), rng(1))
    (question,) = asked.questions
    assert_close(question.t, torch.tensor([5 * v / (1 + 4 * v) for v in s]))
    sigma = question.t.view(-1, 1, 1, 1, 1)
    assert_close(question.x, (1 - sigma) * batch["latents"] + sigma * noise)


def test_times_are_fp32_and_lie_on_no_grid_of_thousandths(zero, asked):
    FlowMatching().loss("train", zero, small_batch(256), NoState(), rng())
    assert asked.times.dtype == torch.float32
    assert ((asked.times * 1000) % 1 > 1e-3).float().mean() > 0.9
    assert len(asked.times.unique()) > 250


def test_the_target_is_the_velocity_at_every_time_not_the_noise_and_not_the_data(zero):
    batch, noise = small_batch(1), torch.randn(1, 1, 1, 2, 2, generator=torch.Generator().manual_seed(8))
    expected = (noise - batch["latents"]).square().mean()[None]
    for t in (0.0, 0.3, 1.0):
        assert_close(FlowMatching().errors(zero, batch, Question(noise, torch.tensor([t]), ROLE)), expected)


def test_half_precision_latents_keep_an_fp32_sigma_and_an_fp32_loss(zero, asked):
    batch = small_batch(1)
    half = Batch({**batch.tensors, "latents": batch["latents"].bfloat16()}, batch.keys)
    noise, t = torch.ones(1, 1, 1, 2, 2), torch.tensor([0.8333])  # 0.832 in bf16
    error = FlowMatching().errors(zero, half, Question(noise, t, ROLE))
    assert error.dtype == asked.questions[0].x.dtype == torch.float32
    assert_close(asked.questions[0].x, 0.1667 * half["latents"].float() + 0.8333, rtol=0, atol=1e-5)


def test_the_error_of_an_item_does_not_depend_on_its_neighbours(learner):
    batch = batch_of(2)
    with learner.model.adapters.use(ROLE), torch.no_grad():
        both = FlowMatching().errors(learner.model, batch, Question(batch["noise"], batch["t"], ROLE))
        alone = [
            FlowMatching().errors(learner.model, b, Question(b["noise"], b["t"], ROLE)) for b in parts(batch, 1, 1)
        ]
    assert_close(both, torch.cat(alone))


@pytest.mark.parametrize("timesteps", DENSITIES, ids=lambda d: d.kind)
@pytest.mark.parametrize("times", [(0.875, 1.0), (0.0, 0.4)])
def test_every_item_of_a_batch_keeps_to_the_range_and_not_only_the_first(zero, asked, timesteps, times):
    objective = FlowMatching(timesteps=timesteps, times=times)
    for draw in range(8):
        objective.loss("train", zero, small_batch(32), NoState(), rng(draw, draw))
    assert times[0] <= asked.times.min() and asked.times.max() <= times[1]
    assert len(asked.times.unique()) > 250


def test_the_draws_of_all_ranks_and_micro_batches_hit_each_stratum_once(zero, asked):
    """2 ranks x 2 micro-batches x 2 items are the 8 strata, whatever each of them drew."""
    objective = FlowMatching(timesteps=Uniform(), strata=8)
    for draw in (2, 0, 3, 1):
        objective.loss("train", zero, small_batch(2), NoState(), Rng(generator("cpu", draw), rng().shared, 7, draw))
    assert sorted((asked.times * 8).long().tolist()) == list(range(8))


WEIGHTS = {
    "none": lambda t: 1.0,
    "sigma-sqrt": lambda t: t**-2,
    "cosmap": lambda t: 2 / (torch.pi * (1 - 2 * t + 2 * t * t)),
}


@pytest.mark.parametrize(("weighting", "weight"), WEIGHTS.items(), ids=list(WEIGHTS))
def test_the_weight_of_its_time_multiplies_each_items_error_and_is_kept_out_of_the_plain_metric(
    zero, asked, weighting, weight
):
    batch = small_batch(4)
    objective = FlowMatching(weighting=weighting, times=(0.1, 1.0), strata=1)
    loss = objective.loss("train", zero, batch, NoState(), rng(3))
    _, noise = drawn(3, batch["latents"])
    errors = (noise - batch["latents"]).square().flatten(1).mean(1)
    assert_close(loss.total, sum(weight(t) * e for t, e in zip(asked.times, errors, strict=True)))
    assert_close(loss.metrics["unweighted_loss"], errors.sum())


def test_a_measure_repeats_bit_by_bit_whatever_chance_did_in_between(learner):
    batch = batch_of(2)
    with learner.model.adapters.use(ROLE):
        first = FlowMatching().measure(learner.model, batch, ROLE, 0.3, 0)
        torch.manual_seed(123)
        torch.rand(7)
        again = FlowMatching().measure(learner.model, batch, ROLE, 0.3, 0)
    assert torch.equal(first, again) and not first.requires_grad
    assert first.shape == (2,) and first.dtype == torch.float32


def test_an_item_is_measured_on_the_same_noise_in_any_batch(zero, asked):
    batch = small_batch(3)
    first, *others = parts(batch, 1, 2)
    FlowMatching().measure(zero, batch, ROLE, 1.0, 5)
    for part in (first, *others):
        FlowMatching().measure(zero, part, ROLE, 1.0, 5)
    whole, *cut = [question.x for question in asked.questions]  # at time 1 x is the noise
    assert torch.equal(whole, torch.cat(cut))
    assert not torch.equal(whole[0], whole[1])


def test_a_measure_is_the_error_at_its_time_and_another_seed_is_other_noise(zero, asked):
    batch = small_batch(1)
    noise = torch.randn(1, 1, 2, 2, generator=generator("cpu", 5, "validation", "0"))
    assert_close(FlowMatching().measure(zero, batch, ROLE, 0.3, 5), (noise - batch["latents"]).square().mean()[None])
    FlowMatching().measure(zero, batch, ROLE, 0.3, 6)
    assert isinstance(asked.questions[0], Denoise) and asked.times.tolist() == pytest.approx([0.3, 0.3])
    assert not torch.equal(asked.questions[0].x, asked.questions[1].x)


def test_all_but_the_latents_is_what_the_network_is_conditioned_on(zero, asked):
    FlowMatching().loss("train", zero, batch_of(1), NoState(), rng())
    assert set(asked.questions[0].cond) == {"text", "noise", "t"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"times": (0.9, 0.1)}, "Write the lower end first"),
        ({"times": (0.0, 1.5)}, "no range within"),
        ({"validation_times": (0.5, 500.0)}, "500.0 is not in"),
        ({"timesteps": {"kind": "sigmoid", "shift": 3.0}}, "shift"),  # a shift that would be ignored in silence
        ({"timesteps": {"kind": "shift", "shift": 0.0}}, "greater than 0"),
    ],
)
def test_reversed_ranges_and_shifts_without_effect_are_refused(fields, words):
    with pytest.raises(ValidationError, match=words):
        FlowMatching(**fields)
