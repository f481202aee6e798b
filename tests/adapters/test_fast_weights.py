"""Weights that are handed to a network by name, as inner loops do: every kind, once and twice differentiated."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.adapters.on_encoders import ALL_KINDS, KINDS, NAME, Fitted, fitted, question
from weft.adapters.lora import Lora
from weft.contracts import Documents, Model
from weft.math.meta import Weights, first_order, names_in, second_order

LABELS = torch.tensor([0, 2, 1])
RATE = 0.05
STEP = 1e-5  # of central differences in float64: their error is about its square
DETACHED = ("dora",)  # the norm under DoRA's magnitude is a constant by definition (arXiv:2402.09353, section 4.3)


def wide(kind: str) -> Fitted:
    one = fitted(ALL_KINDS[kind])
    one.network.double().eval()
    one.shake()
    return one


def loss_at(one: Fitted, docs: Documents, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    model = Model(one.network, one.family, one.adapters, weights)
    return functional.cross_entropy(model.logits(docs), LABELS)


def by_names(one: Fitted, docs: Documents) -> Callable[[Weights], Tensor]:
    names = names_in(one.network, one.parameters)
    return lambda weights: loss_at(one, docs, {names[key]: tensor for key, tensor in weights.items()})


@pytest.fixture(params=ALL_KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_weights_by_name_answer_as_weights_in_place(kind: str) -> None:
    one = wide(kind)
    names = names_in(one.network, one.parameters)
    moved = {key: p.detach() + 0.1 * torch.randn_like(p) for key, p in one.parameters.items()}
    asked = one.answer(weights={names[key]: tensor for key, tensor in moved.items()})
    before = one.answer()
    one.adapters.load_state_dict(NAME, {**one.adapters.state_dict(NAME), **moved})
    assert torch.allclose(asked, one.answer(), atol=1e-12)
    assert (asked - before).abs().max() > 1e-3


@pytest.mark.parametrize("order", ["first", "second"])
def test_the_meta_gradient_is_that_of_central_differences(kind: str, order: str) -> None:
    """Of one inner step, along a random direction. First order is exact for a constant inner gradient."""
    one = wide(kind)
    chunk, after = by_names(one, question(3, 6)), by_names(one, question(3, 9))
    weights = one.parameters
    rates = {key: torch.full_like(p, RATE) for key, p in weights.items()}
    with one.adapters.use(NAME):
        if order == "second":
            found = second_order(weights, rates, [chunk], after).weights
        else:
            found = first_order(
                weights, rates, [lambda: loss_at(one, question(3, 6))], lambda: loss_at(one, question(3, 9))
            ).weights
        held = _inner(chunk, {key: p.detach() for key, p in weights.items()})
        chance = torch.Generator().manual_seed(4)
        direction = {key: torch.randn(p.shape, generator=chance, dtype=p.dtype) for key, p in weights.items()}
        ends = []
        for sign in (1, -1):
            at = {key: p.detach() + sign * STEP * direction[key] for key, p in weights.items()}
            steps = _inner(chunk, at) if order == "second" else held
            ends.append(after({key: at[key] - RATE * steps[key] for key in at}).item())
    expected = (ends[0] - ends[1]) / (2 * STEP)
    along = sum(float((found[key] * direction[key]).sum()) for key in found)
    assert along == pytest.approx(expected, rel=2e-2 if kind in DETACHED else 1e-6, abs=1e-8)


def _inner(chunk: Callable[[Weights], Tensor], at: Mapping[str, Tensor]) -> dict[str, Tensor]:
    leaves = {key: tensor.requires_grad_() for key, tensor in at.items()}
    found = torch.autograd.grad(chunk(leaves), list(leaves.values()), allow_unused=True)
    return {k: torch.zeros_like(leaves[k]) if g is None else g for k, g in zip(leaves, found, strict=True)}


def test_the_fused_path_has_the_second_derivatives_of_the_plain_one() -> None:
    fused, plain = wide("lora"), wide("lora, unfused")
    made = []
    for one in (fused, plain):
        assert isinstance(one.recipe, Lora)
        with one.adapters.use(NAME):
            rates = {key: torch.full_like(p, RATE) for key, p in one.parameters.items()}
            chunks = [by_names(one, question(3, 6))] * 2
            made.append(second_order(one.parameters, rates, chunks, by_names(one, question())))
    for key, gradient in made[0].weights.items():
        assert torch.allclose(gradient, made[1].weights[key], atol=1e-12), key
        assert torch.allclose(made[0].rates[key], made[1].rates[key], atol=1e-12), key


def test_every_kind_can_be_trained_by_an_inner_loop() -> None:
    assert all(recipe.inner is None for recipe in KINDS.values())
