"""Ordinary fine-tuning, experience replay and A-GEM: whose loss it is, what is counted, and which way a step goes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.small_documents import ROLE, SGD, ToyDocuments, documents, learner_of, model_of, trained, weights
from weft.contracts import DEFAULT, UNLEARNED, Batch, Documents, Model, NoState, Rng
from weft.errors import ConfigError
from weft.families.wan import Wan
from weft.objectives.agem import Agem
from weft.objectives.documents import OfDocuments
from weft.objectives.experience_replay import ExperienceReplay
from weft.objectives.rows import row_losses
from weft.objectives.traditional import Traditional
from weft.objectives.turning import turned
from weft.run.optimizers import CustomOptimizer

SINGLE = ToyDocuments(dtype=torch.float32)
PLAIN = CustomOptimizer(path="torch.optim.AdamW", lr=1e-2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def chance() -> Rng:
    return Rng(torch.Generator(), torch.Generator(), seed=0, draw=0)


def loss_of(objective: OfDocuments, model: Model, batch: Batch) -> Any:
    return objective.loss("train", model, batch, NoState(), chance())  # type: ignore[attr-defined]


def gradients_of(objective: OfDocuments, model: Model, batch: Batch) -> dict[str, Tensor]:
    """Of the mean loss, as the loop makes it."""
    (loss_of(objective, model, batch).total / objective.count(batch)).backward()
    found = {}
    for name, parameter in model.adapters.parameters(ROLE).items():
        assert parameter.grad is not None
        found[name], parameter.grad = parameter.grad, None
    return found


def answers(model: Model, batch: Batch, prefix: str = "") -> Tensor:
    return model.logits(Documents(batch[f"{prefix}ids"], batch[f"{prefix}mask"]))


def test_ordinary_fine_tuning_is_a_loop_that_one_writes_by_hand_bit_by_bit() -> None:
    """Batches of 7, which no sum divides by exactly."""
    batches = [documents(7, seed) for seed in range(3)]
    learner = learner_of(Traditional(), SINGLE, PLAIN)
    network = SINGLE.network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.0)
    trained(learner, batches, 20)
    for step in range(20):
        batch = batches[step % 3]
        logits = network(batch["ids"].float() / 16)
        functional.cross_entropy(logits, batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    own = dict(network.named_parameters())
    assert all(torch.equal(w, own[name]) for name, w in weights(learner).items())


def test_replay_learns_from_a_batch_and_what_is_replayed_alike() -> None:
    model, batch = model_of(ToyDocuments()), documents(4, 0, replay=3)
    both = {name: torch.cat([batch[name], batch[f"replay/{name}"]]) for name in ("ids", "mask", "labels")}
    whole = Batch(both, tuple("abcdefg"))
    assert ExperienceReplay().count(batch) == 7 and Traditional().count(batch) == 4
    torch.testing.assert_close(
        gradients_of(ExperienceReplay(), model, batch), gradients_of(Traditional(), model, whole)
    )
    alone = Batch({name: batch[name] for name in ("ids", "mask", "labels")}, batch.keys)  # nothing to replay yet
    torch.testing.assert_close(
        gradients_of(ExperienceReplay(), model, alone), gradients_of(Traditional(), model, alone)
    )


def test_a_document_without_a_label_counts_for_nothing() -> None:
    model, batch = model_of(ToyDocuments()), documents(4)
    batch["labels"][1] = UNLEARNED
    rest = Batch({name: tensor[[0, 2, 3]] for name, tensor in batch.tensors.items()}, tuple("acd"))
    assert Traditional().count(batch) == 3
    torch.testing.assert_close(gradients_of(Traditional(), model, batch), gradients_of(Traditional(), model, rest))
    assert (
        loss_of(Traditional(), model, batch).metrics["accuracy"]
        == loss_of(Traditional(), model, rest).metrics["accuracy"]
    )


def test_several_labels_are_binary_cross_entropy_and_unknown_ones_are_no_negatives() -> None:
    model, batch = model_of(ToyDocuments()), documents(4, several=True)
    mean = functional.binary_cross_entropy_with_logits(answers(model, batch), batch["labels"].double())
    torch.testing.assert_close(loss_of(Traditional(), model, batch).total / 4, mean)
    batch["labels"][0, 1] = batch["labels"][2] = float("nan")
    assert Traditional().count(batch) == 3
    losses = row_losses(answers(model, batch), batch["labels"])
    first = functional.binary_cross_entropy_with_logits(
        answers(model, batch)[0, [0, 2]], batch["labels"][0, [0, 2]].double()
    )
    torch.testing.assert_close(losses[0], first)
    assert float(losses[2].detach()) == 0
    assert all(bool(torch.isfinite(g).all()) for g in gradients_of(Traditional(), model, batch).values())


def test_held_out_documents_are_measured_one_by_one_and_without_chance() -> None:
    model, batch = model_of(ToyDocuments()), documents(4)
    batch["labels"][3] = UNLEARNED
    objective = ExperienceReplay()
    assert objective.measured((DEFAULT,)) == (("default", None),)
    rows, counted = objective.measure(model, batch, "default", None, seed=0), objective.weights(batch)
    assert counted.tolist() == [1, 1, 1, 0] and not rows.requires_grad
    torch.testing.assert_close(
        rows.sum() / 3, functional.cross_entropy(answers(model, batch), batch["labels"]).detach()
    )


def part(model: Model, batch: Batch, prefix: str) -> dict[str, Tensor]:
    """The gradient of some of a batch's documents."""
    loss = functional.cross_entropy(answers(model, batch, prefix), batch[f"{prefix}labels"])
    own = model.adapters.parameters(ROLE)
    return dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))


