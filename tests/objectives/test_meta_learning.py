"""C-MAML, Sync and La-MAML through the real loop, against the published algorithm written a second time."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.objectives.published import Recipe, meta_step
from tests.small_documents import SGD, ToyDocuments, documents, learner_of, trained, weights
from weft.contracts import Batch
from weft.objectives.learned_rates import LearnedRates
from weft.objectives.meta_learning import CMaml, LaMaml, Rates, SyncMaml
from weft.run.learner import Learner

STEPS = 250
FAMILY = ToyDocuments(sizes=(8, 4, 3))


def at_odds(seed: int) -> Batch:
    """A batch whose replayed documents are its own with other labels, so that rates fall, some of them below 0."""
    batch = documents(5, seed)
    other = {"replay/ids": batch["ids"], "replay/mask": batch["mask"], "replay/labels": (batch["labels"] + 1) % 3}
    return Batch({**batch.tensors, **other}, batch.keys)


class Headless(ToyDocuments):
    """All of it is one group."""

    def heads(self, network: nn.Module) -> tuple[str, ...]:
        return ()


BATCHES = [at_odds(seed) for seed in range(10)]
PAPER = Rates(start=0.01, granularity="element", param="relu", optimizer="sgd", lr=2.0, clip=0.0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def beginning(learner: Learner, start: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    own = weights(learner)
    return own, {name: torch.full_like(w, start) for name, w in own.items()}


def followed(learner: Learner, recipe: Recipe, start: float, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the algorithm makes of the learner's first weights, with its own order of rows."""
    own, rates = beginning(learner, start)
    for step in range(steps):
        batch = BATCHES[step % len(BATCHES)]
        order = torch.randperm(len(batch.keys), generator=chance_of(learner, step))
        own, rates = meta_step(own, rates, batch, order, recipe)
    return own, rates


def chance_of(learner: Learner, step: int) -> torch.Generator:
    """The chance of a step that has not been made yet."""
    return replace(learner, step=step).rng("train", 0, 1).own


def rates_of(learner: Learner) -> dict[str, Tensor]:
    assert isinstance(learner.state, LearnedRates)
    return {name: value.detach().clone() for name, value in learner.state.values.items()}


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


QUIET: dict[str, Any] = {"inner_steps": 2, "warm_up": 0.0}
CASES = {
    "lamaml.py": ("first", None, True),
    "lamaml.py, second order": ("second", None, True),
    "lamaml_cifar.py": ("second", 0.02, False),
}


@pytest.mark.parametrize("order, clip, relu", CASES.values(), ids=CASES)
def test_250_steps_of_la_maml_are_the_published_algorithm(order: Any, clip: float | None, relu: bool) -> None:
    objective = LaMaml(order=order, outer="sgd_alpha", rates=PAPER, inner_clip=clip, inner_relu=relu, **QUIET)
    learner = learner_of(objective, FAMILY)
    recipe = Recipe(order == "second", True, False, 2, eta=2.0, weight_lr=0.0, inner_clip=clip, inner_relu=relu)
    own, rates = followed(learner, recipe, PAPER.start, STEPS)
    trained(learner, BATCHES, STEPS)
    close(weights(learner), own)
    close(rates_of(learner), rates)
    assert any(bool((rate < 0).any()) for rate in rates.values())  # so that it matters what becomes of them


@pytest.mark.parametrize("order, clip", [("first", None), ("second", 0.02)])
def test_250_steps_of_c_maml_are_the_published_algorithm(order: Any, clip: float | None) -> None:
    objective = CMaml(order=order, rate=PAPER.start, inner_clip=clip, **QUIET)
    learner = learner_of(objective, FAMILY, SGD)
    recipe = Recipe(order == "second", False, True, 2, eta=0.0, weight_lr=0.1, inner_clip=clip)
    own, _ = followed(learner, recipe, PAPER.start, STEPS)
    trained(learner, BATCHES, STEPS)
    close(weights(learner), own)


@pytest.mark.parametrize("order, clip, relu", [("first", None, True), ("second", 0.02, False)])
def test_250_steps_of_sync_are_the_published_algorithm(order: Any, clip: float | None, relu: bool) -> None:
    objective = SyncMaml(order=order, rates=PAPER, inner_clip=clip, inner_relu=relu, **QUIET)
    learner = learner_of(objective, FAMILY, SGD)
    recipe = Recipe(order == "second", True, True, 2, eta=2.0, weight_lr=0.1, inner_clip=clip, inner_relu=relu)
    own, rates = followed(learner, recipe, PAPER.start, STEPS)
    trained(learner, BATCHES, STEPS)
    close(weights(learner), own)
    close(rates_of(learner), rates)


def test_norms_are_cut_as_published_where_all_rates_are_one_group() -> None:
    """The published code cuts both outer gradients to one length each; here rates are cut group by group."""
    recipe = Recipe(False, True, False, 2, eta=2.0, weight_lr=0.0, clip=0.05)
    objective = LaMaml(
        order="first", outer="sgd_alpha", rates=PAPER.model_copy(update={"clip": 0.05}), warm_up=0.0, inner_steps=2
    )
    learner = learner_of(objective, Headless(sizes=(8, 4, 3)))
    own, rates = followed(learner, recipe, PAPER.start, 20)
    trained(learner, BATCHES, 20, max_norm=0.05)
    close(weights(learner), own)
    close(rates_of(learner), rates)
