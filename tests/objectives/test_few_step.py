"""The student's own way through its steps: which network is asked what, under which adapter, with which gradients."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.objectives.gaussians import Numbers, NumbersFamily, Roles, blank
from weft.adapters.several import SeveralAdapters
from weft.contracts import DEFAULT, Batch, Denoise, Expert, Model, NoState, Rng
from weft.few_steps import StepList
from weft.math.chance import generator
from weft.objectives.dmd import Dmd
from weft.objectives.few_step import Rollout, rollout_of, scene_of

FOUR = StepList.of(4, 5.0)
PAIR = (Expert("high", (0.875, 1.0)), Expert("low", (0.0, 0.875)))
HIGH, LOW = PAIR


@dataclass(frozen=True)
class Question:
    """What was asked, of which role, and whether the answer can be learned from."""

    role: str | None
    asked: Denoise
    learned: bool

    @property
    def time(self) -> float:
        return round(float(self.asked.t[0]), 4)


@dataclass
class Witness(NumbersFamily):
    """Keeps what the network is asked."""

    questions: list[Question] = field(default_factory=list)

    def forward(self, call: Any, inputs: Denoise) -> Tensor:
        answer = call(inputs.x, inputs.t, inputs.cond["text"])
        self.questions.append(Question(call.role, inputs, answer.requires_grad))
        return answer

    def told(self) -> list[tuple[str | None, float]]:
        return [(q.role, q.time) for q in self.questions]


def one(steps: StepList = FOUR, **options: Any) -> tuple[Model, Witness]:
    """A model of one network, and the witness of what it is asked."""
    network, family = Numbers(steps, 0.6), Witness(steps.shift, **options)
    return Model(network, family, Roles(network)), family  # type: ignore[arg-type]


def two(experts: tuple[Expert, ...] = PAIR) -> tuple[Model, Witness]:
    """A model of two networks, of which those named are trained."""
    networks = {expert.name: Numbers(FOUR, 0.6) for expert in experts}
    family = Witness(5.0, experts=experts, all_experts=PAIR)
    adapters = {name: Roles(network, name) for name, network in networks.items()}
    return Model(nn.ModuleDict(networks), family, SeveralAdapters(adapters)), family  # type: ignore[arg-type]


def rng(done: int = 0, seed: int = 0, number: int = 0) -> Rng:
    """The chance of a micro-batch in a phase's own step `done`."""
    return Rng(generator("cpu", seed, done, number), generator("cpu", seed, done), seed, done * 4 + number, done)


def clips(items: int = 2, frames: int = 3) -> Batch:
    latents = torch.randn(items, 4, frames, 2, 2, generator=torch.Generator().manual_seed(1))
    return Batch({"latents": latents, "text": torch.full((items, 1, 1), 1.5)}, tuple(map(str, range(items))))


def asked_in(phase: str, model: Model, objective: Dmd, batch: Batch, chance: Rng) -> list[Question]:
    """The questions of one loss, and its backward pass."""
    family = model.family
    assert isinstance(family, Witness)
    family.questions.clear()
    with model.adapters.use(phase):
        objective.loss(phase, model, batch, NoState(), chance).total.backward()
    return list(family.questions)


# ---- Exits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 4, 8])
def test_each_exit_is_hit_once_in_a_row_of_steps_in_an_order_drawn_anew(steps):
    way = rollout_of(StepList.of(steps, 5.0), DEFAULT, (DEFAULT,), (DEFAULT,), False)
    exits = [way.exit(rng(done), "student") for done in range(40 * steps)]
    rows = [tuple(exits[i : i + steps]) for i in range(0, len(exits), steps)]
    assert all(sorted(row) == list(range(steps)) for row in rows)
    assert steps < 3 or len(set(rows)) > 4


def test_the_exit_is_the_same_in_all_micro_batches_of_all_ranks_and_another_for_each_phase():
    """It decides how often a network is called: sharded engines would wait for ever."""
    way = rollout_of(FOUR, DEFAULT, (DEFAULT,), (DEFAULT,), False)
    for done in range(8):
        assert len({way.exit(rng(done, number=number), "student") for number in range(4)}) == 1
    ways = [[way.exit(rng(done), phase) for done in range(24)] for phase in ("student", "critic")]
    assert ways[0] != ways[1]


