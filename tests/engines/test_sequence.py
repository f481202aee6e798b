"""Ranks that part a sequence: what they split, gather and attend to is what one process has, backward too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.multi import spawn
from weft.engines.ring import Method, Ring, sequence_ranks
from weft.errors import ConfigError
from weft.math.attention import Attention, rows_of, seen_by

BOUND = 1e-6  # relative; fp32 rounds at 6e-8, and sums are taken in another order


def ranks_of(method: Method) -> Any:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    return sequence_ranks(dist.group.WORLD, method)


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= BOUND * other.norm())


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- Parts ----


def parts_and_their_gradients() -> tuple[Tensor, Tensor, Tensor]:
    ranks = ranks_of("ulysses")
    x = torch.arange(10.0).requires_grad_()
    part = ranks.split(x, 0)
    whole = ranks.gather(part * (ranks.rank + 1), 0, 10)
    (whole * torch.arange(10.0)).sum().backward()
    assert x.grad is not None
    return part.detach(), whole.detach(), x.grad


def test_a_length_that_does_not_divide_is_padded_with_the_last_token_and_the_padding_learns_nothing():
    results = spawn(4, parts_and_their_gradients)
    expected = [[0.0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 9, 9]]
    assert [part.tolist() for part, _, _ in results] == expected
    for _, whole, _ in results:
        assert whole.tolist() == [0, 1, 2, 6, 8, 10, 18, 21, 24, 36]  # token times (rank + 1)
    # d(sum of i x_i (rank + 1)) / dx_i, each token's on the rank that has it: the sum over ranks is the gradient.
    summed = torch.stack([gradient for _, _, gradient in results]).sum(0)
    assert summed.tolist() == [i * (i // 3 + 1) for i in range(10)]


# ---- Attention ----


def question(mask: Tensor | None, scale: float | None = None) -> Attention:
    """torch's own attention under a mask (1 or B, 1, N, N)."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        own = None if mask is None else rows_of(mask, rows)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, own, scale=scale, enable_gqa=True).transpose(1, 2)

    return Attention(kernel, None if mask is None else seen_by(mask), scale)


def packed(batch: int, length: int) -> Tensor:
    """Causal within conversations of 4 and more tokens, other ones in each row."""
    starts = numbers(batch, length, seed=9) > 1
    number = starts.cumsum(1)
    place = torch.arange(length)
    return ((number[:, :, None] == number[:, None]) & (place[:, None] >= place))[:, None]


def asked(heads: tuple[int, int], total: int) -> list[Tensor]:
    """q, k and v (B, N, H, D)."""
    counts = (heads[0], heads[1], heads[1])
    return [numbers(2, total, count, 8, seed=i).requires_grad_() for i, count in enumerate(counts)]


def attended(method: Method, heads: tuple[int, int], lengths: tuple[int, ...], masked: bool) -> list[Tensor]:
    """Of all ranks: output (B, N, H, D), and gradients of q, k and v (this rank's share)."""
    ranks, total = ranks_of(method), sum(lengths)
    q, k, v = asked(heads, total)
    attention = question(packed(2, total) if masked else None, scale=0.3)

    def own(x: Tensor) -> Tensor:
        return torch.cat([ranks.split(part, 1) for part in x.split(list(lengths), 1)], 1)

    out = ranks.attend(attention, own(q), own(k), own(v), lengths)
    outs = out.split([ranks.own(length) for length in lengths], 1)
    whole = torch.cat([ranks.gather(part, 1, length) for part, length in zip(outs, lengths, strict=True)], 1)
    (whole * numbers(2, total, heads[0], 8, seed=7)).sum().backward()
    return [whole.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


def one_process(heads: tuple[int, int], lengths: tuple[int, ...], masked: bool) -> list[Tensor]:
    total = sum(lengths)
    q, k, v = asked(heads, total)
    out = question(packed(2, total) if masked else None, scale=0.3).kernel(q, k, v, None)
    (out * numbers(2, total, heads[0], 8, seed=7)).sum().backward()
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


# method, (heads of queries, of keys), lengths of segments, masked
CASES: list[tuple[Method, tuple[int, int], tuple[int, ...], bool]] = [
    ("ulysses", (4, 4), (16,), False),
    ("ulysses", (4, 4), (13, 5), True),
    ("ulysses", (8, 2), (15,), True),  # two heads of keys, on four ranks each is needed twice
    ("ulysses", (6, 3), (13,), True),  # heads do not divide by four: keys and values are gathered
    ("ulysses", (3, 3), (7, 6), False),
    ("auto", (3, 3), (13,), False),  # by a ring
    ("auto", (3, 3), (13,), True),  # gathered
    ("ring", (4, 4), (16,), False),
    ("ring", (3, 1), (13,), False),
    ("ring", (4, 2), (14,), True),
    ("ring", (3, 3), (2, 11), True),  # the last rank has nothing but padding of the first segment
]


def all_cases() -> list[list[Tensor]]:
    return [attended(*case) for case in CASES]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_attend_as_one_process_does_and_their_gradients_add_up_to_its(world: int):
    results = spawn(world, all_cases)
    for number, (_, heads, lengths, masked) in enumerate(CASES):
        truth = one_process(heads, lengths, masked)
        shares = [result[number] for result in results]
        for share in shares:
            assert close(share[0], truth[0]), CASES[number]
        for i in (1, 2, 3):
            assert close(torch.stack([share[i] for share in shares]).sum(0), truth[i]), (CASES[number], i)


def in_half_precision(method: Method) -> tuple[Tensor, torch.dtype]:
    ranks = ranks_of(method)
    q, k, v = (ranks.split(numbers(1, 8, 4, 8, seed=i), 1) for i in range(3))
    dtypes: list[torch.dtype] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        dtypes.append(q.dtype)
        return question(None).kernel(q, k, v, rows)

    with torch.autocast("cpu", torch.bfloat16):
        out = ranks.attend(Attention(kernel), q, k, v, (8,))
    return out, dtypes[0] if dtypes else out.dtype


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_under_autocast_tokens_travel_in_half_precision(method: Method):
    q, k, v = (numbers(1, 8, 4, 8, seed=i).bfloat16() for i in range(3))
    expected = question(None).kernel(q, k, v, None)
    results = spawn(2, in_half_precision, method)
    assert [dtype for _, dtype in results] == [torch.bfloat16] * 2
    whole = torch.cat([out for out, _ in results], 1)
    assert (whole - expected).abs().max() <= 2**-7 * expected.abs().max()  # bf16's last bit, and the one before


def refused() -> str:
    ranks = ranks_of("ring")
    assert isinstance(ranks, Ring)
    q = numbers(1, 4, 2, 8)
    capped: Callable[..., Tensor] = question(None).kernel
    with pytest.raises(ConfigError, match="soft cap") as error:
        ranks.attend(Attention(capped, plain=False), q, q, q, (8,))
    return str(error.value)


def test_a_ring_refuses_what_it_cannot_sum_in_parts():
    assert "parallel.sequence_method" in spawn(2, refused)[0]
