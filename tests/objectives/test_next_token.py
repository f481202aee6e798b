"""Next-token prediction: what is summed, what is counted, and how held-out rows are measured."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.small_text import make_qwen3, packed
from weft.contracts import DEFAULT, UNLEARNED, Batch, Berth, Model, NoState, Rng, Tokens
from weft.errors import ConfigError
from weft.families.causal_lm import CausalLM
from weft.families.wan import Wan
from weft.objectives.next_token import NextToken

OBJECTIVE = NextToken()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    family = CausalLM(source=str(make_qwen3(tmp_path_factory.mktemp("next") / "qwen3")))
    return Model(family.load("fp32", DEFAULT.name, Berth()), family, None)  # type: ignore[arg-type]


def batch_of(tokens: Tokens) -> Batch:
    return Batch({"ids": tokens.ids, "positions": tokens.positions, "labels": tokens.labels}, ("a", "b", "c"))


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Three conversations in two rows, the second row padded."""
    return batch_of(packed([[7, 9], [12]], 300))


def chance() -> Rng:
    return Rng(torch.Generator(), torch.Generator(), seed=0, draw=0)


def truth(model: Model, batch: Batch) -> Tensor:
    """-log p (B, L) from all logits."""
    with torch.no_grad():
        logits = model.network(batch["ids"], position_ids=batch["positions"], use_cache=False).logits
    flat = functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), reduction="none", ignore_index=UNLEARNED
    )
    return flat.view_as(batch["labels"])


def test_the_loss_is_the_sum_over_learned_tokens_and_they_are_what_counts(model: Model, batch: Batch) -> None:
    losses, learned = truth(model, batch), batch["labels"] != UNLEARNED
    found = OBJECTIVE.loss("train", model, batch, NoState(), chance())
    torch.testing.assert_close(found.total.detach(), losses.sum(), rtol=1e-5, atol=1e-5)
    assert OBJECTIVE.count(batch) == int(learned.sum()) > 0
    torch.testing.assert_close(found.metrics["probability"], losses.neg().exp()[learned].sum(), rtol=1e-5, atol=1e-5)


def test_two_rows_together_weigh_what_they_weigh_apart(model: Model, batch: Batch) -> None:
    """So a step is the same however its rows are dealt to micro-batches and processes."""
    rows = [Batch({name: tensor[i : i + 1] for name, tensor in batch.tensors.items()}, ("a",)) for i in range(2)]
    apart = sum(float(OBJECTIVE.loss("train", model, row, NoState(), chance()).total.detach()) for row in rows)
    assert apart == pytest.approx(float(OBJECTIVE.loss("train", model, batch, NoState(), chance()).total.detach()))
    assert sum(map(OBJECTIVE.count, rows)) == OBJECTIVE.count(batch)


def test_measured_rows_and_their_weights_give_the_mean_over_tokens(model: Model, batch: Batch) -> None:
    ((expert, time),) = OBJECTIVE.measured((DEFAULT,))
    assert (expert, time) == ("default", None)
    rows, weights = OBJECTIVE.measure(model, batch, expert, time, seed=0), OBJECTIVE.weights(batch)
    assert rows.shape == weights.shape == (2,)
    mean = truth(model, batch).sum() / OBJECTIVE.count(batch)
    torch.testing.assert_close((rows * weights).sum() / weights.sum(), mean, rtol=1e-5, atol=1e-5)
    assert torch.equal(rows, OBJECTIVE.measure(model, batch, expert, time, seed=1))  # nothing in it is drawn


def test_a_row_without_learned_tokens_measures_nothing_and_weighs_nothing(model: Model, batch: Batch) -> None:
    empty = Batch({**batch.tensors, "labels": torch.full_like(batch["labels"], UNLEARNED)}, batch.keys)
    assert OBJECTIVE.measure(model, empty, "default", None, seed=0).tolist() == [0, 0]
    assert OBJECTIVE.weights(empty).tolist() == [0, 0]
    assert OBJECTIVE.count(empty) == 0


def test_it_is_refused_for_a_video_model(model: Model) -> None:
    OBJECTIVE.check(model.family)
    with pytest.raises(ConfigError, match="next-token learns text, and the family is a video model"):
        OBJECTIVE.check(Wan(source="tiny-wan"))
