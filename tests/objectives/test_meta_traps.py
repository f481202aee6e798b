"""What others' meta-learners got wrong, each a test: numbers are those of the traps in the literature's list."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.learners import NoMilestones
from tests.small_documents import (
    ROLE,
    SGD,
    Perceptron,
    ToyDocuments,
    documents,
    learner_of,
    model_of,
    trained,
    weights,
)
from weft.adapters.lora import Lora
from weft.contracts import Batch, Model
from weft.errors import ConfigError, ModelError
from weft.events import StepEnded
from weft.objectives.inner_loop import asked, resting_dropout
from weft.objectives.learned_rates import LearnedRates
from weft.objectives.meta_learning import CMaml, LaMaml, MetaLearner, Rates, SyncMaml
from weft.objectives.outer_steps import StretchedStep
from weft.objectives.rows import current, replayed
from weft.run.checkpoint_tree import adopt, learner_state, pack, unpack
from weft.run.learner import Learner
from weft.run.optimizers import AdamW

BATCHES = [documents(6, seed, replay=4) for seed in range(4)]
ADAMW = AdamW(lr=1e-2)
SINGLE = ToyDocuments(dtype=torch.float32)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def rates_in(learner: Learner) -> LearnedRates:
    assert isinstance(learner.state, LearnedRates)
    return learner.state


def gradients_of(objective: MetaLearner, model: Model, batch: Batch = BATCHES[0]) -> Any:
    """The meta-gradient of a batch whose rows come in order."""
    trained = model.adapters.parameters(ROLE)
    chunks = current(batch).chunks(objective.inner_steps)
    return asked(objective, model, objective.init(model), trained, chunks, current(batch).beside(replayed(batch)))


# ---- Names (traps 1, 5) --------------------------------------------------------------------------------------------


def positional(network: nn.Module, rates: Mapping[str, Tensor]) -> int:
    """How many trained tensors a rate of the right shape reaches when rates are zipped with all parameters, as the
    source did it: `for p, lr in zip(model.parameters(), rates): if p.grad is not None: p.grad.mul_(lr)`."""
    pairs = zip(network.parameters(), rates.values(), strict=False)
    return sum(p.requires_grad and p.shape == rate.shape for p, rate in pairs)


def test_trap_1_with_frozen_parameters_in_between_position_pairs_nothing_and_names_pair_all() -> None:
    lora = Lora(backend="native", rank=2, targets=("auto",))
    learner = learner_of(LaMaml(rates=Rates(granularity="element"), warm_up=0.0), SINGLE, SGD, recipe=lora)
    rates = rates_in(learner).values
    assert list(rates) == list(weights(learner))
    assert "head.weight" in rates and "body.0.lora_A.weight" in rates
    assert positional(learner.model.network, rates) == 0 < len(rates)
    shake(learner)
    before = {name: rate.detach().clone() for name, rate in rates.items()}
    trained(learner, BATCHES, 3)
    assert all(not torch.equal(rate, before[name]) for name, rate in rates.items())


class Grown(Perceptron):
    """A network whose head was put in front of what is there already, as one that is added later may be."""

    def __init__(self) -> None:
        super().__init__((8, 6, 5, 3))
        body = self.body
        del self.body
        self.body = body  # now behind the head

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@dataclass(frozen=True)
class GrownDocuments(ToyDocuments):
    """Its family, with the weights of the other one."""

    def network(self) -> Perceptron:
        grown = Grown().to(self.dtype)
        grown.load_state_dict(super().network().state_dict())
        return grown


def test_trap_1_a_head_that_was_added_later_changes_nothing() -> None:
    one, other = learner_of(LaMaml(warm_up=0.0), ToyDocuments()), learner_of(LaMaml(warm_up=0.0), GrownDocuments())
    names = [list(weights(learner)) for learner in (one, other)]
    assert names[0] != names[1] and sorted(names[0]) == sorted(names[1])  # a list of rates would be dealt out otherwise
    for learner in (one, other):
        trained(learner, BATCHES, 5)
    torch.testing.assert_close(weights(other), weights(one), rtol=0, atol=1e-15)


def test_trap_5_a_parameter_that_gains_a_gradient_while_training_is_refused() -> None:
    lora = Lora(backend="native", rank=2, targets=("auto",))
    learner = learner_of(CMaml(warm_up=0.0), SINGLE, SGD, recipe=lora)
    trained(learner, BATCHES, 1)
    learner.model.network.get_parameter("body.1.bias").requires_grad_(True)
    with pytest.raises(ModelError, match=r"without a rate of their own, first 'body.1.bias'"):
        trained(learner, BATCHES, 1)


# ---- Rates and steps (traps 2, 8, 9, 18, 19) -----------------------------------------------------------------------


def after_one_step(start: float, outer: str, grown: float = 1.0) -> dict[str, Tensor]:
    """How far weights go in one step with rates that have grown so much since they began."""
    rates = Rates(start=start, granularity="element", param="relu", optimizer="sgd", lr=1e-30)
    # The inner steps are the same for both: they take the rates before.
    learner = learner_of(LaMaml(rates=rates, outer=outer, warm_up=0.0, inner_steps=1), ToyDocuments(), ADAMW)
    before, optimizer, state = weights(learner), learner.optimizers[ROLE], rates_in(learner)
    for parameter in learner.model.adapters.parameters(ROLE).values():
        parameter.grad = torch.ones_like(parameter)
    for value in state.values.values():
        value.data.mul_(grown)
    optimizer.step()
    return {name: w - before[name] for name, w in weights(learner).items()}


@pytest.mark.parametrize("outer", ["optimizer_alpha", "sgd_alpha"])
def test_trap_2_twice_the_rate_goes_twice_as_far_even_with_adam(outer: str) -> None:
    """A rate that multiplies the gradient is divided out again by Adam's second moment."""
    once, twice = after_one_step(0.1, outer), after_one_step(0.1, outer, grown=2.0)
    for name, way in once.items():
        assert bool((way != 0).all())
        torch.testing.assert_close(twice[name], 2 * way, rtol=1e-9, atol=0)


