"""The two engines of inner steps: against finite differences and each other, and what they must leave as it was."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from weft.errors import ModelError
from weft.math.meta import (
    MetaGradient,
    Weights,
    carrying,
    first_order,
    gradients,
    names_in,
    second_order,
    twice_differentiable,
)

CHUNKS, K = 2, 3


class Small(nn.Module):
    """Two layers of doubles; tanh, so that second derivatives are not all zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.fixture
def network() -> Small:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Small()


def data() -> list[tuple[Tensor, Tensor]]:
    """K chunks, and at the end what is asked after each."""
    chance = torch.Generator().manual_seed(1)
    sizes = [2] * K + [6]
    return [(torch.randn(n, 3, generator=chance).double(), torch.randint(2, (n,), generator=chance)) for n in sizes]


def loss_at(network: nn.Module, weights: Weights, part: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(functional_call(network, dict(weights), part[:1]), part[1])


def rates_of(network: nn.Module, rate: float = 0.3) -> dict[str, Tensor]:
    """One rate for each number, none like another."""
    chance = torch.Generator().manual_seed(2)
    return {name: rate * torch.rand(p.shape, generator=chance, dtype=p.dtype) for name, p in network.named_parameters()}


def by_second(network: nn.Module, rates: Weights, clip: float | None = None) -> MetaGradient:
    *chunks, after = data()
    asks = [lambda fast, part=part: loss_at(network, fast, part) for part in chunks]
    return second_order(dict(network.named_parameters()), rates, asks, lambda fast: loss_at(network, fast, after), clip)


def by_first(network: nn.Module, rates: Weights, clip: float | None = None) -> MetaGradient:
    *chunks, after = data()

    def ask(part: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
        return lambda: functional.cross_entropy(network(part[0]), part[1])

    return first_order(dict(network.named_parameters()), rates, [ask(part) for part in chunks], ask(after), clip)


def outcome(network: nn.Module, weights: Weights, rates: Weights, clip: float | None = None) -> Tensor:
    """The loss after K steps, on average, as a plain function of where they begin and how far they go."""
    *chunks, after = data()
    fast, losses = {name: w.detach().requires_grad_() for name, w in weights.items()}, []
    for part in chunks:
        found = torch.autograd.grad(loss_at(network, fast, part), list(fast.values()))
        found = found if clip is None else [g.clamp(-clip, clip) for g in found]
        fast = {
            name: (w - rates[name] * g).detach().requires_grad_()
            for (name, w), g in zip(fast.items(), found, strict=True)
        }
        losses.append(loss_at(network, fast, after).detach())
    return torch.stack(losses).mean()


def differences(f: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a number with respect to each of a tensor's."""
    out = torch.zeros_like(at)
    for i in range(at.numel()):
        ends = []
        for sign in (1, -1):
            moved = at.detach().clone().flatten()
            moved[i] += sign * step
            ends.append(f(moved.view_as(at)))
        out.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    return out


@pytest.mark.parametrize("clip", [None, 0.05])
def test_second_order_agrees_with_central_differences_of_the_whole_loss(network: Small, clip: float | None) -> None:
    rates = rates_of(network)
    own = {name: p.detach().clone() for name, p in network.named_parameters()}
    found = by_second(network, rates, clip)
    torch.testing.assert_close(found.loss, outcome(network, own, rates, clip))
    for name in own:
        of_weight = differences(lambda w, n=name: outcome(network, {**own, n: w}, rates, clip), own[name])
        of_rate = differences(lambda r, n=name: outcome(network, own, {**rates, n: r}, clip), rates[name])
        torch.testing.assert_close(found.weights[name], of_weight, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found.rates[name], of_rate, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_first_order_is_the_whole_graph_with_inner_gradients_as_constants(network: Small, clip: float | None) -> None:
    rates = {name: rate.requires_grad_() for name, rate in rates_of(network).items()}
    *chunks, after = data()
    own = dict[str, Tensor](network.named_parameters())
    fast, losses = own, []
    for part in chunks:
        g = torch.autograd.grad(loss_at(network, fast, part), list(fast.values()))
        g = g if clip is None else [each.clamp(-clip, clip) for each in g]
        fast = {name: w - rates[name] * each for (name, w), each in zip(fast.items(), g, strict=True)}
        losses.append(loss_at(network, fast, after))
    expected = torch.autograd.grad(torch.stack(losses).mean(), [*own.values(), *rates.values()])
    found = by_first(network, {name: rate.detach() for name, rate in rates.items()}, clip)
    torch.testing.assert_close([*found.weights.values(), *found.rates.values()], list(expected), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", ["row", "tensor"])
def test_rates_of_rows_and_tensors_are_sums_of_those_of_their_numbers(network: Small, shape: str) -> None:
    def coarse(p: Tensor) -> Tensor:
        size = () if shape == "tensor" else (p.shape[0],) + (1,) * (p.dim() - 1)
        return torch.full(size, 0.2, dtype=p.dtype)

    few = {name: coarse(p) for name, p in network.named_parameters()}
    many = {name: few[name].expand(p.shape) for name, p in network.named_parameters()}
    for engine in (by_first, by_second):
        found, fine = engine(network, few), engine(network, many)
        for name, rate in few.items():
            torch.testing.assert_close(found.rates[name], fine.rates[name].sum_to_size(rate.shape))
            torch.testing.assert_close(found.weights[name], fine.weights[name])


def test_trap_5_a_rate_whose_name_is_misspelt_is_refused(network: Small) -> None:
    """functional_call ignores a name that it does not know, silently."""
    rates = rates_of(network)
    rates["first.wieght"] = rates.pop("first.weight")
    for engine in (by_first, by_second):
        with pytest.raises(ModelError, match=r"2 names are .* first 'first.weight'"):
            engine(network, rates)


def test_trap_5_a_trained_tensor_outside_of_the_network_or_a_second_one_inside_is_refused(network: Small) -> None:
    trained = dict(network.named_parameters())
    assert names_in(network, {f"own.{name}": p for name, p in trained.items()}) == {f"own.{n}": n for n in trained}
    with pytest.raises(ModelError, match=r"1 trained tensors are no parameters of the network, first 'lost'"):
        names_in(network, {**trained, "lost": nn.Parameter(torch.zeros(1))})
    trained.pop("second.bias")
    with pytest.raises(ModelError, match=r"would be trained without a rate of their own, first 'second.bias'"):
        names_in(network, trained)
    network.second.bias.requires_grad_(False)
    assert "second.bias" not in names_in(network, trained)


def test_trap_17_nothing_is_left_in_grad_and_weights_are_as_they_were(network: Small) -> None:
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    network.first.weight.grad = torch.ones_like(network.first.weight)  # of an earlier micro-batch
    by_first(network, rates_of(network))
    by_second(network, rates_of(network))
    assert torch.equal(network.first.weight.grad, torch.ones_like(network.first.weight))
    assert all(p.grad is None for name, p in network.named_parameters() if name != "first.weight")
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


def test_weights_are_put_back_when_a_loss_fails(network: Small) -> None:
    before = {name: p.detach().clone() for name, p in network.named_parameters()}

    def fails() -> Tensor:
        raise ValueError("out of memory, say")

    ask = lambda: network(data()[0][0]).sum()  # noqa: E731
    with pytest.raises(ValueError, match="out of memory"):
        first_order(dict(network.named_parameters()), rates_of(network), [ask], fails)
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


def test_trap_11_no_graph_outlives_a_step(network: Small) -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    kept = [engine(network, rates_of(network)).loss for engine in (by_first, by_second)]
    before = alive()
    for _ in range(10):
        kept = [engine(network, rates_of(network)).loss for engine in (by_first, by_second)]
    assert alive() == before
    assert not any(loss.requires_grad for loss in kept)


def saved_bytes(run: Callable[[], object]) -> int:
    """The most that autograd keeps at a time for backward passes."""
    now = most = 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, most
            self.tensor, self.size = tensor, tensor.nbytes
            now += self.size
            most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            now -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        run()
    return most


def test_memory_of_first_order_does_not_grow_with_the_number_of_steps(network: Small) -> None:
    rates, weights = rates_of(network), dict(network.named_parameters())
    part = data()[-1]
    ask = lambda: functional.cross_entropy(network(part[0]), part[1])  # noqa: E731
    at = lambda fast: loss_at(network, fast, part)  # noqa: E731
    first = {k: saved_bytes(lambda k=k: first_order(weights, rates, [ask] * k, ask)) for k in (1, 4)}
    second = {k: saved_bytes(lambda k=k: second_order(weights, rates, [at] * k, at)) for k in (1, 4)}
    assert first[4] == first[1] == saved_bytes(lambda: gradients(ask(), weights))
    assert second[4] > 3 * second[1] > 3 * first[1]


class Attending(nn.Module):
    """One layer of attention by torch's own kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8, dtype=torch.float64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).view(1, len(x), 2, 4).transpose(1, 2) for each in (self.q, self.k, self.v))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), 8))


def test_trap_3_fused_attention_has_no_second_derivative_and_is_not_asked_for_one() -> None:
    """With dropout torch takes plain products by itself, so that training passes and an evaluation fails."""
    torch.manual_seed(0)
    network = Attending()
    weights, x = dict(network.named_parameters()), torch.randn(5, 8, dtype=torch.float64)
    rates = {name: torch.full((), 0.1, dtype=torch.float64) for name in weights}

    def at(fast: Weights) -> Tensor:
        return functional_call(network, dict(fast), (x,)).square().mean()

    inner = torch.autograd.grad(at(weights), list(weights.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="flash_attention_for_cpu_backward is not implemented"):
        torch.autograd.grad(sum(g.sum() for g in inner), list(weights.values()), allow_unused=True)
    found = second_order(weights, rates, [at], at)
    assert all(bool(torch.isfinite(g).all()) for g in found.weights.values())
    first = first_order(weights, rates, [lambda: at(weights)], lambda: at(weights))  # with the fused kernel
    torch.testing.assert_close(first.loss, found.loss, rtol=1e-10, atol=0)


def test_trap_3_what_has_no_second_derivative_all_the_same_is_named_with_the_setting() -> None:
    refused = pytest.raises(ModelError, match=r"only be differentiated once .*Write objective.order=first")
    with refused, twice_differentiable():
        raise RuntimeError("derivative for aten::_flash_attention_backward is not implemented")
    with pytest.raises(RuntimeError, match="shapes"), twice_differentiable():
        raise RuntimeError("shapes do not match")


def test_trap_4_first_order_is_right_with_recomputed_blocks(network: Small) -> None:
    """Under functional_call a block would run again with the weights of before."""
    expected = by_first(network, rates_of(network))
    forward = network.first.forward
    network.first.forward = lambda x: checkpoint(forward, x, use_reentrant=False)  # type: ignore[method-assign]
    found = by_first(network, rates_of(network))
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=1e-15)
    torch.testing.assert_close(found.rates, expected.rates, rtol=0, atol=1e-15)


def test_autocast_does_not_answer_with_casts_of_weights_that_have_moved(network: Small) -> None:
    """Autocast keeps the casts of parameters until it ends, whatever becomes of their numbers meanwhile."""
    network.float()
    weights = dict(network.named_parameters())
    rates = {name: torch.full((), 0.5) for name in weights}
    x, y = data()[-1][0].float(), data()[-1][1]

    def ask() -> Tensor:
        return functional.cross_entropy(network(x).float(), y)

    def anew() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ask()

    expected = first_order(weights, rates, [anew] * 3, anew)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ask()  # so that casts are there
        found = first_order(weights, rates, [ask] * 3, ask)
    assert torch.equal(found.loss, expected.loss)
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=0)


def test_a_carried_loss_is_worth_what_it_was_and_its_gradient_is_what_was_found() -> None:
    w, rate = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor(3.0))
    found = {"w": torch.tensor([0.5, 0.25]), "rate": torch.tensor(-1.0)}
    loss = carrying(torch.tensor(0.7), {"w": w, "rate": rate}, found, torch.tensor(4))
    assert float(loss.detach()) == pytest.approx(2.8)
    (loss / 8).backward()
    assert w.grad.tolist() == [0.25, 0.125] and float(rate.grad) == -0.5  # type: ignore[union-attr]


def test_where_one_gradient_is_not_finite_none_is() -> None:
    """Rates and weights have optimizers of their own, and either all of them move or none."""
    w, rate = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(()))
    found = {"w": torch.tensor([1.0, 2.0]), "rate": torch.tensor(float("inf"))}
    carrying(torch.tensor(0.7), {"w": w, "rate": rate}, found, torch.tensor(1)).backward()
    assert not bool(torch.isfinite(w.grad).any())  # type: ignore[arg-type]
