"""Causal attention of texts packed into rows, text by text, with queries and keys normed by head and turned.

Kept are q, k and v as linear layers gave them, the answer, and a number a query and head; normed and turned queries and
keys are made again in the backward pass. Letters: B rows, L tokens of a row, H heads, G of keys, D width of a head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from weft.math.sdpa import Kernel

Lengths = tuple[tuple[int, ...], ...]  # of the texts of each row, padding being one of them


@dataclass(frozen=True)
class RmsNorm:
    """x / sqrt(mean(x^2) + eps) times offset + w; Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4."""

    eps: float
    offset: float

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.offset:
            # 1 + w in half precision would lose most of w.
            return functional.rms_norm(x.float(), x.shape[-1:], self.offset + weight.float(), self.eps).to(x.dtype)
        return functional.rms_norm(x, x.shape[-1:], weight.to(x.dtype), self.eps)

    def backward(self, x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        """dL/dx: with r = 1 / sqrt(mean(x^2) + eps) and g = w dy, r g - r^3 x mean(x g); in fp32 until the end."""
        wide, scale = x.float(), weight.float() + self.offset if self.offset else weight.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        inner = grad * scale
        dot = (inner * wide).mean(-1, keepdim=True).mul_(inverse.pow(3))
        return inner.mul_(inverse).addcmul_(wide, dot, value=-1).to(x.dtype)


def turned_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., D) turned by pairs half a head apart; Su et al. 2021, arXiv:2104.09864, eq. 34. -sin turns back."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


@dataclass(frozen=True)
class Asked:
    """How queries or keys come from a linear layer: their heads' width, and the norm of each head, if there is one."""

    width: int
    norm: RmsNorm | None = None

    def ready(self, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, H, L, D), normed and turned, of x (B, L, H D); cos and sin (B, L, 1, D)."""
        heads = x.unflatten(-1, (-1, self.width))
        if self.norm is not None and weight is not None:
            heads = self.norm(heads, weight)
        return turned_halves(heads, cos, sin).to(x.dtype).transpose(1, 2)

    def through(self, x: Tensor, grad: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """Gradient (B, L, H D) of x, of grad (B, L, H, D)."""
        grad = turned_halves(grad, cos, -sin)
        if self.norm is not None and weight is not None:
            grad = self.norm.backward(x.unflatten(-1, (-1, self.width)), grad, weight)
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
    """(B, L, H D) of q (B, L, H D), k and v (B, L, G D). norms: weights (D,) of queries' and keys'. turn: cos and sin
    (B, L, D)."""
    with torch.autocast(qkv[0].device.type, enabled=False):
        return _PackedAttention.apply(heads, kernel, *qkv, *norms, *(table.unsqueeze(2) for table in turn))


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, heads: TextHeads, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, of_q: Tensor | None,
        of_k: Tensor | None, cos: Tensor, sin: Tensor,
    ) -> Tensor:  # fmt: skip
        asked, keys, values = _made(heads, q, k, v, of_q, of_k, cos, sin)
        answer = q.new_empty(q.shape).unflatten(-1, (-1, heads.queries.width))  # (B, L, H, D)
        kept: list[Tensor] = []
        ctx.extras = 0
        for rows, places in heads.pieces():
            own_q, own_k, own_v = (x[rows, :, places] for x in (asked, keys, values))
            out, sums, extras = kernel.forward(own_q, own_k, own_v, heads.scale)
            answer[rows, places] = out.transpose(1, 2)
            kept += [sums, *extras]
            ctx.extras = len(extras)
        answer = answer.flatten(2)
        ctx.heads, ctx.kernel = heads, kernel
        ctx.save_for_backward(q, k, v, of_q, of_k, cos, sin, answer, *kept)
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, of_q, of_k, cos, sin, answer, *kept = ctx.saved_tensors
        heads: TextHeads = ctx.heads
        asked = _made(heads, q, k, v, of_q, of_k, cos, sin)
        above, out = (x.unflatten(-1, (-1, heads.queries.width)).transpose(1, 2) for x in (grad, answer))
        found = [x.new_empty(x.shape).unflatten(-1, (-1, heads.queries.width)) for x in (q, k, v)]
        each = 1 + ctx.extras
        for number, (rows, places) in enumerate(heads.pieces()):
            sums, *extras = kept[number * each : (number + 1) * each]
            own = (x[rows, :, places] for x in asked)
            told = (x[rows, :, places] for x in (above, out))
            dy, y = told
            gradients = ctx.kernel.backward(dy, tuple(own), y, sums, heads.scale, tuple(extras))
            for whole, part in zip(found, gradients, strict=True):
                whole[rows, places] = part.transpose(1, 2)
        dq = heads.queries.through(q, found[0], of_q, cos, sin)
        dk = heads.keys.through(k, found[1], of_k, cos, sin)
        return None, None, dq, dk, found[2].flatten(2), None, None, None, None


def _made(
    heads: TextHeads,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    of_q: Tensor | None,
    of_k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a kernel is given, (B, heads, L, D) each."""
    values = v.unflatten(-1, (-1, heads.keys.width)).transpose(1, 2)
    return heads.queries.ready(q, of_q, cos, sin), heads.keys.ready(k, of_k, cos, sin), values
