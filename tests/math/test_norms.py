"""Layer norms with modulation, gated sums and turned attention: own gradients against those of autograd."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from weft.math.normed_attention import Heads, Source, cross_attention, rms_normed, self_attention
from weft.math.norms import Modulated, gated, modulated
from weft.math.rotary import doubled, signed, turned

ITEMS, TOKENS, WIDTH = 2, 6, 8


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("items", "rows"), [(1, 1), (2, 1), (2, 3)])
def test_a_modulated_norm_and_a_gated_sum_have_autograds_gradients(items: int, rows: int):
    x, y = (drawn(items, TOKENS, WIDTH, seed=n).requires_grad_() for n in (1, 2))
    weight, bias, gate = (drawn(items, rows, WIDTH, seed=n) for n in (3, 4, 5))
    above = drawn(items, TOKENS, WIDTH, seed=6)

    def by_token(modulation: Tensor) -> Tensor:
        return modulation.repeat_interleave(TOKENS // rows, 1)

    normed = torch.nn.functional.layer_norm(x, (WIDTH,), eps=1e-6)
    expected = y + (normed * by_token(weight) + by_token(bias)) * by_token(gate)
    truth = torch.autograd.grad(expected, (x, y), above)
    found = gated(y, modulated(x, Modulated(weight, bias, 1e-6, torch.float32)), gate)
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found, (x, y), above), truth)


def test_a_turn_rotates_each_pair_by_its_angle():
    x, angles = drawn(TOKENS, 2, WIDTH), drawn(TOKENS, 1, WIDTH // 2, seed=1)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    assert_close(turned(x, doubled(angles.cos()), signed(angles.sin())), torch.view_as_real(pairs).flatten(-2))


def test_attention_with_norms_and_turns_has_autograds_gradients():
    heads, eps = Heads(2, 1e-6), 1e-6
    q, k, v = (drawn(ITEMS, TOKENS, WIDTH, seed=n).requires_grad_() for n in range(3))
    of_q, of_k, angles = drawn(WIDTH, seed=3), drawn(WIDTH, seed=4), drawn(TOKENS, 1, WIDTH // 4, seed=5)
    turn = torch.stack([doubled(angles.cos()), signed(angles.sin())])
    above = drawn(ITEMS, TOKENS, WIDTH, seed=6)

    def attended(asked: Tensor, keys: Tensor) -> Tensor:
        scores = torch.einsum("bmhd,bnhd->bhmn", asked, keys) / (WIDTH // 2) ** 0.5
        return torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), heads.split(v)).flatten(2)

    asked, keys = heads.split(rms_normed(q, of_q, eps)), heads.split(rms_normed(k, of_k, eps))
    found = self_attention(q, Source(k, of_k, v), of_q, turn * WIDTH**0.5, heads)
    expected = attended(turned(asked, *turn), turned(keys, *turn))
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found, (q, k, v), above), torch.autograd.grad(expected, (q, k, v), above, True))
    crossed = cross_attention(q, of_q, [Source(k, of_k, v), Source(k, of_k, v)], heads)
    expected = 2 * attended(asked, keys)
    assert_close(crossed, expected)
    assert_close(torch.autograd.grad(crossed, (q, k, v), above), torch.autograd.grad(expected, (q, k, v), above))
