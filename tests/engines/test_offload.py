"""Inputs of recomputed blocks that wait in host memory: the same gradients, and nothing else left in the graph."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.engines.test_streaming import DROPOUT, assert_same, gradients, learner_with
from tests.learners import ROLE, Given, batch_of
from tests.small import WIDTH, make_wan
from weft.contracts import NoState
from weft.engines.offload import Waiting
from weft.run.learner import Learner

LAYERS = 5
OFFLOAD = {"recompute": True, "offload_inputs": True}
TOKENS = 2 * 2 * 2  # of latents (2, 4, 4) in patches of (1, 2, 2)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("offload") / "model", layers=LAYERS)


def kept_in_forward(learner: Learner) -> tuple[Tensor, list[Any]]:
    """The loss of two items, and every object in which the engine keeps an input on the host."""
    inputs, waiting = learner.engine.inputs, []  # type: ignore[attr-defined]
    pack = inputs.pack
    inputs.pack = lambda tensor: waiting.append(pack(tensor)) or waiting[-1]
    with learner.model.adapters.use(ROLE):
        loss = Given().loss("train", learner.model, batch_of(2), NoState(), None).total  # type: ignore[arg-type]
    del inputs.pack
    return loss, [kept for kept in waiting if isinstance(kept, Waiting)]


@pytest.mark.parametrize("backend", ["native", "peft"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("streaming", [{}, {"stream_blocks": 3}])
def test_waiting_on_the_host_changes_no_gradient_under_dropout(deep, tmp_path, backend, precision, streaming):
    change = {"adapter": {"backend": backend, **DROPOUT}}
    expected = gradients(learner_with(tmp_path, deep, {"precision": precision}, **change))
    offloading = learner_with(tmp_path, deep, {"precision": precision, **OFFLOAD, **streaming}, **change)
    for _ in range(2):
        assert_same(gradients(offloading), expected)


def test_what_goes_from_block_to_block_is_on_the_host_alone(deep, tmp_path):
    """8 tokens of width 24 in fp32, of 2 items, for each block; text and time are all blocks' own."""
    _, waiting = kept_in_forward(learner_with(tmp_path, deep, OFFLOAD))
    assert [kept.host.nbytes for kept in waiting] == [2 * TOKENS * WIDTH * 4] * LAYERS
    assert all(kept.back is None for kept in waiting)


def test_what_recomputation_keeps_on_the_device_no_longer_grows_with_the_blocks(deep, tmp_path):
    shallow = make_wan(tmp_path / "shallow", layers=2)
    sizes = []
    for model in (shallow, deep):
        learner, seen = learner_with(tmp_path, model, OFFLOAD), {}

        def pack(tensor: Tensor, seen: dict[int, Tensor] = seen) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        loss, waiting = kept_in_forward(learner)
        assert len(waiting) == len(learner.model.family.blocks(learner.model.network))
        with learner.model.adapters.use(ROLE), saved_tensors_hooks(pack, lambda t: t):
            Given().loss("train", learner.model, batch_of(2), NoState(), None)  # type: ignore[arg-type]
        frozen = {t.untyped_storage().data_ptr() for t in learner.model.network.parameters()}
        sizes.append(sum(t.untyped_storage().nbytes() for pointer, t in seen.items() if pointer not in frozen))
        del loss
    assert sizes[0] == sizes[1]


def test_after_a_backward_pass_nothing_waits(deep, tmp_path):
    learner = learner_with(tmp_path, deep, OFFLOAD)
    gradients(learner)
    inputs = learner.engine.inputs  # type: ignore[attr-defined]
    assert inputs.last is not None and inputs.last() is None
    assert not inputs._leaving


def test_a_graph_that_is_kept_can_go_backward_twice(deep, tmp_path):
    learner = learner_with(tmp_path, deep, OFFLOAD)
    parameters = list(learner.model.adapters.parameters(ROLE).values())
    loss, _ = kept_in_forward(learner)
    with learner.model.adapters.use(ROLE):
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_question_without_gradients_sends_nothing_to_the_host(deep, tmp_path):
    learner = learner_with(tmp_path, deep, OFFLOAD)
    with torch.no_grad(), learner.model.adapters.use(ROLE):
        Given().measure(learner.model, batch_of(1), "default", 0.5, 0)
    assert learner.engine.inputs.moved == 0  # type: ignore[attr-defined]
