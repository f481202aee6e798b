"""Joint attention of streams of tokens whose queries and keys are RMS-normed head by head and turned by their places.

Kept are q, k and v as linear layers gave them, the answer, and three numbers a token and head; normed and turned
queries and keys are made again in the backward pass, of some heads at a time where memory is short: heads know nothing
of each other. Letters: B items, n tokens of a stream, T of all, L the last of
them that a mask may hide, H heads, D width of a head, d = H D. Gradients of the norm: with i = 1 / sqrt(mean x^2 + eps)
over D and y = w x i, dx = i (w dy - x i (y . dy) / D); a turn leaves y . dy as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

from weft.math.attention import joined, partial_attention, partial_gradients
from weft.math.normed_attention import Heads, rms_normed
from weft.math.rotary import swapped, turned
from weft.math.sdpa import Answer, Gradients, Kernel
from weft.math.traced import must_be_followed

FIELDS = 6


@dataclass(frozen=True)
class Stream:
    """Queries, keys and values (B, n, d) before their norm; weights (D,) of the norms of queries and keys; turn: cos
    and sin (2, n, 1, D) fp32, as `rotary.turned` takes them, None for tokens without a place."""

    q: Tensor
    k: Tensor
    v: Tensor
    of_q: Tensor
    of_k: Tensor
    turn: Tensor | None

    @property
    def fields(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.v, self.of_q, self.of_k, self.turn


def joint_attention(streams: Sequence[Stream], heads: Heads, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """(B, n, d) of each stream, whose tokens attend to those of all. mask (B, 1, 1, L) bool: which of the last L tokens
    are seen, True where they are; None: all."""
    known, first = None, streams[0]
    if not torch.compiler.is_compiling():
        known = heads.chosen(*(heads.split(x).transpose(1, 2) for x in (first.q, first.k, first.v)))
    fixed = [tensor for each in streams for tensor in (each.of_q, each.of_k, each.turn)]
    if known is None or must_be_followed(*fixed):
        return _followed(streams, heads, mask)
    kernel = known if mask is None else Ragged(known, mask)
    with torch.autocast(first.q.device.type, enabled=False):
        fields = (tensor for each in streams for tensor in each.fields)
        return _JointAttention.apply(heads, kernel, *fields)  # type: ignore[return-value]  # apply has no types


def whole_mask(mask: Tensor, tokens: int) -> Tensor:
    """(B, 1, 1, T) of a mask of the last L tokens."""
    return pad(mask, (tokens - mask.shape[-1], 0), value=True)


class Ragged:
    """A kernel whose last L keys a mask (B, 1, 1, L) hides: it runs over the others without one, and the two answers
    are joined, which is exact. Each item must see a key."""

    name = "ragged"

    def __init__(self, kernel: Kernel, mask: Tensor) -> None:
        self.kernel, self.mask = kernel, mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Answer:
        (all_k, some_k), (all_v, some_v) = self._parts(k), self._parts(v)
        out, sums, _ = self.kernel.forward(q, all_k, all_v, scale)
        some = partial_attention(q, some_k, some_v, self._rows(q), scale)
        out, sums = joined((out.to(some[0].dtype), sums), some)
        return _as_kernels_do(out.to(q.dtype)), sums, ()

    def backward(
        self, grad: Tensor, asked: Gradients, out: Tensor, logsumexp: Tensor, scale: float,
        extras: tuple[Tensor, ...] = (),
    ) -> Gradients:  # fmt: skip
        q, k, v = asked
        (all_k, some_k), (all_v, some_v) = self._parts(k), self._parts(v)
        ours = self.kernel.backward(grad, (q, all_k, all_v), out, logsumexp, scale)
        theirs = partial_gradients(grad, out, logsumexp, q, some_k, some_v, self._rows(q), scale)
        dq = (theirs[0] + ours[0]).to(q.dtype)
        dk, dv = (torch.cat([one, other.to(one.dtype)], 2) for one, other in zip(ours[1:], theirs[1:], strict=True))
        return dq, dk, dv

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.mask.shape[-1]
        return x[:, :, : x.shape[2] - hidden], x[:, :, x.shape[2] - hidden :]

    def _rows(self, q: Tensor) -> Tensor:
        return self.mask.expand(-1, -1, q.shape[2], -1)


def _as_kernels_do(out: Tensor) -> Tensor:
    """(B, H, T, D) that lies as (B, T, H, D)."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


