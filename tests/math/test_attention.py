"""Attention over parts of the keys, joined, is attention over all of them: forward and backward."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from weft.math import attention
from weft.math.attention import joined, partial_attention, partial_gradients

SCALE = 1 / math.sqrt(8)


def asked(dtype: torch.dtype = torch.float64, heads: int = 4, kv_heads: int = 2, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, 7, 8), (2, kv_heads, 9, 8), (2, kv_heads, 9, width))
    return [torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes]


def whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's own."""
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True)


def in_parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Over keys 0 to 4, and then over the rest."""
    masks = [None, None] if mask is None else [mask[..., :4], mask[..., 4:]]
    first, rest = (
        partial_attention(q, k[:, :, part], v[:, :, part], at, SCALE)
        for part, at in zip((slice(4), slice(4, 9)), masks, strict=True)
    )
    return joined(first, rest)


def causal() -> Tensor:
    """Query i sees keys up to i: the first four none of the second part."""
    return (torch.arange(9) <= torch.arange(7)[:, None])[None, None]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_halves_of_the_keys_joined_are_the_whole(masked: bool, dtype: torch.dtype):
    q, k, v = asked(dtype)
    mask = causal() if masked else None
    bound = 1e-6 if dtype == torch.float32 else 1e-14  # a few roundings
    with torch.no_grad():
        assert (in_parts(q, k, v, mask)[0] - whole(q, k, v, mask)).abs().max() < bound


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradients_of_two_halves_add_up_to_those_of_the_whole(masked: bool, dtype: torch.dtype):
    q, k, v = asked(dtype)
    mask = causal() if masked else None
    expected = whole(q, k, v, mask)
    grad = torch.randn(expected.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    truth = torch.autograd.grad(expected, (q, k, v), grad)
    with torch.no_grad():
        out, normalizer = in_parts(q, k, v, mask)
        parts = [
            partial_gradients(
                grad, out, normalizer, q, k[:, :, at], v[:, :, at], None if mask is None else mask[..., at], SCALE
            )
            for at in (slice(4), slice(4, 9))
        ]
    of_q = parts[0][0] + parts[1][0]
    of_k, of_v = (torch.cat([part[i] for part in parts], 2) for i in (1, 2))
    bound = 2e-6 if dtype == torch.float32 else 1e-13
    for got, want in zip((of_q, of_k, of_v), truth, strict=True):
        assert (got - want).abs().max() < bound


def test_a_query_that_sees_no_key_gets_zeros_and_weighs_nothing():
    q, k, v = asked()
    nothing = torch.zeros(1, 1, 7, 9, dtype=torch.bool)
    with torch.no_grad():
        out, normalizer = partial_attention(q, k, v, nothing, SCALE)
        assert not out.any() and (normalizer == float("-inf")).all()
        both, _ = joined((out, normalizer), partial_attention(q, k, v, None, SCALE))
        torch.testing.assert_close(both, whole(q, k, v, None))


def test_values_of_another_width_than_keys_and_small_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch):
    q, k, v = asked(width=6)
    monkeypatch.setattr(attention, "TILE", 150)  # two rows of 2 x 4 x 9 scores at a time
    with torch.no_grad():
        torch.testing.assert_close(in_parts(q, k, v, causal())[0], whole(q, k, v, causal()), rtol=0, atol=1e-14)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_torchs_flash_kernel_of_half_precision_joins_too():
    q, k, v = (x.detach().cuda().bfloat16().repeat(1, 1, 32, 8).requires_grad_() for x in asked())
    expected = whole(q, k, v, None)
    grad = torch.randn_like(expected)
    truth = torch.autograd.grad(expected, (q, k, v), grad)
    half = k.shape[2] // 2
    parts = [(k[:, :, :half], v[:, :, :half]), (k[:, :, half:], v[:, :, half:])]
    with torch.no_grad():
        out, normalizer = joined(*(partial_attention(q, *part, None, SCALE) for part in parts))
        got = [partial_gradients(grad, out, normalizer, q, *part, None, SCALE) for part in parts]
    of_k, of_v = (torch.cat([part[i] for part in got], 2) for i in (1, 2))
    for one, other in zip((out, got[0][0] + got[1][0], of_k, of_v), (expected, *truth), strict=True):
        assert (one - other.float()).norm() < 1e-2 * other.float().norm()  # bf16 keeps 8 bits
