"""Distribution matching where all is known: numbers from a normal, by closed forms; and when which part moves."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tests.learners import FixedStream, NoMilestones
from tests.objectives.gaussians import Normal, Numbers, blank, family_of, numbers, posterior
from weft.contracts import DEFAULT, Expert, Model, NoState, Phase, Rng
from weft.engines.residency import Residence
from weft.engines.single_device import SingleEngine
from weft.errors import ConfigError
from weft.few_steps import StepList
from weft.math.chance import generator
from weft.objectives.dmd import Dmd
from weft.objectives.few_step import scene_of
from weft.run.config import Schedule
from weft.run.learner import Learner
from weft.run.pace import Pace
from weft.run.train import Course, train

MEAN, STD = 1.5, 0.6  # of the teacher
ONE, FOUR = StepList.of(1, 5.0), StepList.of(4, 5.0)
PAIR = (Expert("high", (0.875, 1.0)), Expert("low", (0.0, 0.875)))


def rng(step: int, seed: int = 0) -> Rng:
    return Rng(generator("cpu", seed, "own", step), generator("cpu", seed, "shared", step), seed, step, step)


def network_of(model: Model) -> Numbers:
    assert isinstance(model.network, Numbers)
    return model.network


# ---- The gradient --------------------------------------------------------------------------------------------------


def divergence(b: Tensor, a: Tensor, t: float) -> Tensor:
    """KL of what a student N(b, a^2) makes to the teacher's, both noised to t: of two normals in closed form."""
    ours, theirs = (((1 - t) * std) ** 2 + t**2 for std in (a, torch.tensor(STD)))
    return 0.5 * (torch.log(theirs / ours) + (ours + ((1 - t) * (b - MEAN)) ** 2) / theirs - 1)


def distance(b: float, a: float, t: float) -> float:
    """E |x_0 - r| over x_0 = a z + b: r is the teacher's estimate, so that the difference is normal, and its mean size
    that of a folded normal."""
    k = (1 - t) * STD**2 / (((1 - t) * STD) ** 2 + t**2)
    mean = (b - MEAN) * (1 - k * (1 - t))
    std = math.hypot(a * (1 - k * (1 - t)), k * t)
    return std * math.sqrt(2 / math.pi) * math.exp(-0.5 * (mean / std) ** 2) + mean * math.erf(mean / std / 2**0.5)


def analytic(model: Model, times: Tensor) -> tuple[float, float]:
    """The gradient by b and by a, the mean over some times.

    The difference of scores is (1-t)/t^2 (f - r), and x_t moves (1-t) as far as the sample: so the matching gradient is
    that of the divergence, times t^2 / (1-t)^2, over the distance.
    """
    network = network_of(model)
    a, b = (float(p.detach()) for p in (network.a, network.b))
    total = torch.zeros(2, dtype=torch.float64)
    for t in times.tolist():
        at = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (b, a)]
        slopes = torch.autograd.grad(divergence(at[0], at[1], t), at)
        total += torch.stack(slopes) * (t / (1 - t)) ** 2 / distance(b, a, t)
    by_b, by_a = (total / len(times)).tolist()
    return by_b, by_a


def found(model: Model, objective: Dmd, draws: int = 16, items: int = 16) -> tuple[float, float]:
    """The objective's own gradient by b and by a, the mean over some draws."""
    network, batch = network_of(model), blank(items, MEAN, side=32)
    with model.adapters.use("student"):
        for draw in range(draws):
            (objective.loss("student", model, batch, NoState(), rng(draw)).total / (items * draws)).backward()
    assert network.a.grad is not None and network.b.grad is not None
    return float(network.b.grad), float(network.a.grad)


