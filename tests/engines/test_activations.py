"""Activations that wait in host memory: the same gradients, and two blocks' worth on the device."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engines.test_streaming import DROPOUT, assert_same, gradients, learner_with
from tests.learners import ROLE, Given, batch_of
from tests.small import WIDTH, make_wan
from weft.contracts import NoState
from weft.engines.activations import Activations, Away, Pool
from weft.engines.saved import keep_elsewhere
from weft.errors import RunError
from weft.run.learner import Learner
from weft.run.rehearsal import LiveBytes

LAYERS = 5
AWAY = {"offload_activations": True}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("activations") / "model", layers=LAYERS)


def offloading(root: Path, model: Path, engine: dict[str, Any], **change: Any) -> tuple[Learner, Activations]:
    """A learner that sends tensors of every size away."""
    learner = learner_with(root, model, {**AWAY, **engine}, **change)
    activations = learner.engine.activations  # type: ignore[attr-defined]
    activations.least = 0
    return learner, activations


@pytest.mark.parametrize("backend", ["native", "peft"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("streaming", [{}, {"stream_blocks": 3}])
def test_waiting_on_the_host_changes_no_bit_of_a_gradient_under_dropout(deep, tmp_path, backend, precision, streaming):
    change = {"adapter": {"backend": backend, **DROPOUT}}
    expected = gradients(learner_with(tmp_path, deep, {"precision": precision}, **change))
    learner, activations = offloading(tmp_path, deep, {"precision": precision, **streaming}, **change)
    for _ in range(2):
        assert_same(gradients(learner), expected)
    assert activations.moved


@pytest.mark.parametrize("eager", [False, True])
def test_what_is_on_the_device_does_not_grow_with_the_blocks(tmp_path, eager):
    """eager: the model's own blocks, in place of the lean ones."""
    family = {"lean": not eager}
    kept, peaks = [], []
    for layers in (3, 6):
        model = make_wan(tmp_path / f"{layers}", layers=layers)
        learner, activations = offloading(tmp_path, model, {}, family=family)
        for parameter in learner.model.adapters.parameters(ROLE).values():
            parameter.grad = torch.zeros_like(parameter)
        gc.collect()
        with learner.model.adapters.use(ROLE), LiveBytes() as live:
            activations.host_memory = live.ignoring
            loss = Given().loss("train", learner.model, batch_of(2), NoState(), None).total  # type: ignore[arg-type]
            kept.append(live.now)
            loss.backward()
        peaks.append(live.peak)
    modulation = 3 * 2 * (2 * 6 * WIDTH * 4)  # of 3 blocks and 2 items: rows and views of rows, of one token each
    assert 0 <= kept[1] - kept[0] <= modulation
    assert peaks[1] - peaks[0] <= modulation


def test_a_tensor_that_several_operators_keep_is_sent_once(tmp_path):
    layer = nn.Linear(8, 8)
    away = Activations(CPU, pinned=False, least=0)
    run = away.begin(layer, ())
    x = torch.randn(4, 8)
    first, second = away.kept(run, x), away.kept(run, x.t())
    assert first is not None and second is not None and first.piece is second.piece
    assert away.moved == x.nbytes
    assert torch.equal(first.back(), x) and torch.equal(second.back(), x.t())
    x.add_(1)
    third = away.kept(away.begin(layer, ()), x)
    assert third is not None and third.piece is not first.piece


def test_weights_and_what_all_blocks_are_given_alike_stay():
    layer, text = nn.Linear(8, 8), torch.randn(3, 8)
    away = Activations(CPU, pinned=False, least=0)
    run = away.begin(layer, ((torch.randn(2, 8),), {"text": text}))
    assert away.kept(run, layer.weight) is away.kept(run, layer.weight.t()) is away.kept(run, text) is None
    away.end(text)  # what a block passes on to the next goes
    assert isinstance(away.kept(away.begin(layer, text), text), Away)
    assert away.kept(run, torch.randn(64, 8)[:2]) is None  # a small view would take all along


class Squares(nn.Module):
    """A block that keeps its input, and may write over it afterwards, as a faulty one would."""

    def __init__(self, spoils: bool = False) -> None:
        super().__init__()
        self.spoils = spoils

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        answer = y * y
        if self.spoils:
            with torch.no_grad():
                y.add_(1)
        return answer


def chain(count: int, spoils: bool = False) -> tuple[Callable[[Tensor], Tensor], Activations]:
    away = Activations(CPU, pinned=False, least=0)
    blocks = [Squares(spoils) for _ in range(count)]
    for block in blocks:
        keep_elsewhere(block, None, away)
    return nn.Sequential(*blocks), away


def test_a_graph_that_is_kept_can_go_backward_twice_and_be_differentiated_again():
    network, _ = chain(3)
    x = (torch.rand(5) / 4).requires_grad_()
    y = network(x).sum()  # 4 x^2 three times over: 4^7 x^8
    first, again = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(second, 8 * 7 * 4.0**7 * x.detach() ** 6)


def test_a_block_that_writes_over_what_it_keeps_is_told():
    network, _ = chain(2, spoils=True)
    with pytest.raises(RunError, match="written over a tensor that it keeps"):
        network(torch.rand(5, requires_grad=True)).sum().backward()


def test_host_memory_is_used_again_by_the_next_step_and_not_hoarded():
    network, away = chain(4)
    for size in (5, 5, 5, 9, 9):
        network(torch.rand(size, requires_grad=True)).sum().backward()
    assert away.pool.used == 0
    assert set(away.pool.free) == {36} and away.pool.most == away.pool.spare
    pool = Pool(pinned=False)
    one = pool.take(16, lambda: None)
    pool.give(one)
    assert pool.take(16, lambda: None) is one


def test_a_question_without_gradients_sends_nothing_to_the_host(deep, tmp_path):
    learner, activations = offloading(tmp_path, deep, {})
    with torch.no_grad(), learner.model.adapters.use(ROLE):
        Given().measure(learner.model, batch_of(1), "default", 0.5, 0)
    assert activations.moved == 0


# ---- On a GPU, where copies have a stream of their own --------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def slowed(stream: "torch.cuda.Stream | None", chance: torch.Generator) -> None:
    """Keep a stream busy for up to some milliseconds, so that whoever does not wait for it is too early."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(int(torch.randint(1, 10_000_000, (1,), generator=chance)))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("seed", range(4))
def test_no_delay_of_either_stream_changes_a_gradient(seed):
    device, chance = torch.device("cuda"), torch.Generator().manual_seed(seed)
    away = Activations(device, pinned=True, least=0)
    x = torch.rand(1 << 20, device=device).div(4).requires_grad_()
    plain = [Squares() for _ in range(4)]
    (expected,) = torch.autograd.grad(nn.Sequential(*plain)(x).sum(), x)
    for block in plain:
        keep_elsewhere(block, None, away)
        inner = block.forward

        def late(*args: Tensor, inner: Any = inner) -> Tensor:
            slowed(away.side if seed % 2 else torch.cuda.current_stream(), chance)
            return inner(*args)

        block.forward = late  # type: ignore[method-assign]
    for _ in range(5):
        y = nn.Sequential(*plain)(x).sum()
        slowed(away.side, chance)
        (found,) = torch.autograd.grad(y, x)
        rubbish = torch.full((1 << 22,), float("nan"), device=device)  # takes whatever was let go too early
        assert torch.equal(found, expected)
        del rubbish