# ---- As autograd and compilers follow it ----


def _followed(streams: Sequence[Stream], heads: Heads, mask: Tensor | None) -> tuple[Tensor, ...]:
    q = _laid([_followed_ready(each.q, each.of_q, each.turn, heads) for each in streams])
    k = _laid([_followed_ready(each.k, each.of_k, each.turn, heads) for each in streams])
    v = _laid([heads.split(each.v) for each in streams])
    if heads.attend is not None:
        out = heads.attend(q, k, v)
    else:
        seen = None if mask is None else whole_mask(mask, k.shape[1])
        out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen).transpose(1, 2)
    return out.flatten(2).to(q.dtype).split([each.q.shape[1] for each in streams], 1)


def _followed_ready(x: Tensor, weight: Tensor, turn: Tensor | None, heads: Heads) -> Tensor:
    normed = rms_normed(heads.split(x), weight, heads.eps)
    return normed if turn is None else turned(normed, turn[0], turn[1]).to(x.dtype)


def _laid(parts: Sequence[Tensor]) -> Tensor:
    """Streams (B, n, ...) end to end."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


# ---- With gradients of our own ----


class _JointAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Heads, kernel: Kernel, *flat: Any) -> tuple[Tensor, ...]:
        streams = _streams(flat)
        inverses = [_inverses(each, heads) for each in streams]
        v = _laid([each.v for each in streams])
        groups, answer, of_groups = heads.groups(v), None, list[Tensor]()
        for group in groups:
            asked, keys = (x.transpose(1, 2) for x in _ready(streams, inverses, heads, group))
            out, *own = kernel.forward(asked, keys, _heads_of(v, heads, group), _scale(asked))
            of_groups += [own[0], *own[1]]
            if len(groups) == 1:
                answer = out.transpose(1, 2).flatten(2)
                break
            answer = torch.empty_like(v) if answer is None else answer
            _heads_of(answer, heads, group).copy_(out)
        assert answer is not None
        ctx.heads, ctx.kernel, ctx.count = heads, kernel, len(streams)
        kept = [tensor for each in streams for tensor in (each.q, each.k, None, each.of_q, each.of_k, each.turn)]
        ctx.save_for_backward(*kept, *inverses, v, answer, *of_groups)
        return (answer,) if len(streams) == 1 else answer.split([each.q.shape[1] for each in streams], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        heads, kernel, count = ctx.heads, ctx.kernel, ctx.count
        saved = ctx.saved_tensors  # asked for once: recomputation gives them once
        streams, rest = _streams(saved[: FIELDS * count]), saved[FIELDS * count :]
        inverses, (v, answer, *of_groups) = rest[:count], rest[count:]
        above, groups, found = _laid(grads), heads.groups(v), list[list[Tensor]]()
        of_group = len(of_groups) // len(groups)
        for number, group in enumerate(groups):
            ready = _ready(streams, inverses, heads, group)
            values, out, grad = (_heads_of(x, heads, group) for x in (v, answer, above))
            asked = (*(x.transpose(1, 2) for x in ready), values)
            sums, *extras = of_groups[number * of_group : (number + 1) * of_group]
            made = kernel.backward(grad, asked, out, sums, _scale(values), tuple(extras))
            own = _of_streams(streams, [x.transpose(1, 2) for x in made], ready, inverses, (heads, group))
            del made, asked, ready
            if len(groups) == 1:
                found = [[x.flatten(2) for x in each] for each in own]
                break
            found = found or [[torch.empty_like(x) for x in (each.q, each.k, each.q)] for each in streams]
            for wholes, parts in zip(found, own, strict=True):
                for whole, part in zip(wholes, parts, strict=True):
                    heads.split(whole)[:, :, group].copy_(part)
            del own, part, parts  # before the next ones are made
        return None, None, *(x for each in found for x in (*each, None, None, None))


def _of_streams(
    streams: Sequence[Stream], made: Sequence[Tensor], ready: Sequence[Tensor], inverses: Sequence[Tensor],
    at: tuple[Heads, slice],
) -> list[list[Tensor]]:  # fmt: skip
    """Gradients of each stream's q, k and v as they were given, of some heads (B, n, H, D). made: those of normed and
    turned q, k and of v of all streams, ready: these q and k, (B, T, H, D) each."""
    (heads, group), answers, begin = at, list[list[Tensor]](), 0
    some = heads.some
    for each, inverse in zip(streams, inverses, strict=True):
        here = slice(begin, begin + each.q.shape[1])
        pairs = zip(made, (each.q, each.k), (each.of_q, each.of_k), inverse, ready, strict=False)
        before = [
            _through_norm(g[:, here], some(heads.split(x), group), some(i, group), y[:, here], (weight, each.turn))
            for g, x, weight, i, y in pairs
        ]
        answers.append([*before, made[2][:, here]])
        begin = here.stop
    return answers


def _streams(flat: Sequence[Any]) -> list[Stream]:
    return [Stream(*flat[i : i + FIELDS]) for i in range(0, len(flat), FIELDS)]


def _scale(q: Tensor) -> float:
    return 1 / sqrt(q.shape[-1])


def _inverses(stream: Stream, heads: Heads) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over each head of queries and of keys, (2, B, n, H, 1) fp32."""
    q = heads.split(stream.q)
    found = q.new_empty((2, *q.shape[:-1], 1), dtype=torch.float32)
    for x, norm in zip((q, heads.split(stream.k)), found, strict=True):
        torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32, out=norm)
    width = q.shape[-1]
    return found.hypot_(found.new_full((), sqrt(width * heads.eps))).reciprocal_().mul_(sqrt(width))


