"""Attention with queries and keys that are RMS-normed over the full width and turned by their places.

Kept are q, k and v as linear layers gave them, the answer, two numbers a token and one a query and head; normed and
turned queries and keys are made again in the backward pass. Letters: B items, M queries, N keys, H heads, D width of a
head, d = H D. q: (B, M, d), k and v: (B, N, d). Gradients of the norm: with y = sqrt(d) w q / l and
l = sqrt(|q|^2 + d eps), dq = sqrt(d) w dy / l - q (y . dy) / l^2; a turn leaves y . dy as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from weft.math.rotary import swapped, turned
from weft.math.sdpa import KERNELS, Kernel
from weft.math.tiled import kernel_here
from weft.math.traced import must_be_followed

AT_ONCE = 1 << 17  # tokens times heads that attend together where memory is short
PIECE = 4096  # tokens whose gradients pass through the norm together there

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B, M, H, D), k, v (B, N, H, D) -> (B, M, H, D)


@dataclass(frozen=True)
class Heads:
    """How a layer attends. kernel: name of a fused kernel; None: the one that torch would run. attend: what autograd
    and compilers follow in place of torch's own attention. fused: whether a kernel may be called past autograd. few:
    some heads at a time, so that little is there beside what is kept; kernels without autograd's help alone."""

    count: int
    eps: float
    kernel: str | None = None
    attend: Attend | None = None
    fused: bool = True
    few: bool = False

    def chosen(self, q: Tensor, k: Tensor, v: Tensor) -> Kernel | None:
        """Of q (B, H, M, D), k and v (B, H, N, D)."""
        if not self.fused:
            return None
        return kernel_here(q, k, v) if self.kernel is None else KERNELS[self.kernel]

    def split(self, x: Tensor) -> Tensor:
        """(B, M, H, D) of x (B, M, d)."""
        return x.unflatten(-1, (self.count, -1))

    def some(self, x: Tensor, group: slice) -> Tensor:
        """Those heads of x (B, M, H, D): without a view where they are all."""
        return x if group.stop - group.start == self.count else x[:, :, group]

    def groups(self, q: Tensor) -> list[slice]:
        """Of heads that attend together, as even as they can be: all, or as few as keep a large GPU busy."""
        most = max(1, ceil(AT_ONCE / q.shape[:-1].numel())) if self.few else self.count
        size = ceil(self.count / ceil(self.count / most))
        return [slice(begin, min(self.count, begin + size)) for begin in range(0, self.count, size)]


@dataclass(frozen=True)
class Source:
    """Keys (B, N, d) before their norm, their norm's weight (d,), and values (B, N, d)."""

    k: Tensor
    weight: Tensor
    v: Tensor


def self_attention(q: Tensor, own: Source, weight: Tensor, turn: Tensor, heads: Heads) -> Tensor:
    """(B, M, d) of tokens that attend to each other. weight (d,): of the queries' norm. turn: cos and sin (2, M, 1, D),
    fp32, as `rotary.turned` takes them, both times sqrt(d)."""
    flat = (q, own.k, own.v, weight, own.weight, turn)
    kernel = _kernel(heads, q, own.k, own.v)
    if kernel is None or must_be_followed(weight, own.weight, turn):
        return _followed_self_attention(*flat, heads)
    with torch.autocast(q.device.type, enabled=False):
        return _SelfAttention.apply(*flat, heads, kernel)  # type: ignore[return-value]  # apply has no types


def cross_attention(q: Tensor, weight: Tensor, sources: Sequence[Source], heads: Heads) -> Tensor:
    """(B, M, d): the sum of the answers that queries find in several sources. weight (d,): of the queries' norm."""
    flat = [tensor for each in sources for tensor in (each.k, each.weight, each.v)]
    kernels = [_kernel(heads, q, each.k, each.v) for each in sources]
    known = all(kernel is not None for kernel in kernels)
    if not known or must_be_followed(weight, *(each.weight for each in sources)):
        return _followed_cross_attention(q, weight, sources, heads)
    with torch.autocast(q.device.type, enabled=False):
        return _CrossAttention.apply(heads, kernels, q, weight, *flat)  # type: ignore[return-value]


def rms_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) weight (..., d), in x's dtype, as autograd follows it."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


# ---- As autograd and compilers follow it ----


def _followed_self_attention(
    q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, turn: Tensor, heads: Heads
) -> Tensor:
    # A compiled block divides in the kernel that turns: tables of its own it would keep for its backward pass.
    root, before = sqrt(q.shape[-1]), not torch.compiler.is_compiling()
    cos, sin = (turn / root if before else turn).unbind()
    asked, keys = (turned(heads.split(rms_normed(x, w, heads.eps)), cos, sin) for x, w in ((q, of_q), (k, of_k)))
    asked, keys = (y.to(q.dtype) if before else (y / root).to(q.dtype) for y in (asked, keys))
    return _attended(asked, keys, heads.split(v), heads)