def test_a_rate_that_has_not_grown_leaves_the_optimizers_step_bit_by_bit() -> None:
    family = ToyDocuments(dtype=torch.float32)
    plain, stretched = (learner_of(CMaml(warm_up=0.0), family, ADAMW) for _ in range(2))
    ones = {name: torch.ones(()) for name in weights(plain)}
    stretched.optimizers[ROLE] = StretchedStep(stretched.optimizers[ROLE], lambda: ones)
    for learner in (plain, stretched):
        trained(learner, BATCHES, 4)
    assert all(torch.equal(w, weights(plain)[name]) for name, w in weights(stretched).items())


@pytest.mark.parametrize("objective", [LaMaml(warm_up=0.0), LaMaml(warm_up=0.0, order="first"), SyncMaml(warm_up=0.0)])
def test_trap_2_rates_have_gradients_and_move(objective: MetaLearner) -> None:
    learner = learner_of(objective, ToyDocuments(), ADAMW)
    before = {name: value.detach().clone() for name, value in rates_in(learner).values.items()}
    trained(learner, BATCHES, 5)
    assert all(not torch.equal(value, before[name]) for name, value in rates_in(learner).values.items())


def test_trap_8_a_rate_below_zero_is_dead_and_told_of_and_a_logarithm_never_dies() -> None:
    dead = learner_of(LaMaml(rates=Rates(granularity="element", param="relu"), warm_up=0.0), ToyDocuments())
    rates_in(dead).values["head.bias"].data[:] = torch.tensor([-0.25, -0.5, 0.25])
    told = last_step(trained(dead, BATCHES, 2))
    after = rates_in(dead).values["head.bias"].detach()
    assert after[:2].tolist() == [-0.25, -0.5] and after[2] != 0.25  # a dead one has no gradient
    numbers = 5 * 3 + 3  # of the head
    assert told["train/rate_head_dead"] == pytest.approx(2 / numbers)
    assert told["train/rate_head_min"] == -0.5
    alive = learner_of(LaMaml(rates=Rates(param="exp"), warm_up=0.0), ToyDocuments())
    for value in rates_in(alive).values.values():
        value.data.sub_(40.0)
    assert all(bool((step > 0).all()) for step in rates_in(alive).steps().values())
    assert last_step(trained(alive, BATCHES, 1))["train/rate_head_dead"] == 0


def last_step(told: list[Any]) -> Mapping[str, float]:
    return [event for event in told if isinstance(event, StepEnded)][-1].metrics