def _ready(
    streams: Sequence[Stream], inverses: Sequence[Tensor], heads: Heads, group: slice
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Some heads of queries and keys of all streams, normed and turned, (B, T, H, D) in their own dtype."""
    first, tokens = streams[0].q, sum(each.q.shape[1] for each in streams)
    count, width = group.stop - group.start, first.shape[-1] // heads.count
    asked, keys = (first.new_empty(len(first), tokens, count, width) for _ in "qk")
    begin = 0
    for each, both in zip(streams, inverses, strict=True):
        own = each.q.shape[1]
        fields = zip((each.q, each.k), (each.of_q, each.of_k), both, (asked, keys), strict=True)
        for x, weight, inverse, out in fields:
            tables = _tables(weight, each.turn)
            _write(heads.some(heads.split(x), group), heads.some(inverse, group), tables, out.narrow(1, begin, own))
        begin += own
    return asked, keys


def _heads_of(x: Tensor, heads: Heads, group: slice) -> Tensor:
    """Some heads (B, H, T, D) of x (B, T, d)."""
    return heads.some(heads.split(x), group).transpose(1, 2)


def _tables(weight: Tensor, turn: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """w cos, and w' sin where w' is w with its pairs swapped: what turns w x. Without places w alone."""
    wide = weight.float()
    if turn is None:
        return wide, None
    cos, sin = turn.unbind()
    return wide * cos, swapped(wide) * sin


def _write(x: Tensor, inverse: Tensor, tables: tuple[Tensor, Tensor | None], out: Tensor) -> None:
    """x (B, n, H, D), normed and turned, into its place."""
    normed = torch.mul(x, inverse, out=torch.empty_like(x))
    cos, sin = tables
    if sin is None:
        torch.mul(normed, cos, out=out)
    else:
        torch.addcmul(normed * cos, swapped(normed), sin, out=out)


def _through_norm(g: Tensor, x: Tensor, inverse: Tensor, y: Tensor, of: tuple[Tensor, Tensor | None]) -> Tensor:
    """dL/dx (B, n, H, D) of dL/dy = g. of: a norm's weight, and cos and sin."""
    weight, turn = of
    if turn is None:
        wide = g * weight.float()
    else:
        cos, sin = turn.unbind()
        wide = (g * cos).addcmul_(swapped(g), sin, value=-1).mul_(weight)
    share = torch.sum(g * y, -1, keepdim=True, dtype=torch.float32).mul_(inverse).div_(x.shape[-1])
    wide.addcmul_(x, share, value=-1)
    return torch.mul(wide, inverse, out=torch.empty_like(x))
