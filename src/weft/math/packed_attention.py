"""Causal attention of texts packed into rows, text by text, with queries and keys normed by head and turned.

Kept are q, k and v as linear layers gave them, the answer, and of each token a number or two a head; normed and turned
queries and keys are made again in the backward pass. Letters: B rows, L tokens of a row, H heads, G of keys, D width of
a head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.math.rms_norm import RmsNorm
from weft.math.sdpa import Kernel

Lengths = tuple[tuple[int, ...], ...]  # of the texts of each row, padding being one of them


def turned_halves(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """x (..., D) turned by pairs half a head apart, or turned back; Su et al. 2021, arXiv:2104.09864, eq. 34."""
    half, sign = x.shape[-1] // 2, -1 if back else 1
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out


@dataclass(frozen=True)
class Asked:
    """How queries or keys come from a linear layer: their heads' width, and the norm of each head, if there is one."""

    width: int
    norm: RmsNorm | None = None

    def heads(self, x: Tensor) -> Tensor:
        """(B, L, H, D) of x (B, L, H D)."""
        return x.unflatten(-1, (-1, self.width))

    def normed(self, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Heads (B, L, H, D), normed, of x (B, L, H D), and what the norm keeps: a number a head."""
        heads = self.heads(x)
        return (heads, None) if self.norm is None or weight is None else self.norm.forward(heads, weight, x.dtype)

    def again(self, x: Tensor, weight: Tensor | None, inverse: Tensor | None) -> Tensor:
        heads = self.heads(x)
        if self.norm is None or weight is None or inverse is None:
            return heads
        return self.norm.again(heads, weight, inverse, x.dtype)

    def through(
        self, x: Tensor, grad: Tensor, weight: Tensor | None, inverse: Tensor | None, turn: Sequence[Tensor]
    ) -> Tensor:
        """Gradient (B, L, H D) of x, of grad (B, L, H, D)."""
        cos, sin = turn
        grad = turned_halves(grad, cos, sin, back=True)
        if self.norm is not None and weight is not None and inverse is not None:
            grad = self.norm.backward(self.heads(x), grad, weight, inverse)
        return grad.flatten(2).to(x.dtype)


@dataclass(frozen=True)
class TextHeads:
    """How a layer attends: its queries, its keys, the scale of their products, and the texts of its rows."""

    queries: Asked
    keys: Asked
    scale: float
    texts: Lengths

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """Rows and places of what is attended to at once: the same text of all rows, where they are cut alike."""
        for rows, lengths in parts(self.texts):
            at = 0
            for length in lengths:
                yield rows, slice(at, at + length)
                at += length


def parts(texts: Lengths) -> list[tuple[slice, tuple[int, ...]]]:
    """Rows that may be asked together: all of them where they are cut alike, else each."""
    if all(row == texts[0] for row in texts):
        return [(slice(None), texts[0])]
    return [(slice(number, number + 1), row) for number, row in enumerate(texts)]


def packed_attention(
    qkv: Sequence[Tensor], norms: Sequence[Tensor | None], turn: Sequence[Tensor], heads: TextHeads, kernel: Kernel
) -> Tensor:
    """(B, L, H D) of q (B, L, H D), k and v (B, L, G D), all of one dtype. norms: weights (D,) of queries'
    and keys'. turn: cos and sin (B, L, D)."""
    with torch.autocast(qkv[0].device.type, enabled=False):
        return _PackedAttention.apply(heads, kernel, *qkv, *norms, *(table.unsqueeze(2) for table in turn))


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, heads: TextHeads, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, of_q: Tensor | None,
        of_k: Tensor | None, cos: Tensor, sin: Tensor,
    ) -> Tensor:  # fmt: skip
        asked, inverse_q = heads.queries.normed(q, of_q)
        keys, inverse_k = heads.keys.normed(k, of_k)
        made = _made(heads, (asked, keys), v, (cos, sin))
        del asked, keys
        kept: list[Tensor] = []
        ctx.extras = 0

        def attended() -> Iterator[tuple[Tensor]]:
            for rows, places in heads.pieces():
                own_q, own_k, own_v = (x[rows, :, places] for x in made)
                out, sums, extras = kernel.forward(own_q, own_k, own_v, heads.scale)
                kept.extend((sums, *extras))
                ctx.extras = len(extras)
                yield (out.transpose(1, 2),)

        (answer,) = _laid(heads, attended(), [heads.queries.heads(q)])
        answer = answer.flatten(2)
        ctx.heads, ctx.kernel = heads, kernel
        ctx.save_for_backward(q, k, v, of_q, of_k, cos, sin, inverse_q, inverse_k, answer, *kept)
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, of_q, of_k, cos, sin, inverse_q, inverse_k, answer, *kept = ctx.saved_tensors
        heads: TextHeads = ctx.heads
        above, out = (heads.queries.heads(x).transpose(1, 2) for x in (grad, answer))
        each = 1 + ctx.extras

        def gradients(asked: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
            for number, (rows, places) in enumerate(heads.pieces()):
                sums, *extras = kept[number * each : (number + 1) * each]
                own_q, own_k, own_v = (x[rows, :, places] for x in asked)
                dy, y = (x[rows, :, places] for x in (above, out))
                three = ctx.kernel.backward(dy, (own_q, own_k, own_v), y, sums, heads.scale, tuple(extras))
                yield [part.transpose(1, 2) for part in three]

        normed = heads.queries.again(q, of_q, inverse_q), heads.keys.again(k, of_k, inverse_k)
        found = gradients(_made(heads, normed, v, (cos, sin)))
        del normed
        dq, dk, dv = _laid(heads, found, [heads.queries.heads(q), heads.keys.heads(k), heads.keys.heads(v)])
        dq = heads.queries.through(q, dq, of_q, inverse_q, (cos, sin))
        dk = heads.keys.through(k, dk, of_k, inverse_k, (cos, sin))
        return None, None, dq, dk, dv.flatten(2), None, None, None, None


def _made(
    heads: TextHeads, normed: Sequence[Tensor], v: Tensor, turn: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What a kernel is given, (B, heads, L, D) each, of normed queries and keys (B, L, heads, D)."""
    cos, sin = turn
    asked, keys = (turned_halves(x, cos, sin).to(v.dtype).transpose(1, 2) for x in normed)
    return asked, keys, heads.keys.heads(v).transpose(1, 2)


def _laid(heads: TextHeads, found: Iterator[Sequence[Tensor]], likes: Sequence[Tensor]) -> Sequence[Tensor]:
    """Wholes (B, L, heads, D) of the pieces (rows, places, heads, D): without a copy where there is one piece."""
    pieces = list(heads.pieces())
    if len(pieces) == 1:
        return next(found)
    wholes = [torch.empty_like(like) for like in likes]
    for (rows, places), parts_of in zip(pieces, found, strict=True):
        for whole, part in zip(wholes, parts_of, strict=True):
            whole[rows, places] = part
    return wholes
