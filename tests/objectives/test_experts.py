"""Two experts take turns, each inside its own times; and a first frame that is given is not learned."""

import pytest
import torch
from torch.testing import assert_close

from weft.contracts import DEFAULT, Batch, Expert, NoState, Rng
from weft.errors import ConfigError
from weft.math.chance import generator
from weft.objectives.flow_matching import FlowMatching, Question, Shift, Uniform
from weft.run.pace import Pace

T2V = (Expert("high", (0.875, 1.0)), Expert("low", (0.0, 0.875)))


def rng(draw: int) -> Rng:
    return Rng(generator("cpu", 1, "own", draw), generator("cpu", 1, "shared", draw), 1, draw)


def clips(items: int = 2, frames: int = 3) -> Batch:
    latents = torch.randn(items, 2, frames, 2, 2, generator=torch.Generator().manual_seed(1))
    return Batch({"latents": latents, "text": torch.zeros(items, 1, 2)}, tuple(map(str, range(items))))


# ---- Experts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "low", "high"), [("high", 0.875, 1.0), ("low", 0.0, 0.875)])
def test_each_expert_is_asked_at_its_own_times_alone_and_by_its_name(zero, asked, name, low, high):
    asked.experts = T2V
    objective = FlowMatching(timesteps=Shift(shift=12.0))
    for draw in range(64):
        objective.loss(name, zero, clips(), NoState(), rng(draw))
    assert asked.times.min() >= low and asked.times.max() <= high
    assert {question.expert for question in asked.questions} == {name}
    spread = asked.times.max() - asked.times.min()
    assert spread > 0.9 * (high - low) * (1 if name == "high" else 0.5)


def test_the_density_within_an_expert_is_the_whole_one_cut_there_not_squeezed(zero, asked):
    """Share of the high expert's draws above 0.95 under uniform times before shift 12, by arithmetic."""
    asked.experts = T2V
    objective = FlowMatching(timesteps=Shift(shift=12.0, scale=None), strata=16)
    for draw in range(512):
        objective.loss("high", zero, clips(4), NoState(), rng(draw))

    def before(t: float) -> float:
        return t / (12 - 11 * t)

    expected = (1 - before(0.95)) / (1 - before(0.875))
    assert (asked.times > 0.95).float().mean().item() == pytest.approx(expected, abs=0.01)


def test_experts_take_turns_under_their_own_names():
    objective = FlowMatching(turn=2)
    phases = [objective.phases(step, T2V)[0] for step in range(8)]
    assert [phase.name for phase in phases] == ["high", "high", "low", "low"] * 2
    assert all(phase.role == phase.name and phase.optimizers == (phase.name,) for phase in phases)
    (alone,) = objective.phases(5, (DEFAULT,))
    assert (alone.name, alone.role) == ("train", "default")


def test_with_turns_of_half_the_run_one_expert_comes_after_the_other():
    names = [FlowMatching(turn=4).phases(step, T2V)[0].name for step in range(8)]
    assert names == ["high"] * 4 + ["low"] * 4


def test_a_phase_counts_its_own_steps_so_that_the_second_expert_has_its_own_warm_up():
    pace = Pace(FlowMatching(turn=3), T2V, 12)
    assert [pace.done("low", step) for step in range(12)] == [0, 0, 0, 0, 1, 2, 3, 3, 3, 3, 4, 5]
    assert pace.of("high") == pace.of("low") == 6


def test_validation_measures_each_expert_within_its_own_times():
    pairs = FlowMatching().measured(T2V)
    assert [time for name, time in pairs if name == "low"] == pytest.approx([0.0875, 0.2625, 0.4375, 0.6125, 0.7875])
    assert all(0.875 < time < 1 for name, time in pairs if name == "high") and len(pairs) == 10
    assert FlowMatching(validation_times=(0.5, 0.9)).measured(T2V) == (("high", 0.9), ("low", 0.5))


def test_times_that_no_expert_is_asked_at_are_refused_with_the_experts_range(asked):
    asked.experts = T2V[:1]
    with pytest.raises(ConfigError, match=r"expert 'high', \[0.875, 1.0\], have nothing in common"):
        FlowMatching(times=(0.0, 0.5)).check(asked)
    with pytest.raises(ConfigError, match=r"none of \[0.3\] is a time of high \[0.875, 1.0\]"):
        FlowMatching(validation_times=(0.3,)).check(asked)
    FlowMatching(times=(0.0, 0.9)).check(asked)


# ---- A first frame that is given -----------------------------------------------------------------------------------


def test_a_given_first_frame_stands_clean_in_x_and_takes_no_part_in_the_loss(zero, asked):
    """A network that answers zero: the error is the mean square of noise - data over the other frames."""
    batch, noise = clips(), torch.randn(2, 2, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([0.25, 0.75])
    found = FlowMatching().errors(zero, batch, Question(noise, t, "default", torch.tensor([True, False])))
    (question,) = asked.questions
    assert question.given.tolist() == [[True, False, False], [False, False, False]]
    assert torch.equal(question.x[0, :, 0], batch["latents"][0, :, 0])
    data = batch["latents"]
    assert_close(question.x[0, :, 1:], 0.75 * data[0, :, 1:] + 0.25 * noise[0, :, 1:])
    assert_close(question.x[1], 0.25 * data[1] + 0.75 * noise[1])
    squared = (noise - data).square()
    assert_close(found, torch.stack([squared[0, :, 1:].mean(), squared[1].mean()]))


def test_the_share_of_given_first_frames_is_the_configs_and_pictures_have_none(zero, asked):
    asked.image = "frames"
    for draw in range(200):
        FlowMatching(first_frame=0.25, timesteps=Uniform()).loss("train", zero, clips(4), NoState(), rng(draw))
    none = torch.zeros(4, 3, dtype=torch.bool)
    given = torch.cat([none if question.given is None else question.given for question in asked.questions])
    assert given[:, 0].float().mean().item() == pytest.approx(0.25, abs=0.05) and not given[:, 1:].any()
    assert any(question.given is None for question in asked.questions)  # none of four: the cheaper question
    asked.questions.clear()
    FlowMatching(first_frame=1.0).loss("train", zero, clips(4, frames=1), NoState(), rng(0))
    assert asked.questions[0].given is None


def test_the_default_gives_half_of_the_clips_a_first_frame_where_the_model_takes_one_and_none_elsewhere(zero, asked):
    assert FlowMatching().share(asked, 3) == 0
    asked.image = "frames"
    assert FlowMatching().share(asked, 3) == 0.5
    asked.image = "channels"
    assert FlowMatching().share(asked, 3) == 0
    with pytest.raises(ConfigError, match="takes no clean latent frame"):
        FlowMatching(first_frame=0.5).check(asked)


def test_a_measure_gives_the_same_items_their_first_frame_in_any_batch(zero, asked):
    asked.image = "frames"
    batch = clips(8)
    FlowMatching().measure(zero, batch, "default", 0.5, 3)
    alone = Batch({name: tensor[5:6] for name, tensor in batch.tensors.items()}, batch.keys[5:6])
    FlowMatching().measure(zero, alone, "default", 0.5, 3)
    whole, one = asked.questions
    assert torch.equal(whole.given[5:6], one.given) and torch.equal(whole.x[5:6], one.x)
    assert 0 < whole.given[:, 0].sum() < 8