def _followed_cross_attention(q: Tensor, weight: Tensor, sources: Sequence[Source], heads: Heads) -> Tensor:
    asked, total = heads.split(rms_normed(q, weight, heads.eps)), None
    for each in sources:
        keys = heads.split(rms_normed(each.k, each.weight, heads.eps))
        answer = _attended(asked, keys, heads.split(each.v), heads)
        total = answer if total is None else total + answer
    assert total is not None
    return total


def _attended(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
    """(B, M, d) of q (B, M, H, D) ..."""
    if heads.attend is not None:
        return heads.attend(q, k, v).flatten(2).to(q.dtype)
    answer = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return answer.transpose(1, 2).flatten(2).to(q.dtype)


# ---- With gradients of our own ----


def _kernel(heads: Heads, q: Tensor, k: Tensor, v: Tensor) -> Kernel | None:
    if torch.compiler.is_compiling():
        return None
    return heads.chosen(*(heads.split(x).transpose(1, 2) for x in (q, k, v)))


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, turn: Tensor, heads: Heads,
        kernel: Kernel,
    ) -> Tensor:  # fmt: skip
        lengths = q.new_empty((2, *q.shape[:-1], 1), dtype=torch.float32)
        for x, length in zip((q, k), lengths, strict=True):
            torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32, out=length)
        lengths = _softened(lengths, q.shape[-1] * heads.eps)
        tables = _tables(turn, lengths)
        groups, answer, sums, extras = heads.groups(q), None, [], []
        for group in groups:
            asked, keys = _both_ready((q, k), (of_q, of_k), tables, heads, group)
            out, found, more = kernel.forward(asked, keys, _heads_of(v, heads, group), _scale(q, heads))
            sums.append(found)
            extras.append(more)
            if len(groups) == 1:
                answer = out.transpose(1, 2).flatten(2)
                break
            answer = torch.empty_like(q) if answer is None else answer
            _heads_of(answer, heads, group).copy_(out)
        assert answer is not None
        ctx.heads, ctx.kernel = heads, kernel
        kept = [each for found, more in zip(sums, extras, strict=True) for each in (found, *more)]
        ctx.save_for_backward(q, k, v, of_q, of_k, turn, lengths, lengths.pow(-2), answer, *kept)
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, of_q, of_k, turn, lengths, inverse_squares, answer, *kept = ctx.saved_tensors
        heads: Heads = ctx.heads
        tables, dots = _tables(turn, lengths), torch.empty_like(lengths)
        groups, found = heads.groups(q), list[Tensor]()
        of_group = len(kept) // len(groups)
        for number, group in enumerate(groups):
            asked = _both_ready((q, k), (of_q, of_k), tables, heads, group)
            above, out, values = (_heads_of(x, heads, group) for x in (grad, answer, v))
            sums, *extras = kept[number * of_group : (number + 1) * of_group]
            made = ctx.kernel.backward(above, (*asked, values), out, sums, _scale(q, heads), tuple(extras))
            for g, x, dot in zip(made, asked, dots, strict=False):
                _sum_products(g, x, dot[..., 0], begun=number > 0)
            if len(groups) == 1:
                found = [g.transpose(1, 2).flatten(2) for g in made]
                break
            found = found or [torch.empty_like(x) for x in (q, k, v)]
            for g, whole in zip(made, found, strict=True):
                _heads_of(whole, heads, group).copy_(g)
            del asked, made, g, x  # before the next ones are made
        dots.mul_(inverse_squares)
        *found, dv = found
        before = [
            _through_norm(heads.split(g), x, weight, table, dot, heads.few)
            for g, x, weight, table, dot in zip(found, (q, k), (of_q, of_k), tables, dots, strict=True)
        ]
        return *before, dv, None, None, None, None, None


class _CrossAttention(torch.autograd.Function):
    """The weights of both norms stand on the keys, which are few: (q w) . (k w') = q . (k w w')."""

    @staticmethod
    def forward(
        ctx: Any, heads: Heads, kernels: Sequence[Kernel], q: Tensor, weight: Tensor, *flat: Tensor
    ) -> Tensor:  # fmt: skip
        unit, length = _unit(q, heads)
        asked, scale = heads.split(unit).transpose(1, 2), _scale(q, heads) * q.shape[-1]
        total: Tensor | None = None
        ctx.heads, ctx.kernels, ctx.extras = heads, kernels, []
        kept = [unit, length]
        for kernel, (k, of_k, v) in zip(kernels, _by_three(flat), strict=True):
            unit_k, length_k = _unit(k, heads)
            both = weight.float() * of_k
            keys = heads.split(_weighed(unit_k, both)).transpose(1, 2)
            out, sums, extras = kernel.forward(asked, keys, heads.split(v).transpose(1, 2), scale)
            answer = out.transpose(1, 2).flatten(2)
            total = answer if total is None else total + answer
            ctx.extras.append(len(extras))
            kept += [unit_k, length_k, both, v, answer, sums, *extras]
        assert total is not None
        ctx.save_for_backward(*kept)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, length, *rest = ctx.saved_tensors
        heads: Heads = ctx.heads
        scale = _scale(unit, heads) * unit.shape[-1]
        above, asked = (heads.split(x).transpose(1, 2) for x in (grad, unit))
        of_unit: Tensor | None = None
        found: list[Tensor | None] = []
        for kernel, count in zip(ctx.kernels, ctx.extras, strict=True):
            (unit_k, length_k, both, v, answer, sums, *extras), rest = rest[: 6 + count], rest[6 + count :]
            keys, values, out = (heads.split(x).transpose(1, 2) for x in (_weighed(unit_k, both), v, answer))
            dq, dk, dv = kernel.backward(above, (asked, keys, values), out, sums, scale, tuple(extras))
            of_unit = dq if of_unit is None else of_unit + dq
            of_key = _weighed(dk.transpose(1, 2).flatten(2), both)
            found += [_through_unit(of_key, unit_k, length_k), None, dv.transpose(1, 2).flatten(2)]
        assert of_unit is not None
        return None, None, _through_unit(of_unit.transpose(1, 2).flatten(2), unit, length), None, *found


