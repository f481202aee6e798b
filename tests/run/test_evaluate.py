"""Validation: the same questions each time, against the base, and nothing of it moves the run."""

import math
from statistics import mean, stdev

import pytest
import torch

from tests.learners import ROLE, batch_of, frozen, learner_of, parts, small_config, trained, weights
from tests.run.test_resume import silent
from tests.small import config_of
from weft.run.evaluate import Evaluator, averaged
from weft.run.learner import Learner
from weft.run.listeners import read_steps
from weft.run.start import train_run

TIMES = (0.2, 0.8)
ITEMS = batch_of(3)


@pytest.fixture
def evaluator() -> Evaluator:
    return Evaluator(parts(ITEMS, 2, 1), failed=0, seed=11)


@pytest.fixture
def learner(world, tmp_path) -> Learner:
    return make(world, tmp_path)


def make(world, root, shaken: bool = True, **change) -> Learner:
    objective = {"validation_times": list(TIMES)}
    return learner_of(small_config(root, world / "model", objective=objective, **change), shaken)


def by_hand(learner: Learner, role: str | None) -> list[list[float]]:
    """For each item its losses at the two times."""
    rows = []
    for batch in parts(ITEMS, 2, 1):
        with learner.model.adapters.use(role):
            at = [learner.objective.measure(learner.model, batch, ROLE, time, 11).tolist() for time in TIMES]  # type: ignore[attr-defined]
        rows += [list(item) for item in zip(*at, strict=True)]
    return rows


def test_an_adapter_that_has_learned_nothing_has_exactly_the_loss_of_the_base(world, tmp_path, evaluator):
    found = evaluator.evaluate(make(world, tmp_path, shaken=False))
    assert found.loss == found.baseline is not None
    assert found.by_time == found.baseline_by_time
    assert found.standard_error == 0


def test_loss_and_baseline_are_means_over_items_and_times_with_the_adapter_on_and_off(learner, evaluator):
    found, on, off = evaluator.evaluate(learner), by_hand(learner, ROLE), by_hand(learner, None)
    assert found.loss == pytest.approx(mean(map(mean, on)))
    assert found.baseline == pytest.approx(mean(map(mean, off)))
    assert found.loss != pytest.approx(found.baseline)
    assert found.by_time == pytest.approx({"0.2": mean(i[0] for i in on), "0.8": mean(i[1] for i in on)})
    assert found.baseline_by_time == pytest.approx({"0.2": mean(i[0] for i in off), "0.8": mean(i[1] for i in off)})
    assert (found.items, found.failed, found.step) == (3, 0, 0)


def test_the_standard_error_is_that_of_the_paired_differences(learner, evaluator):
    differences = [mean(on) - mean(off) for on, off in zip(by_hand(learner, ROLE), by_hand(learner, None), strict=True)]
    assert evaluator.evaluate(learner).standard_error == pytest.approx(stdev(differences) / math.sqrt(3))


def test_a_single_item_has_no_standard_error(learner):
    assert Evaluator(parts(ITEMS, 1), 0, 11).evaluate(learner).standard_error is None


def test_a_repeated_evaluation_is_bit_equal_in_train_mode_with_dropout_and_leaves_the_mode(world, tmp_path, evaluator):
    learner = make(world, tmp_path, adapter={"input_dropout": 0.5, "rank_dropout": 0.5})
    assert learner.model.network.training
    torch.manual_seed(0)
    first = evaluator.evaluate(learner)
    torch.manual_seed(1)
    assert evaluator.evaluate(learner) == first
    assert learner.model.network.training


def test_the_baseline_is_measured_once(learner, evaluator):
    before = evaluator.evaluate(learner)
    with torch.no_grad():
        for parameter in weights(learner).values():
            parameter.mul_(2)
    after = evaluator.evaluate(learner)
    assert after.baseline == before.baseline and after.loss != before.loss


def test_the_moving_average_is_what_is_measured_and_the_weights_are_back_afterwards(world, tmp_path, evaluator):
    learner = make(world, tmp_path, ema={"decay": 0.9})
    average = {name: p.detach() * 0.5 for name, p in weights(learner).items()}
    live, learner.ema[ROLE].tensors = frozen(weights(learner)), average
    found = evaluator.evaluate(learner)
    assert all(torch.equal(p, live[name]) for name, p in weights(learner).items())
    with averaged(learner):
        assert found.loss == pytest.approx(mean(map(mean, by_hand(learner, ROLE))))
    assert found.loss != pytest.approx(mean(map(mean, by_hand(learner, ROLE))))


def test_the_weights_come_back_when_measuring_under_the_average_fails(world, tmp_path):
    learner = make(world, tmp_path, ema={"decay": 0.9})
    live = frozen(weights(learner))
    learner.ema[ROLE].tensors = {name: torch.zeros_like(p) for name, p in live.items()}
    with pytest.raises(RuntimeError), averaged(learner):
        raise RuntimeError("out of memory")
    assert all(torch.equal(p, live[name]) for name, p in weights(learner).items())


def test_failed_items_are_counted_and_enter_no_mean(learner, evaluator):
    whole = evaluator.evaluate(learner)
    lame = Evaluator(evaluator.batches, failed=2, seed=11).evaluate(learner)
    assert (lame.loss, lame.baseline, lame.items, lame.failed) == (whole.loss, whole.baseline, 3, 2)


def test_without_any_item_there_is_no_loss_and_not_zero(learner):
    found = Evaluator([], failed=4, seed=11).evaluate(learner)
    assert (found.loss, found.baseline, found.items, found.failed) == (None, None, 0, 4)


def test_evaluating_between_steps_leaves_no_gradient_and_moves_nothing(learner, evaluator):
    before = frozen(weights(learner))
    evaluator.evaluate(learner)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in weights(learner).items())


def test_a_run_that_validates_at_every_step_learns_bit_by_bit_what_one_that_never_does_learns(plain):
    runs = {}
    for every in (0, 1):
        change = {"schedule": {"steps": 4}, "adapter": {"input_dropout": 0.2}, "ema": {"decay": 0.5}}
        config = config_of(plain, **change, name=f"every-{every}", validation={"every": every}, save={"every": 0})
        train_run(config, silent)
        runs[every] = read_steps(config.folder / "events.rank0.jsonl")
    assert len(runs[0]) == 4
    assert {s: r["metrics"] for s, r in runs[0].items()} == {s: r["metrics"] for s, r in runs[1].items()}


def test_a_measured_run_gets_better_on_what_it_trains_on(world, tmp_path):
    """Overfitting three items on purpose: if the loss that is measured did not fall, measuring would be wrong."""
    config = small_config(tmp_path, world / "model", optimizer={"lr": 2e-2}, schedule={"steps": 12, "warmup": 0})
    learner, told = learner_of(config, shaken=False), Evaluator(parts(ITEMS, 3), 0, 11)
    before = told.evaluate(learner)
    trained(learner, config, [ITEMS])
    after = told.evaluate(learner)
    assert after.step == 12
    assert after.loss is not None and before.loss is not None and after.loss < before.loss == after.baseline