# ---- Gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_there_is_no_gradient_before_the_step_at_which_the_way_is_left(steps):
    """a and b of each step are its own, and an earlier step's would have one if the graph went on through it."""
    model, _ = one(StepList.of(steps, 5.0))
    network = model.network
    assert isinstance(network, Numbers)
    way = rollout_of(network.steps, DEFAULT, (DEFAULT,), (DEFAULT,), False)
    for done in range(steps):
        network.zero_grad()
        asked = asked_in("student", model, Dmd(steps=steps, guidance=1), blank(2, 1.5), rng(done))
        left = way.exit(rng(done), "student")
        assert network.a.grad is not None and network.b.grad is not None
        assert network.a.grad.nonzero().flatten().tolist() == network.b.grad.nonzero().flatten().tolist() == [left]
        assert [q.learned for q in asked if q.role == "student"] == [False] * left + [True]


def test_a_students_phase_moves_no_critic_and_a_critics_no_student():
    for phase, other in (("student", "critic"), ("critic", "student")):
        model, _ = one()
        asked = asked_in(phase, model, Dmd(guidance=1), blank(2, 1.5), rng())
        assert all(p.grad is not None and p.grad.any() for p in model.adapters.parameters(phase).values())
        assert all(p.grad is None for p in model.adapters.parameters(other).values())
        assert [q.role for q in asked if q.learned] == [phase]


# ---- Questions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "teacher", "critic"),
    [({"guidance": 4}, 2, 1), ({"guidance": 1}, 1, 1), ({"guidance": 4, "critic_guidance": 2}, 2, 2)],
)
def test_a_phase_asks_each_part_as_often_as_the_method_says(change, teacher, critic):
    """The student's phase: its way, the critic, the teacher with and without the prompt. The critic's: way, critic."""
    model, _ = one()
    objective, batch = Dmd(**change), blank(2, 1.5, negative=0.0)
    way = objective.rollout(DEFAULT, model.family)
    for done in range(4):
        asked = Counter(q.role for q in asked_in("student", model, objective, batch, rng(done)))
        assert asked == {"student": way.exit(rng(done), "student") + 1, "critic": critic, None: teacher}
        asked = Counter(q.role for q in asked_in("critic", model, objective, batch, rng(done)))
        assert asked == {"student": way.exit(rng(done), "critic") + 1, "critic": 1}


def test_the_teacher_is_asked_with_all_adapters_off_with_the_caption_and_with_the_negative_prompt():
    model, _ = one()
    asked = asked_in("student", model, Dmd(), blank(3, 1.5, negative=-0.5), rng())
    with_caption, without = [q.asked for q in asked if q.role is None]
    assert with_caption.cond["text"].flatten().tolist() == [1.5] * 3
    assert without.cond["text"].flatten().tolist() == [-0.5] * 3
    assert torch.equal(with_caption.x, without.x) and torch.equal(with_caption.t, without.t)
    assert all("/" not in name for q in asked for name in q.asked.cond)


def test_a_model_that_is_told_its_guidance_is_asked_once_and_its_student_is_told_none():
    model, _ = one(embeds_guidance=True)
    asked = asked_in("student", model, Dmd(guidance=6), blank(2, 1.5, negative=0.0), rng())
    assert [q.asked.cond["guidance"].tolist() for q in asked if q.role is None] == [[6.0, 6.0]]
    assert all("guidance" not in q.asked.cond for q in asked if q.role is not None)


def test_the_student_is_asked_at_its_list_and_each_answer_meets_fresh_noise_at_the_next_time():
    """x = (1 - t) x_0 + t n with x_0 = a x + b, and n drawn after the noise that the way began with."""
    model, family = one()
    network = model.network
    assert isinstance(network, Numbers)
    with torch.no_grad():
        network.a.copy_(torch.tensor([0.3, 0.5, 0.7, 0.9]))
    way = rollout_of(FOUR, DEFAULT, (DEFAULT,), (DEFAULT,), False)
    scene, chance = scene_of(blank(2, 1.5), "default", None), rng().own
    with model.adapters.use("student"):
        made = way.run(model, scene, 3, rng(), learn=False)
    assert family.told() == [("student", round(t, 4)) for t in FOUR.times]
    x = torch.randn(scene.like.shape, generator=chance)
    for number, question in enumerate(family.questions):
        assert_close(question.asked.x, x)
        expected = network.a[number].detach() * x + network.b[number].detach()
        if number < 3:
            later = FOUR.times[number + 1]
            x = (1 - later) * expected + later * torch.randn(x.shape, generator=chance)
    assert_close(made, expected)
    assert {q.asked.t.dtype for q in family.questions} == {torch.float32}  # trap: no time is truncated to an integer