def _by_three(flat: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    return [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]


def _scale(q: Tensor, heads: Heads) -> float:
    return 1 / sqrt(q.shape[-1] // heads.count)


def _softened(length: Tensor, square: float) -> Tensor:
    """sqrt(length^2 + square)."""
    return length.hypot_(length.new_full((), sqrt(square)))


def _unit(x: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """x / l (B, N, d) in x's dtype, and l (B, N, 1) fp32."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    length = _softened(length, x.shape[-1] * heads.eps)
    return torch.div(x, length, out=torch.empty_like(x)), length


def _weighed(x: Tensor, weight: Tensor) -> Tensor:
    """x weight in x's dtype."""
    return torch.mul(x, weight) if x.dtype == weight.dtype else torch.mul(x, weight, out=torch.empty_like(x))


def _tables(turn: Tensor, lengths: Tensor) -> Sequence[Tensor]:
    """Of queries and of keys: turn / l (2, B, N, 1, D), for lengths (2, B, N, 1)."""
    return (turn[:, None] / lengths[:, None, ..., None]).unbind()


def _heads_of(x: Tensor, heads: Heads, group: slice) -> Tensor:
    """Some heads (B, H, N, D) of x (B, N, d)."""
    return heads.some(heads.split(x), group).transpose(1, 2)


def _both_ready(
    both: Sequence[Tensor], weights: Sequence[Tensor], tables: Sequence[Tensor], heads: Heads, group: slice
) -> tuple[Tensor, Tensor]:
    """Some heads of queries and of keys (B, H, N, D), normed and turned, in their dtype."""
    asked, keys = (_ready(x, w, table, heads, group) for x, w, table in zip(both, weights, tables, strict=True))
    return asked, keys


def _ready(x: Tensor, weight: Tensor, table: Tensor, heads: Heads, group: slice) -> Tensor:
    """The tables carry sqrt(d) / l."""
    cos, sin = table.unbind()
    of_heads = heads.split(weight) if group.stop - group.start == heads.count else heads.split(weight)[group]
    weighed = _weighed(heads.some(heads.split(x), group), of_heads)
    return torch.addcmul(weighed * cos, swapped(weighed), sin, out=torch.empty_like(weighed)).transpose(1, 2)


def _sum_products(g: Tensor, x: Tensor, out: Tensor, begun: bool) -> None:
    """g . x over heads and their width (B, N), of (B, H, N, D) each; added to what is there when that has begun."""
    product = g.transpose(1, 2) * x.transpose(1, 2)
    if begun:
        out += torch.sum(product, (2, 3), dtype=torch.float32)
    else:
        torch.sum(product, (2, 3), dtype=torch.float32, out=out)


def _through_norm(g: Tensor, x: Tensor, weight: Tensor, table: Tensor, dot: Tensor, few: bool) -> Tensor:
    """Gradient (B, N, d) of what `_ready` was given, of g (B, N, H, D), which is overwritten where few tokens are to
    pass at a time. dot (B, N, 1): y . dy / l^2."""
    if not few:
        return _norm_gradient(g, x, weight, table, dot)
    for begin in range(0, x.shape[1], PIECE):
        here = slice(begin, begin + PIECE)
        own = g[:, here]
        own.copy_(_norm_gradient(own, x[:, here], weight, table[:, :, here], dot[:, here]).view_as(own))
    return g.flatten(2)


def _norm_gradient(g: Tensor, x: Tensor, weight: Tensor, table: Tensor, dot: Tensor) -> Tensor:
    cos, sin = table.unbind()
    wide = (g * cos).addcmul_(swapped(g), sin, value=-1).flatten(2).mul_(weight)
    return torch.addcmul(wide, x, dot, value=-1, out=torch.empty_like(x))


def _through_unit(g: Tensor, unit: Tensor, length: Tensor) -> Tensor:
    """Gradient of x from that of x / l: (g - u (u . g)) / l."""
    dot = torch.sum(g * unit, -1, keepdim=True, dtype=torch.float32)
    return torch.div(torch.addcmul(g, unit, dot, value=-1), length, out=torch.empty_like(unit))