def test_trap_9_a_heads_long_gradient_does_not_cut_that_of_the_rest() -> None:
    rates = Rates(granularity="element", param="relu", optimizer="sgd", lr=1.0, head_lr=0.5, clip=0.1, head_start=0.7)
    learner = learner_of(LaMaml(rates=rates, warm_up=0.0), ToyDocuments())
    state, optimizer = rates_in(learner), learner.optimizers["rates"]
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5]
    assert {float(v.detach().flatten()[0]) for n, v in state.values.items() if state.groups[n] == "head"} == {0.7}
    before = {name: value.detach().clone() for name, value in state.values.items()}
    for name, value in state.values.items():
        value.grad = torch.full_like(value, 1e3 if name.startswith("head") else 1e-3)
    optimizer.step()
    moved = {name: before[name] - value.detach() for name, value in state.values.items()}
    torch.testing.assert_close(moved["body.0.weight"], torch.full((6, 8), 1e-3).double())  # shorter than the limit
    of_head = torch.cat([way.flatten() for name, way in moved.items() if name.startswith("head")])
    assert float(of_head.norm()) == pytest.approx(0.5 * 0.1, rel=1e-6)


def test_trap_18_rates_have_no_weight_decay() -> None:
    learner = learner_of(LaMaml(warm_up=0.0), ToyDocuments(), ADAMW)
    assert [group["weight_decay"] for group in learner.optimizers["rates"].param_groups] == [0.0, 0.0]
    before = {name: value.detach().clone() for name, value in rates_in(learner).values.items()}
    for value in rates_in(learner).values.values():
        value.grad = torch.zeros_like(value)
    learner.optimizers["rates"].step()
    assert all(torch.equal(value, before[name]) for name, value in rates_in(learner).values.items())


def test_trap_19_the_schedule_moves_the_outer_step_and_not_the_rates() -> None:
    learner = learner_of(LaMaml(warm_up=0.0), ToyDocuments(), ADAMW, steps=4)
    assert learner.objective.steady == {"rates"}  # type: ignore[attr-defined]
    told = [e.metrics for e in trained(learner, BATCHES, 4, warmup=3) if isinstance(e, StepEnded)]
    assert [step["default/lr"] for step in told] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert {step["rates/lr"] for step in told} == {0.01}


# ---- The inner loop (traps 10, 12, 16) -----------------------------------------------------------------------------


def shake(learner: Learner) -> None:
    """A LoRA in the middle of its training: B is no longer zero."""
    chance = torch.Generator().manual_seed(3)
    for parameter in learner.model.adapters.parameters(ROLE).values():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=chance))


def test_trap_10_a_fresh_lora_moves_after_a_warm_up_and_its_a_has_rates_that_learn() -> None:
    lora = Lora(backend="native", rank=2, targets=("auto",))
    learner = learner_of(LaMaml(warm_up_steps=3), SINGLE, ADAMW, recipe=lora)
    a = "body.0.lora_A.weight"
    first, rate = weights(learner), rates_in(learner).values[a].detach().clone()
    told = [e.metrics for e in trained(learner, BATCHES, 3) if isinstance(e, StepEnded)]
    assert all("rates/lr" not in step for step in told)
    assert torch.equal(rates_in(learner).values[a].detach(), rate)
    trained(learner, BATCHES, 3)
    assert not torch.equal(rates_in(learner).values[a].detach(), rate)
    assert all(not torch.equal(w, first[name]) for name, w in weights(learner).items())


@pytest.mark.parametrize("rows, steps, sizes", [(6, 5, [2, 1, 1, 1, 1]), (3, 5, [1, 1, 1]), (7, 1, [7])])
def test_trap_12_no_chunk_is_empty_and_none_is_left_out(rows: int, steps: int, sizes: list[int]) -> None:
    """The published code cuts 6 rows into 2, 2, 2, 0 and 0; the loss of an empty chunk is nan and its gradient 0."""
    chunks = current(documents(rows)).chunks(steps)
    assert [len(chunk.labels) for chunk in chunks] == sizes
    model = model_of(ToyDocuments())
    found = gradients_of(CMaml(inner_steps=steps, warm_up=0.0), model, documents(rows, replay=2))
    assert bool(torch.isfinite(found.loss))