# A million numbers, each with a deviation of about 1, and eight of the gradient's own size.
SAMPLED = 4e-3


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_with_an_exact_critic_the_gradient_at_a_time_is_the_analytic_one(t):
    model = numbers(ONE, STD, exact=True)
    objective = Dmd(steps=1, guidance=1, times=(t - 1e-4, t + 1e-4))
    assert found(model, objective) == pytest.approx(analytic(model, torch.tensor([t])), abs=SAMPLED)


def test_over_all_times_the_gradient_is_the_mean_of_the_density_that_is_cut_not_clamped():
    """Uniform u between the ends, moved by the shift: 5 u / (1 + 4 u)."""
    model = numbers(ONE, STD, exact=True)
    low, high = (t / (5 - 4 * t) for t in (0.02, 0.98))
    u = low + (high - low) * (torch.arange(400) + 0.5) / 400
    expected = analytic(model, 5 * u / (1 + 4 * u))
    assert found(model, Dmd(steps=1, guidance=1)) == pytest.approx(expected, abs=SAMPLED)
    assert max(map(abs, expected)) > 0.3


def test_at_the_teachers_own_distribution_the_gradient_is_nothing():
    model = numbers(ONE, STD, exact=True)
    network = network_of(model)
    with torch.no_grad():
        network.a.fill_(STD)
        network.b.fill_(MEAN)
    assert found(model, Dmd(steps=1, guidance=1)) == pytest.approx((0, 0), abs=1e-6)


def test_the_posterior_of_the_model_of_numbers_is_that_of_numerical_integration():
    """The ground that these tests stand on: Bayes' rule on a grid."""
    t, x = 0.4, 0.3
    grid = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    mixture = [(-1.0, 0.5), (2.0, 0.8)]
    prior = sum(torch.exp(-0.5 * ((grid - m) / s) ** 2) / s for m, s in mixture)
    likely = prior * torch.exp(-0.5 * ((x - (1 - t) * grid) / t) ** 2)
    expected = float((likely * grid).sum() / likely.sum())
    normals: list[Normal] = [(torch.tensor(m), torch.tensor(s)) for m, s in mixture]
    assert float(posterior(torch.full((1, 1, 1, 1, 1), x), torch.tensor([t]), normals)) == pytest.approx(expected)


# ---- Convergence ---------------------------------------------------------------------------------------------------


def assert_made(model: Model, mean: float, std: float, near: float) -> None:
    """Where its way is left at any step, the student makes the teacher's numbers."""
    for made_mean, made_std in network_of(model).made():
        assert (float(made_mean), float(made_std)) == (pytest.approx(mean, abs=near), pytest.approx(std, abs=near))