@pytest.mark.parametrize("number", range(4))
def test_with_inputs_of_data_one_step_is_asked_at_a_noised_clip(number):
    model, family = one()
    way, batch = rollout_of(FOUR, DEFAULT, (DEFAULT,), (DEFAULT,), True), clips()
    scene, chance, t = scene_of(batch, "default", None), rng().own, FOUR.times[number]
    way.run(model, scene, number, rng(), learn=False)
    assert family.told()[0][1] == pytest.approx(t, abs=1e-4) and len(family.questions) == 1
    noise = torch.randn(batch["latents"].shape, generator=chance)
    assert_close(family.questions[0].asked.x, (1 - t) * batch["latents"] + t * noise)


def test_teacher_and_critic_look_at_the_students_sample_at_one_time_and_one_noise():
    model, _ = one()
    asked = asked_in("student", model, Dmd(), blank(2, 1.5, negative=0.0), rng(3))
    looks = [q.asked for q in asked if q.role != "student"]
    assert len(looks) == 3 and all(torch.equal(q.x, looks[0].x) and torch.equal(q.t, looks[0].t) for q in looks)
    assert not any(q.x.requires_grad for q in looks) and looks[0].t[0] != looks[0].t[1]


# ---- Experts -------------------------------------------------------------------------------------------------------


def test_of_two_experts_the_high_student_stops_at_the_boundary_and_the_low_one_goes_on_from_it():
    """Boundary 0.875 of the list 1, 0.9375, 0.8333, 0.625: two steps each."""
    model, _ = two()
    exits: dict[str, set[int]] = {"high": set(), "low": set()}
    for expert in PAIR:
        for done in range(2):
            asked = asked_in(f"student_{expert.name}", model, Dmd(guidance=1), blank(2, 1.5), rng(done))
            way = [(q.role, q.time) for q in asked if (q.role or "").startswith("student")]
            high = [("student_high", 1.0), ("student_high", 0.9375)]
            low = [("student_low", 0.8333), ("student_low", 0.625)]
            assert way in ([high[:1], high] if expert is HIGH else [high + low[:1], high + low])
            exits[expert.name].add(len(way))
    assert exits == {"high": {1, 2}, "low": {3, 4}}


def test_of_a_low_students_way_the_high_students_steps_learn_nothing():
    model, _ = two()
    asked = asked_in("student_low", model, Dmd(guidance=1), blank(2, 1.5), rng())
    assert {q.role for q in asked if q.learned} == {"student_low"}
    for name in ("student_high", "critic_high", "critic_low"):
        assert all(p.grad is None for p in model.adapters.parameters(name).values())


@pytest.mark.parametrize(("experts", "data"), [(PAIR, False), (PAIR, True), ((HIGH,), False), ((LOW,), False)])
@pytest.mark.parametrize("phase", ["student", "critic"])
def test_no_network_is_asked_at_times_that_are_the_others(experts, data, phase):
    model, _ = two(experts)
    objective = Dmd(guidance=1, inputs="data" if data else "simulated")
    for expert in experts:
        for done in range(8):
            for question in asked_in(f"{phase}_{expert.name}", model, objective, clips(), rng(done)):
                name, t = question.asked.expert, question.asked.t
                low, high = next(e.times for e in PAIR if e.name == name)
                assert low <= t.min() and t.max() <= high
                assert question.role is None or question.role.endswith(f"_{name}")