def test_trap_16_inner_steps_are_without_dropout_and_modules_are_as_they_were_afterwards() -> None:
    family = ToyDocuments(dropout=0.5)
    model = model_of(family)
    model.network.get_submodule("body.1").eval()  # of its own, whatever the rest does
    before = {path: module.training for path, module in model.network.named_modules()}
    with resting_dropout(model.network, dropout=False):
        assert not any(module.training for module in model.network.modules())
    assert {path: module.training for path, module in model.network.named_modules()} == before

    def loss(objective: MetaLearner) -> float:
        learner = learner_of(objective, family)
        state, rng = learner.state, learner.rng("train", 0, 1)
        rng.own.manual_seed(0)
        return float(objective.loss("train", learner.model, BATCHES[0], state, rng).total.detach())

    quiet, noisy = CMaml(warm_up=0.0), CMaml(warm_up=0.0, dropout=True)
    assert loss(quiet) == loss(quiet) != loss(noisy) == loss(noisy)  # the run seeds dropout for each step


def test_each_glance_at_a_batch_cuts_it_anew() -> None:
    learner = learner_of(CMaml(warm_up=0.0), ToyDocuments())
    objective, model, state = learner.objective, learner.model, learner.state
    losses = set()
    for seed in range(4):
        rng = learner.rng("train", 0, 1)
        rng.own.manual_seed(seed)
        losses.add(float(objective.loss("train", model, BATCHES[0], state, rng).total.detach()))
    assert len(losses) == 4


# ---- Skips, checkpoints, refusals (traps 21, 28, 29) ---------------------------------------------------------------


@pytest.mark.parametrize("outer", ["optimizer_alpha", "sgd_alpha"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_that_is_not_finite_moves_neither_weights_nor_rates(outer: Any, dtype: torch.dtype) -> None:
    learner = learner_of(LaMaml(warm_up=0.0, outer=outer), ToyDocuments(dtype=dtype), ADAMW)
    trained(learner, BATCHES, 2)
    own, rates = weights(learner), {n: v.detach().clone() for n, v in rates_in(learner).values.items()}
    moments = {name: pack(learner_state(learner)["optimizers"][name], {}) for name in learner.optimizers}
    learner.model.network.get_submodule("body.0").register_forward_hook(lambda m, i, output: output * float("inf"))
    milestones = NoMilestones()
    trained(learner, BATCHES, 1, milestones)
    assert sorted(milestones.skips) == ["default", "rates"]
    assert all(torch.equal(w, own[name]) for name, w in weights(learner).items())
    assert all(torch.equal(v.detach(), rates[name]) for name, v in rates_in(learner).values.items())
    assert moments == {name: pack(learner_state(learner)["optimizers"][name], {}) for name in learner.optimizers}


def test_trap_21_a_checkpoint_has_the_rates_and_goes_on_to_the_bit() -> None:
    def fresh() -> Learner:
        return learner_of(LaMaml(warm_up=0.0, rates=Rates(granularity="row")), SINGLE, ADAMW)

    whole, first, second = fresh(), fresh(), fresh()
    trained(whole, BATCHES, 6)
    trained(first, BATCHES, 4)
    tensors: dict[str, Tensor] = {}
    plain = pack(learner_state(first), tensors)
    saved = unpack(plain, {name: tensor.clone() for name, tensor in tensors.items()})
    trained(first, BATCHES, 1)  # what was saved is not what goes on
    adopt(second, saved)
    trained(second, BATCHES[4 % len(BATCHES) :] + BATCHES, 2)
    assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(second).items())
    assert all(torch.equal(v, rates_in(whole).values[name]) for name, v in rates_in(second).values.items())


def test_rates_of_other_tensors_or_another_granularity_are_refused() -> None:
    rows, tensors = (learner_of(LaMaml(rates=Rates(granularity=g), warm_up=0.0), SINGLE) for g in ("row", "tensor"))
    with pytest.raises(ConfigError, match=r"the checkpoint has others, first that of 'body.0.bias'"):
        rows.state.load_state_dict(tensors.state.state_dict())


def test_trap_28_rates_are_single_precision_beside_half_precision_weights() -> None:
    learner = learner_of(LaMaml(warm_up=0.0, rates=Rates(granularity="element")), ToyDocuments(dtype=torch.bfloat16))
    assert {value.dtype for value in rates_in(learner).values.values()} == {torch.float32}