def along(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(sum((one[name] * other[name]).sum() for name in one))


def test_agem_turns_a_gradient_that_is_against_the_replayed_documents_and_no_other() -> None:
    model, turns = model_of(ToyDocuments()), []
    for seed in range(12):
        batch = documents(3, seed, replay=3)
        g, r, found = part(model, batch, ""), part(model, batch, "replay/"), gradients_of(Agem(), model, batch)
        against = along(g, r) < 0
        turns.append(against)
        factor = along(g, r) / along(r, r) if against else 0.0
        torch.testing.assert_close(found, {name: g[name] - factor * r[name] for name in g})
        if against:
            assert along(found, r) == pytest.approx(0, abs=1e-12)
        assert float(loss_of(Agem(), model, batch).metrics["turned"]) == 3 * against
    assert any(turns) and not all(turns)
    assert Agem().count(documents(3, 0, replay=3)) == 3


def test_agem_knows_a_tensor_that_only_one_of_both_depends_on() -> None:
    found, against = turned({"a": torch.tensor([1.0]), "b": torch.tensor([1.0])},
                            {"a": torch.tensor([-1.0]), "c": torch.tensor([1.0])})  # fmt: skip
    assert {name: float(g) for name, g in found.items()} == {"a": 0.5, "b": 1.0, "c": 0.5}
    assert float(against) == 1


def test_agem_protects_the_first_experience_too() -> None:
    """The published baseline begins with task 0 as its current one, and so never keeps any of it."""
    learner = learner_of(Agem(), ToyDocuments(), SGD)
    told = trained(learner, [documents(3, seed, replay=3) for seed in range(12)], 12)
    assert any(event.metrics["train/turned"] > 0 for event in told if event.kind == "step")


@pytest.mark.parametrize("objective", [Traditional(), ExperienceReplay(), Agem()])
def test_they_are_refused_for_a_video_model(objective: OfDocuments) -> None:
    objective.check(ToyDocuments())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{objective.kind} sorts documents, and the family is a video model"):
        objective.check(Wan(source="tiny-wan"))