def test_the_low_expert_alone_begins_at_noised_clips_at_its_own_first_step():
    model, _ = two((LOW,))
    batch = clips()
    asked = asked_in("student_low", model, Dmd(guidance=1), batch, rng())
    way = [q for q in asked if q.role == "student_low"]
    assert way[0].time == 0.8333 and len(way) in (1, 2)
    noise = torch.randn(batch["latents"].shape, generator=rng().own)
    assert_close(way[0].asked.x, (1 - FOUR.times[2]) * batch["latents"] + FOUR.times[2] * noise)


def test_the_high_expert_alone_has_the_way_that_it_has_beside_the_other():
    assert rollout_of(FOUR, HIGH, (HIGH,), PAIR, False) == rollout_of(FOUR, HIGH, PAIR, PAIR, False)
    assert rollout_of(FOUR, LOW, PAIR, PAIR, False).first == 0
    assert rollout_of(FOUR, LOW, (LOW,), PAIR, False) == Rollout(
        FOUR, 2, (2, 3), (("student_high", "high"),) * 2 + (("student_low", "low"),) * 2
    )


# ---- A first frame that is given -----------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["student", "critic"])
def test_a_given_first_frame_stands_clean_in_every_question(phase):
    model, _ = one(image="frames")
    batch = clips()
    for done in range(4):
        asked = asked_in(phase, model, Dmd(guidance=4, first_frame=1), both(batch), rng(done))
        assert len(asked) >= 2
        for question in asked:
            assert question.asked.given is not None and question.asked.given.tolist() == [[True, False, False]] * 2
            assert torch.equal(question.asked.x[:, :, 0], batch["latents"][:, :, 0])


def test_what_the_student_makes_begins_with_the_given_frame_as_it_is():
    model, family = one(image="frames")
    batch, given = clips(), torch.tensor([[True, False, False]] * 2)
    way = rollout_of(FOUR, DEFAULT, family.experts, family.all_experts, False)
    with model.adapters.use("student"):
        made = way.run(model, scene_of(batch, "default", given), 1, rng(), learn=False)
    assert torch.equal(made[:, :, 0], batch["latents"][:, :, 0])


@pytest.mark.parametrize("phase", ["student", "critic"])
def test_of_given_frames_nothing_is_learned(phase):
    """The loss and its gradient by the whole sample: the same when the network answers anything there."""
    model, family = one(image="frames")
    found = []
    for answer in (None, 100.0):
        family.questions.clear()
        other = replace(model, family=Odd(5.0, image="frames", answer=answer))  # type: ignore[arg-type]
        model.network.zero_grad()
        with model.adapters.use(phase):
            loss = Dmd(first_frame=1, strata=1).loss(phase, other, both(clips()), NoState(), rng(2))
            loss.total.backward()
        gradients = [p.grad for p in model.adapters.parameters(phase).values() if p.grad is not None]
        found.append([loss.total.detach(), *loss.metrics.values(), *gradients])
    assert len(found[0]) == (5 if phase == "student" else 3)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@dataclass
class Odd(NumbersFamily):
    """Answers something else where frames are given."""

    answer: float | None = None

    def forward(self, call: Any, inputs: Denoise) -> Tensor:
        velocity = call(inputs.x, inputs.t, inputs.cond["text"])
        if self.answer is None or inputs.given is None:
            return velocity
        return velocity.masked_fill(inputs.given[:, None, :, None, None], self.answer)


def both(batch: Batch) -> Batch:
    """With a negative prompt."""
    return Batch({**batch.tensors, "negative/text": torch.zeros(1, 1, 1)}, batch.keys)


def test_captions_alone_and_pictures_have_no_first_frame_to_give_and_half_of_the_clips_have():
    model, _ = one(image="frames")
    assert Dmd().share(model, clips()) == 0.5 and Dmd(first_frame=0.2).share(model, clips()) == 0.2
    assert Dmd().share(model, clips(frames=1)) == Dmd().share(model, blank(2, 1.5)) == 0
    questions = [q for done in range(40) for q in asked_in("critic", model, Dmd(guidance=1), clips(4), rng(done))]
    none = torch.zeros(4, 3, dtype=torch.bool)
    given = torch.stack([none if q.asked.given is None else q.asked.given for q in questions if q.role == "critic"])
    assert float(given[:, :, 0].float().mean()) == pytest.approx(0.5, abs=0.1) and not given[:, :, 1:].any()
