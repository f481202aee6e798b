"""Losses of tokens without the logits of all: against PyTorch's own, value and gradient, and by memory."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from weft.math.cross_entropy import PLAIN, Head, Logits, head_losses, losses_through, rows_of

FORMS = [PLAIN, Logits(scale=0.25), Logits(cap=3.0), Logits(scale=2.0, cap=5.0)]
N, D, V = 11, 8, 37


def plain(x: Tensor, weight: Tensor, labels: Tensor, form: Logits, bias: Tensor | None = None) -> Tensor:
    z = functional.linear(x, weight, bias) * form.scale
    z = z if form.cap is None else form.cap * torch.tanh(z / form.cap)
    return functional.cross_entropy(z, labels, reduction="none")


def question(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(3)
    x = torch.randn(N, D, generator=chance, dtype=dtype).requires_grad_()
    weight, bias = torch.randn(V, D, generator=chance, dtype=dtype), torch.randn(V, generator=chance, dtype=dtype)
    return x, weight, bias, torch.randint(V, (N,), generator=chance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_losses_and_their_gradient_are_those_of_whole_logits(form: Logits, rows: int) -> None:
    x, weight, bias, labels = question(torch.float32)
    share = torch.linspace(-1, 2, N)  # each token's loss may count otherwise
    found = head_losses(x, labels, Head(weight, bias, form), rows)
    (gradient,) = torch.autograd.grad((found * share).sum(), x)
    wanted = plain(x, weight, labels, form, bias)
    (truth,) = torch.autograd.grad((wanted * share).sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, truth, rtol=1e-5, atol=1e-5)


def test_losses_through_a_trained_head_give_it_its_gradient() -> None:
    x, weight, bias, labels = question()
    head = torch.nn.Linear(D, V, dtype=torch.float64)
    head.load_state_dict({"weight": weight, "bias": bias})
    form = Logits(scale=2.0, cap=5.0)
    found = torch.autograd.grad(losses_through(head, x, labels, form, V, rows=4).sum(), [x, head.weight])
    wanted = torch.autograd.grad(plain(x, head.weight, labels, form, head.bias).sum(), [x, head.weight])
    for ours, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)  # softmax in fp32 on both sides


def test_half_precision_costs_one_rounding_of_the_hidden_gradient() -> None:
    """bf16 has 8 bits: 2^-8 of the largest number; the softmax itself is taken in fp32."""
    x, weight, _, labels = question(torch.float32)
    half, heavy = x.detach().bfloat16().requires_grad_(), weight.bfloat16()
    (ours,) = torch.autograd.grad(head_losses(half, labels, Head(heavy)).sum(), half)
    wide = half.detach().float().requires_grad_()
    (truth,) = torch.autograd.grad(plain(wide, heavy.float(), labels, PLAIN).sum(), wide)
    assert (ours.float() - truth).abs().max() < 2**-6 * truth.abs().max()


def test_a_gradient_in_fp16_keeps_words_of_a_small_share() -> None:
    """Shares of 1 / V of a vocabulary of 2^17 words lie below fp16's smallest normal number, 6e-5."""
    words = 1 << 17
    x = torch.zeros(1, 2, dtype=torch.float16, requires_grad=True)
    weight = torch.ones(words, 2, dtype=torch.float16)
    weight[0] = 0  # the label's row: dL/dx = sum of p over all others = 1 - 1/V
    (gradient,) = torch.autograd.grad(head_losses(x, torch.tensor([0]), Head(weight)).sum(), x)
    torch.testing.assert_close(gradient, torch.ones(1, 2, dtype=torch.float16), rtol=1e-3, atol=0)


def test_no_token_gives_no_loss_and_a_gradient_of_zeros() -> None:
    x, weight, _, labels = question(torch.float32)
    head_losses(x[:0], labels[:0], Head(weight)).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
    assert losses_through(torch.nn.Linear(D, V), x[:0], labels[:0], PLAIN, V).shape == (0,)


def test_the_backward_pass_waits_with_hidden_states_and_not_with_logits() -> None:
    x, weight, _, labels = question(torch.float32)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        head_losses(x, labels, Head(weight), rows=4)
    assert kept == [N * D]  # dL/dx; of the logits N * V, of the weight V * D
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        plain(x, weight, labels, PLAIN)
    assert sum(kept) >= N * V


def test_never_more_logits_exist_than_a_part_has() -> None:
    largest: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            return out

    x, weight, _, labels = question(torch.float32)
    with Watch():
        head_losses(x, labels, Head(weight), rows=2).sum().backward()
    assert max(largest) == V * D  # the weight's own size (its view); 2 rows of logits have 2 V, all of them N V
    assert 2 * V < V * D < N * V


# ---- What it costs --------------------------------------------------------------------------------------------------


class Made(TorchDispatchMode):
    """Notes the sizes of all tensors that are made, and multiplications of matrices by (rows, inner, columns)."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if str(func).split(".")[1] in ("mm", "addmm"):
            left, right = args[-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        self.shapes |= {tuple(t.shape) for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)}
        return out


@pytest.mark.parametrize("tokens", [12, 24])
def test_a_frozen_head_multiplies_twice_a_token_and_makes_no_whole_logits_and_no_own_gradient(tokens: int) -> None:
    """Once for logits and once for the gradient of the hidden state: 2 N D V, of learned tokens alone."""
    chance = torch.Generator().manual_seed(4)
    x = torch.randn(tokens, D, generator=chance).requires_grad_()
    weight, labels = torch.randn(V, D, generator=chance), torch.randint(V, (tokens,), generator=chance)
    with Made() as made:
        head_losses(x, labels, Head(weight), rows=4).sum().backward()
    assert made.multiplications == 2 * tokens * D * V
    assert (4, V) in made.shapes and (tokens, V) not in made.shapes
    assert (V, D) not in made.shapes  # (D, V) is the weight itself, seen from the other side


def test_logits_that_exist_at_once_are_2_to_the_27() -> None:
    """512 MiB in fp32: 883 tokens of Qwen3's 151,936 words, 4194 of Llama's 32,000."""
    assert (rows_of(151_936), rows_of(32_000)) == (883, 4194)


@pytest.mark.parametrize(("dtype", "at_once"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_losses_and_their_gradient_are_made_in_the_memory_of_the_logits(dtype: torch.dtype, at_once: int) -> None:
    """Never two parts at once. In half precision there is, beside the fp32 logits, first the head's output and then the
    gradient that is multiplied."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape == (rows, V):
                alive.append(weakref.ref(out))
                here = {t.untyped_storage()._cdata for ref in alive if (t := ref()) is not None}
                most = max(most, len(here))
            return out

    rows = 4
    x, weight, _, labels = question(torch.float32)
    x, weight = x[: 2 * rows].detach().to(dtype).requires_grad_(), weight.to(dtype)
    with Watch():
        head_losses(x, labels[: 2 * rows], Head(weight), rows=rows).sum().backward()
    assert most == at_once
