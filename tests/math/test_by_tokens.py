"""Some tokens at a time: where pieces lie, and that gradients are those of the whole."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.math import by_tokens as module
from weft.math.by_tokens import Given, by_tokens, pieces
from weft.math.norms import GELU, gated
from weft.math.products import products
from weft.projection import PLAIN, LowRank, Projection
from weft.run.counting import counted

WIDTH, WIDE, RANK = 8, 20, 2


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 12), of_row=st.integers(1, 700), most=st.integers(64, 300))
def test_pieces_cover_all_tokens_once_and_lie_within_one_row_or_over_whole_ones(rows: int, of_row: int, most: int):
    found = list(pieces(rows * of_row, rows, most))
    begin = 0
    for tokens, own in found:
        assert tokens.start == begin < tokens.stop
        assert tokens.stop - tokens.start <= max(most + 63, of_row if of_row <= most else 0)
        assert own.start == tokens.start // of_row and own.stop == (tokens.stop - 1) // of_row + 1
        whole = tokens.start % of_row == 0 and tokens.stop % of_row == 0
        assert whole or own.stop == own.start + 1
        begin = tokens.stop
    assert begin == rows * of_row


def test_32760_tokens_are_eight_pieces_of_4096_and_frames_are_never_cut_into_crumbs():
    assert [tokens.stop - tokens.start for tokens, _ in pieces(32_760, 1, 4096)] == [4096] * 7 + [4088]
    assert {tokens.stop - tokens.start for tokens, _ in pieces(21 * 1560, 21, 4096)} == {2 * 1560, 1560}


def layers(dtype: torch.dtype) -> list[Projection]:
    """Two frozen layers with an adapter on each."""
    torch.manual_seed(0)
    found = []
    for width, out in ((WIDTH, WIDE), (WIDE, WIDTH)):
        frozen = torch.randn(out, width).to(dtype) / 4, torch.randn(out).to(dtype)
        a, b = (torch.randn(*shape, dtype=torch.promote_types(dtype, torch.float32)) / 4 for shape in
                ((RANK, width), (out, RANK)))  # fmt: skip
        change = LowRank(a.requires_grad_(), b.requires_grad_(), 0.5)
        found.append(Projection(nn.Identity(), PLAIN, frozen, change))
    return found


def fed(given: Given) -> Tensor:
    """A feed-forward layer whose inner part knows of two whole tensors and of a row of modulation."""
    (x,), (row,), (whole,) = given.tokens, given.rows, given.whole
    (inner,) = products(x + whole.to(x.dtype), given.layers[:1])
    (out,) = products(inner, given.layers[1:], GELU)
    return gated(x, out, row)


def learned(dtype: torch.dtype, at_once: int, rows: int, monkeypatch: pytest.MonkeyPatch, parted: bool) -> list[Tensor]:
    """Answer, and gradients of tokens, rows, the whole tensor and the adapters."""
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    known = layers(dtype)
    x = torch.randn(2, 384, WIDTH).to(dtype).requires_grad_()
    row = torch.randn(2, rows, WIDTH, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    whole = torch.randn(1, 1, WIDTH, dtype=row.dtype).requires_grad_()

    def run(x: Tensor) -> Tensor:
        given = Given((x,), (row,), (whole,), tuple(known))
        return by_tokens(fed, given) if parted else fed(given)

    answer = checkpoint(run, x, use_reentrant=False)
    assert isinstance(answer, Tensor)
    answer.backward(torch.randn(answer.shape, generator=torch.Generator().manual_seed(3)).to(dtype))
    changes = [layer.change for layer in known if layer.change is not None]
    trained = [x, row, whole, *(t for change in changes for t in (change.a, change.b))]
    return [answer.detach(), *(t.grad for t in trained if t.grad is not None)]


def errors(found: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    assert [t.shape for t in found] == [t.shape for t in truth] and len(truth) == 8
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, truth, strict=True)]


@pytest.mark.parametrize("rows", [1, 3, 384])
def test_pieces_give_the_answer_and_all_gradients_of_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch):
    """fp32 rounds at 6e-8; sums over tokens are taken piece by piece."""
    whole = learned(torch.float32, 10**6, rows, monkeypatch, parted=False)
    assert max(errors(learned(torch.float32, 128, rows, monkeypatch, parted=True), whole)) < 1e-6


def test_in_bf16_pieces_are_no_further_from_fp32_than_the_whole(monkeypatch: pytest.MonkeyPatch):
    truth = [t.float() for t in learned(torch.float64, 10**6, 3, monkeypatch, parted=False)]
    rounded = torch.bfloat16
    at_once = errors(learned(rounded, 10**6, 3, monkeypatch, parted=False), truth)
    parted = errors(learned(rounded, 128, 3, monkeypatch, parted=True), truth)
    assert all(own < 1.1 * other + 1e-4 for own, other in zip(parted, at_once, strict=True)), (parted, at_once)


def test_a_piece_that_is_all_takes_as_many_products_as_a_block_that_runs_again(monkeypatch: pytest.MonkeyPatch):
    """The block's second run leaves out what the backward pass does by itself."""

    def wide(parted: bool) -> int:
        seen = counted(lambda: learned(torch.float32, 10**6, 1, monkeypatch, parted)).names
        return sum(seen[name] for name in ("mm", "addmm", "addmm_"))

    assert wide(parted=True) == wide(parted=False)


def test_where_a_layer_must_be_called_itself_the_whole_is_computed_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "AT_ONCE", 64)
    x, seen = torch.randn(1, 256, WIDTH).requires_grad_(), list[Any]()

    def run(given: Given) -> Tensor:
        seen.append(given.tokens[0].shape[1])
        return given.tokens[0] * 2

    by_tokens(run, Given((x,), layers=(Projection(nn.Identity()),)))
    with torch.no_grad():
        by_tokens(run, Given((x,), layers=tuple(layers(torch.float32))))
    assert seen == [256, 256]
    by_tokens(run, Given((x,), layers=tuple(layers(torch.float32))))
    assert seen[2:] == [64] * 4
