"""The loop: what a step's gradient is made of, what is logged of it, and what happens when it is not finite."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.testing import assert_close

from tests.learners import (
    ROLE,
    FixedStream,
    Given,
    NoMilestones,
    batch_of,
    frozen,
    learner_of,
    parts,
    small_config,
    trained,
    weights,
)
from weft.contracts import Batch
from weft.errors import RunError
from weft.events import Incident, StepEnded
from weft.run.checkpoint_tree import optimizer_state, pack, restore_optimizer, unpack
from weft.run.config import RunConfig
from weft.run.milestones import Keeper
from weft.run.optimizers import AdamW, AdamW8bit, CustomOptimizer
from weft.run.showing import Gallery, LazyEncoders
from weft.run.train import Course, train

DESCENT = {"kind": "custom", "path": "torch.optim.SGD", "lr": 1.0}  # a step of it is the gradient itself
FOUR = batch_of(4)


@pytest.fixture
def configured(world, tmp_path):
    """A config on the small model with sections changed."""
    return lambda **change: small_config(tmp_path, world / "model", **change)


def gradient_of(config: RunConfig, given: list[Batch], objective: Any = None) -> dict[str, torch.Tensor]:
    """By how much one step at rate 1 lowers each weight."""
    learner = learner_of(config)
    learner.objective = objective or Given()
    before = frozen(weights(learner))
    trained(learner, config, given)
    return {name: before[name] - p.detach() for name, p in weights(learner).items()}


def steps_of(told: list[Any]) -> list[StepEnded]:
    return [event for event in told if isinstance(event, StepEnded)]


# ---- Gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1), (2, 2)])
def test_accumulated_micro_batches_have_the_gradient_of_the_one_batch_of_all_their_items(configured, sizes):
    """Also when they are of unequal size: a mean of means would weigh the lone item three times."""
    step = {"steps": 1, "warmup": 0, "max_norm": 0}
    whole = gradient_of(configured(optimizer=DESCENT, schedule=step), [FOUR])
    in_parts = configured(optimizer=DESCENT, schedule={**step, "accumulate": len(sizes)})
    largest = max(g.abs().max().item() for g in whole.values())
    for name, gradient in gradient_of(in_parts, parts(FOUR, *sizes)).items():
        assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6 * largest + 1e-7, msg=name)  # order of fp32 sums


def test_the_gradient_is_that_of_the_mean_over_items(configured):
    config = configured(optimizer=DESCENT, schedule={"steps": 1, "warmup": 0, "max_norm": 0})
    moved, learner = gradient_of(config, [FOUR]), learner_of(config)
    with learner.model.adapters.use(ROLE):
        error = Given().given_errors(learner.model, FOUR).mean()
        gradients = torch.autograd.grad(error, list(weights(learner).values()))
    for (name, change), gradient in zip(moved.items(), gradients, strict=True):
        assert_close(change, gradient, rtol=1e-4, atol=1e-6, msg=name)  # the change is a difference of fp32 weights


def test_clipping_keeps_the_direction_and_the_log_tells_the_length_before(configured):
    step = {"steps": 1, "warmup": 0}
    free = gradient_of(configured(optimizer=DESCENT, schedule={**step, "max_norm": 0}), [FOUR])
    norm = math.sqrt(sum(g.double().square().sum().item() for g in free.values()))
    config = configured(optimizer=DESCENT, schedule={**step, "max_norm": norm / 10})
    learner = learner_of(config)
    learner.objective, before = Given(), frozen(weights(learner))
    (event,) = steps_of(trained(learner, config, [FOUR]))
    assert event.metrics["default/grad_norm"] == pytest.approx(norm, rel=1e-4)
    for name, p in weights(learner).items():
        assert_close(before[name] - p.detach(), free[name] / 10, rtol=1e-3, atol=1e-6, msg=name)


def test_a_step_leaves_no_gradient_behind_and_moves_the_adapter_alone(configured):
    config = configured(schedule={"steps": 1, "warmup": 0})
    learner = learner_of(config)
    ours = {id(p) for p in weights(learner).values()}
    base = {n: p.clone() for n, p in learner.model.network.named_parameters() if id(p) not in ours}
    trained(learner, config, [FOUR])
    after = dict(learner.model.network.named_parameters())
    assert all(torch.equal(after[name], p) and after[name].grad is None for name, p in base.items())
    assert all(p.grad is None for p in weights(learner).values())


# ---- What is logged ------------------------------------------------------------------------------------------------


def test_the_logged_learning_rate_is_the_schedules_closed_form(configured):
    config = configured(optimizer={"lr": 2e-3}, schedule={"steps": 6, "warmup": 2, "curve": "cosine", "floor": 0.1})
    rates = [e.metrics["default/lr"] for e in steps_of(trained(learner_of(config), config, [batch_of(1)]))]
    curve = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert rates == pytest.approx([2e-3 * f for f in (1 / 3, 2 / 3, *curve)])


def test_lora_plus_trains_b_faster_and_both_rates_are_logged(configured):
    config = configured(adapter={"lora_plus": 16}, optimizer={"lr": 1e-4}, schedule={"steps": 2, "warmup": 1})
    learner = learner_of(config)
    events = steps_of(trained(learner, config, [batch_of(1)]))
    groups = learner.optimizers[ROLE].param_groups
    assert [{name.split(".")[-2] for name in group["names"]} for group in groups] == [{"lora_A"}, {"lora_B"}]
    assert [e.metrics["default/lr"] for e in events] == pytest.approx([0.5e-4, 1e-4])
    assert [e.metrics["default/lr_2"] for e in events] == pytest.approx([8e-4, 16e-4])


def test_the_logged_loss_is_the_mean_over_the_items_of_all_micro_batches(configured):
    config = configured(schedule={"steps": 1, "warmup": 0, "accumulate": 2})
    learner = learner_of(config)
    learner.objective = Given()
    with learner.model.adapters.use(ROLE), torch.no_grad():
        expected = Given().given_errors(learner.model, FOUR).mean()
    (event,) = steps_of(trained(learner, config, parts(FOUR, 3, 1)))
    assert event.metrics["train/loss"] == pytest.approx(float(expected), rel=1e-5)
    assert event.keys == FOUR.keys
    assert set(event.seconds) >= {"data", "forward", "backward", "optimizer", "total"}


def test_a_stream_of_two_experiences_is_gone_through_in_order_each_from_its_own_start(configured):
    config = configured(schedule={"steps": 5, "warmup": 0})
    learner, told = learner_of(config), []
    stream = [FixedStream([batch_of(1, seed) for seed in (1, 2)], 3, "first"),
              FixedStream([batch_of(1, seed) for seed in (8, 9)], 5, "second")]  # fmt: skip
    assert train(learner, stream, Course(config.schedule, NoMilestones(), told.append))
    assert [(e.experience, *e.keys) for e in told] == [
        *[("first", f"clip {seed}.0") for seed in (1, 2, 1)],
        *[("second", f"clip {seed}.0") for seed in (8, 9)],
    ]


def test_who_goes_on_from_the_last_step_of_an_experience_draws_the_next_one_from_its_own_start(configured):
    config, learner = configured(schedule={"steps": 5, "warmup": 0}), None
    stream = [FixedStream([batch_of(1, seed) for seed in (1, 2)], 3, "first"),
              FixedStream([batch_of(1, seed) for seed in (8, 9)], 5, "second")]  # fmt: skip

    class SavesAtThree(NoMilestones):
        saved = None

        def after_step(self, learner) -> None:
            if learner.step == 3:
                self.saved = (learner.step, learner.drawn)

    learner, saves, told = learner_of(config), SavesAtThree(), []
    train(learner, stream, Course(config.schedule, saves, told.append))
    resumed = learner_of(config)
    resumed.step, resumed.drawn = saves.saved
    again: list[Any] = []
    train(resumed, stream, Course(config.schedule, NoMilestones(), again.append))
    assert [e.keys for e in again] == [e.keys for e in told if e.experience == "second"]


# ---- Steps that go wrong -------------------------------------------------------------------------------------------


def broken() -> Batch:
    tensors = dict(batch_of(2, seed=66).tensors)
    tensors["latents"] = tensors["latents"].clone()
    tensors["latents"][0, 0, 0, 0, 0] = torch.inf
    return replace(batch_of(2, seed=66), tensors=tensors)


def keeper_of(config: RunConfig, told: list[Any]) -> Keeper:
    gallery = Gallery(config, told.append, LazyEncoders(None), 8.0)  # type: ignore[arg-type]
    return Keeper(config, {}, {}, told.append, gallery, None)


def test_a_gradient_that_is_not_finite_moves_no_weight_no_optimizer_state_and_no_average(configured):
    config = configured(schedule={"steps": 1, "warmup": 0}, ema={"decay": 0.5})
    learner = learner_of(config)
    trained(learner, config, [batch_of(2)])
    before = frozen(weights(learner)), frozen(learner.ema[ROLE].tensors), frozen(moments(learner))
    learner.step, skips = 0, NoMilestones()
    (event,) = steps_of(trained(learner, config, [broken()], skips))
    for was, now in zip(before, (weights(learner), learner.ema[ROLE].tensors, moments(learner)), strict=True):
        assert was.keys() == now.keys() and all(torch.equal(now[name], value) for name, value in was.items())
    assert not math.isfinite(event.metrics["train/loss"]) and event.metrics["train/skipped"] == 1
    assert skips.skips == [ROLE]


def moments(learner) -> dict[str, torch.Tensor]:
    state = optimizer_state(learner.optimizers[ROLE])["state"]
    return {f"{name}.{key}": torch.as_tensor(v) for name, entry in state.items() for key, v in entry.items()}


def test_an_incident_keeps_the_batches_their_keys_and_the_numbers(configured):
    config, told = configured(schedule={"steps": 3, "warmup": 0, "accumulate": 2}, save={"every": 0}), []
    bad, good = broken(), batch_of(2, 5)
    trained(learner_of(config), config, [good, good, good, bad, good, good], keeper_of(config, told))
    (incident,) = [event for event in told if isinstance(event, Incident)]
    folder = config.folder / "incidents" / "step_000002_train"
    assert (incident.step, incident.in_a_row, incident.folder) == (2, 1, str(folder))
    facts = json.loads((folder / "incident.rank0.json").read_text())
    assert facts["keys"] == [list(good.keys), list(bad.keys)]
    assert facts["metrics"]["train/loss"] in ("inf", "nan")
    assert torch.equal(load_file(folder / "batches.rank0.safetensors")["1.latents"], bad["latents"])


def test_a_run_stops_after_so_many_incidents_in_a_row_and_a_good_step_between_starts_the_count_anew(configured):
    config, told = configured(schedule={"steps": 9, "warmup": 0, "incidents": 2}, save={"every": 0}), []
    good, bad = batch_of(1), broken()
    learner = learner_of(config)
    with pytest.raises(RunError, match=r"2 steps in a row had a gradient that is not finite, the last at step 5"):
        trained(learner, config, [good, bad, good, bad, bad], keeper_of(config, told))
    assert [event.in_a_row for event in told if isinstance(event, Incident)] == [1, 1, 2]


def test_an_fp16_overflow_lowers_the_scale_and_the_run_goes_on_without_an_incident_folder(configured):
    config, told = configured(engine={"precision": "fp16"}, schedule={"steps": 4, "warmup": 0, "incidents": 2}), []
    learner = learner_of(config)
    learner.engine.scaler = GradScaler("cpu", init_scale=2.0**40)  # type: ignore[attr-defined]
    before = frozen(weights(learner))
    trained(learner, config, [batch_of(1)], keeper_of(config, told))
    incidents = [event for event in told if isinstance(event, Incident)]
    assert {(event.folder, event.reason) for event in incidents} == {
        (None, "fp16 overflow, the loss scale was lowered")
    }
    assert len(incidents) == 4 and learner.engine.scaler.get_scale() == 2.0**36  # type: ignore[attr-defined]
    assert all(torch.equal(p, before[name]) for name, p in weights(learner).items())
    assert not (config.folder / "incidents").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_half_precision_the_base_is_half_and_the_adapter_is_fp32_and_learns(configured, precision):
    config = configured(engine={"precision": precision}, optimizer={"lr": 1e-2}, schedule={"steps": 8, "warmup": 0})
    learner = learner_of(config, shaken=False)
    learner.objective = Given()
    losses = [e.metrics["train/loss"] for e in steps_of(trained(learner, config, [FOUR]))]
    assert losses[-1] < losses[0]
    assert {p.dtype for p in weights(learner).values()} == {torch.float32}
    base = learner.model.network.get_submodule("blocks.0.attn1.to_q").weight
    assert base.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def test_steps_smaller_than_a_bf16_weight_can_hold_are_not_lost(configured):
    """1e-6 beside 0.1 is nothing in bf16; fp32 adapters keep it."""
    config = configured(engine={"precision": "bf16"}, optimizer={"lr": 1e-6}, schedule={"steps": 1, "warmup": 0})
    learner = learner_of(config)
    before = frozen(weights(learner))
    trained(learner, config, [FOUR])
    moved = [(p.detach() != before[name]).float().mean() for name, p in weights(learner).items()]
    assert min(moved) > 0.5


# ---- Optimizers ----------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": AdamW(lr=1e-2),
    "adamw8bit": AdamW8bit(lr=1e-2),
    "momentum": CustomOptimizer(path="torch.optim.SGD", lr=1e-2, args={"momentum": 0.9, "nesterov": True}),
    "adafactor": CustomOptimizer(path="torch.optim.Adafactor", lr=1e-2),
    "radam": CustomOptimizer(path="torch.optim.RAdam", lr=1e-2),
}


def parameters_of(values: dict[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value.clone()) for name, value in values.items()}


def descend(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for i, p in enumerate(parameters.values()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_goes_on_from_its_saved_state_bit_by_bit(kind):
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    section, factor = OPTIMIZERS[kind], lambda name: 4.0 if name.endswith("B") else 1.0
    start = {f"{i}.{x}": torch.full((64, 128), 0.1) for i in range(2) for x in "AB"}  # 8192: above bitsandbytes' 4096
    whole = parameters_of(start)
    optimizer = section.build(whole, factor)
    descend(optimizer, whole, range(3))
    tensors: dict[str, torch.Tensor] = {}
    tree = json.loads(json.dumps(pack(optimizer_state(optimizer), tensors)))
    resumed = parameters_of(whole)
    again = section.build(resumed, factor)
    restore_optimizer(again, unpack(tree, {name: t.clone() for name, t in tensors.items()}))
    descend(optimizer, whole, range(3, 6))
    descend(again, resumed, range(3, 6))
    assert all(torch.equal(p, resumed[name]) for name, p in whole.items())
    assert not torch.equal(whole["0.A"], start["0.A"])


def test_saved_state_is_refused_by_an_optimizer_of_other_parameters():
    optimizer = AdamW().build(parameters_of({"a": torch.zeros(2)}), lambda name: 1.0)
    other = AdamW().build(parameters_of({"b": torch.zeros(2)}), lambda name: 1.0)
    with pytest.raises(RunError, match="other parameters"):
        restore_optimizer(other, optimizer_state(optimizer))