# Four steps share what the matching sees, and the last sixth of a teacher's std is a shallow valley.
@pytest.mark.parametrize(("steps", "rounds", "near"), [(ONE, 100, 0.03), (FOUR, 300, 0.1)], ids=["one", "four"])
def test_with_an_exact_critic_the_student_comes_to_make_the_teachers_numbers(steps, rounds, near):
    model = numbers(steps, STD, exact=True)
    objective = Dmd(steps=len(steps.times), guidance=1)
    optimizer = adam("student", model.adapters.parameters("student"))
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, rounds)
    for step in range(rounds):
        with model.adapters.use("student"):
            objective.loss("student", model, blank(8, MEAN), NoState(), rng(step)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        falling.step()
    assert_made(model, MEAN, STD, near)


def through_the_loop(model: Model, objective: Dmd, steps: int, negative: float | None = None) -> list[dict[str, float]]:
    """Train student and critic by the one loop; what each step logged."""
    optimizers = objective.optimizers(model, NoState(), adam)
    engine = SingleEngine(torch.device("cpu"), "fp32", Residence())
    pace = Pace(objective, model.family.experts, steps)
    learner = Learner(model, objective, NoState(), engine, optimizers, 0, pace)
    told: list[Any] = []
    course = Course(Schedule(steps=steps, curve="linear"), NoMilestones(), told.append)
    train(learner, [FixedStream([blank(8, MEAN, negative)], steps)], course)  # type: ignore[list-item]
    return [event.metrics for event in told]


def adam(name: str, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    rate = 0.1 if name == "student" else 0.2
    return torch.optim.Adam([{"params": list(parameters.values()), "base_lr": rate}], lr=rate, betas=(0.0, 0.99))


def test_with_a_critic_that_learns_by_its_own_phase_the_student_comes_to_make_the_teachers_numbers():
    model = numbers(FOUR, STD)
    through_the_loop(model, Dmd(steps=4, guidance=1, student_every=2), 400)
    assert_made(model, MEAN, STD, 0.1)


def test_a_guided_teachers_numbers_lie_beyond_the_captions_by_our_convention():
    """Guidance moves the mean of two normals of one std from u to u + g (c - u): 0.5 + 2 (1.5 - 0.5) = 2.5."""
    model = numbers(ONE, STD)
    logged = through_the_loop(model, Dmd(steps=1, guidance=2, student_every=2), 240, negative=0.5)
    assert_made(model, 2.5, STD, 0.03)
    moves = [row for row in logged if "student/gap" in row]
    assert moves[-1]["student/gap"] < 0.02 < 0.5 < moves[0]["student/gap"]


# ---- When which part moves -----------------------------------------------------------------------------------------


def moved(objective: Dmd, steps: int, experts: Sequence[Expert]) -> list[list[str]]:
    """The phases of each step."""
    return [[phase.name for phase in objective.phases(step, experts)] for step in range(steps)]


def test_the_critic_moves_at_every_step_and_the_student_after_it_at_every_kth():
    """Counted in the run's own steps, which no epoch sets back (trap 39)."""
    alone, both = ["critic"], ["critic", "student"]
    assert moved(Dmd(student_every=3), 7, (DEFAULT,)) == [alone, alone, both, alone, alone, both, alone]
    assert moved(Dmd(student_every=1), 2, (DEFAULT,)) == [both, both]


def test_a_phase_moves_its_own_optimizer_alone_under_its_own_adapter():
    phases = [phase for step in range(20) for phase in Dmd(turn=4).phases(step, PAIR)]
    assert set(phases) == {
        Phase(name, name, (name,)) for name in ("critic_high", "student_high", "critic_low", "student_low")
    }


def test_with_two_experts_the_student_is_counted_by_an_experts_own_steps():
    """Turns of 2 steps and a student at every third: the high one's third step is the first of its second turn."""
    names = moved(Dmd(student_every=3, turn=2), 12, PAIR)
    assert names == [
        ["critic_high"], ["critic_high"], ["critic_low"], ["critic_low"],
        ["critic_high", "student_high"], ["critic_high"], ["critic_low", "student_low"], ["critic_low"],
        ["critic_high"], ["critic_high", "student_high"], ["critic_low"], ["critic_low", "student_low"],
    ]  # fmt: skip


def test_each_role_counts_its_own_steps_for_its_rates_its_strata_and_its_exits():
    pace = Pace(Dmd(student_every=3, turn=2), PAIR, 12)
    assert [pace.of(name) for name in ("critic_high", "student_high", "critic_low", "student_low")] == [6, 2, 6, 2]
    assert [pace.done("student_high", step) for step in (4, 9)] == [0, 1]
    assert [pace.done("critic_low", step) for step in (2, 3, 6, 7, 10)] == [0, 1, 2, 3, 4]


def test_student_and_critic_are_trained_on_each_network_and_the_students_are_shown():
    assert Dmd().roles((DEFAULT,)) == ("student", "critic")
    assert Dmd().roles(PAIR) == ("student_high", "critic_high", "student_low", "critic_low")
    assert Dmd().shown(PAIR) == ("student_high", "student_low")


def test_the_negative_prompt_is_told_where_guidance_asks_for_it_alone():
    assert Dmd(negative="blurry").texts == {"negative": "blurry"}
    assert Dmd(guidance=1).texts == {}
    assert Dmd(guidance=1, critic_guidance=2).texts == Dmd(guidance=1, guidance_low=3).texts == {"negative": ""}


# ---- Times at which teacher and critic look ------------------------------------------------------------------------


@pytest.mark.parametrize("expert", PAIR, ids=lambda e: e.name)
def test_teacher_and_critic_look_within_the_ends_and_within_the_experts_own_times(expert):
    """Trap 44: T in [0.02, 0.98] and in the expert's range; the density is cut there, and nothing gathers at an end."""
    family = family_of(12.0, experts=PAIR, all_experts=PAIR)
    scene = scene_of(blank(4, 0.0), expert.name, None)
    times = torch.cat([Dmd().look(expert, family, scene, rng(step)) for step in range(200)])
    low, high = max(0.02, expert.times[0]), min(0.98, expert.times[1])
    assert low <= times.min() and times.max() <= high and len(times.unique()) > 700
    # Uniform before the shift 12, between the ends.
    u, ends = times / (12 - 11 * times), [t / (12 - 11 * t) for t in (low, high)]
    assert float(u.mean()) == pytest.approx(sum(ends) / 2, abs=0.01 * (ends[1] - ends[0]))


def test_the_draws_of_all_ranks_hit_each_stratum_once_within_the_cut():
    family, scene = family_of(1.0), scene_of(blank(2, 0.0), "default", None)
    objective, draws = Dmd(strata=8, times=(0.2, 0.6)), []
    for draw in (3, 1, 0, 2):
        chance = Rng(generator("cpu", "own", draw), generator("cpu", "shared"), 7, draw)
        draws.append(objective.look(DEFAULT, family, scene, chance))
    assert sorted(((torch.cat(draws) - 0.2) * 20).long().tolist()) == list(range(8))


@pytest.mark.parametrize("times", [(0.0, 0.98), (0.02, 1.0), (0.5, 0.5)])
def test_the_ends_of_time_are_refused(times):
    with pytest.raises(ValidationError, match=r"Write \[0.02, 0.98\]"):
        Dmd(times=times)


# ---- What does not go together -------------------------------------------------------------------------------------


def test_an_expert_without_a_step_of_its_own_is_refused_with_the_steps():
    """One step is asked at time 1, which is the high expert's."""
    family = family_of(5.0, experts=PAIR, all_experts=PAIR)
    with pytest.raises(ConfigError, match=r"none of the student's 1 .* is a time of expert 'low'"):
        Dmd(steps=1).check(family)
    Dmd(steps=4).check(family)


def test_times_that_no_expert_has_are_refused():
    family = family_of(5.0, experts=PAIR[:1], all_experts=PAIR)
    with pytest.raises(ConfigError, match=r"\[0.1, 0.5\] and the times of expert 'high'"):
        Dmd(times=(0.1, 0.5)).check(family)


def test_a_guidance_of_the_low_expert_and_a_first_frame_are_refused_where_there_is_none():
    with pytest.raises(ConfigError, match=r"objective\.guidance_low: this model has one network"):
        Dmd(guidance_low=3).check(family_of())
    with pytest.raises(ConfigError, match=r"objective\.first_frame: 0\.5 was asked for"):
        Dmd(first_frame=0.5).check(family_of())


def test_captions_are_enough_unless_a_way_must_begin_at_a_noised_clip():
    alone = [family_of(5.0, experts=(expert,), all_experts=PAIR) for expert in PAIR]
    both = family_of(5.0, experts=PAIR, all_experts=PAIR)
    assert Dmd().needs_clips(family_of()) is Dmd().needs_clips(both) is Dmd().needs_clips(alone[0]) is None
    assert "expert 'low' alone begins at time 0.8333" in (Dmd().needs_clips(alone[1]) or "")
    assert Dmd(inputs="data").needs_clips(family_of()) == "objective.inputs is data"
