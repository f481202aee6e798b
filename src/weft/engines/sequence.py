"""Ulysses sequence parallelism: ranks part a sequence's tokens, and swap tokens for heads around attention.

Jacobs et al. 2023, arXiv:2309.14509. Letters: B batch, S ranks, n own tokens, N all tokens, H heads, D width of a head.

Why the sum of the ranks' gradients is the gradient, wherever an adapter stands: every rank ends with the same whole
output and the same loss, and `gather` hands each rank the gradient of its own part alone. What a rank computes from
there back to the inputs, before `split` too, is its tokens' share. So nothing learns behind `gather`.
"""

from collections.abc import Sequence
from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from weft.math.attention import Attention


class Ulysses:
    """The ranks of one sequence. Where heads do not divide among them, keys and values are gathered instead."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.group = process_group
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ulysses":
        """A copy of a network belongs to the same processes."""
        return self

    # ---- Parts of a sequence ----

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor that all ranks have whole; a length that does not divide is padded by repeating
        the last token."""
        own, last = self.own(x.shape[dim]), x.shape[dim] - 1
        start = self.rank * own
        if start + own <= x.shape[dim]:
            return x.narrow(dim, start, own).contiguous()
        return x.index_select(dim, torch.arange(start, start + own, device=x.device).clamp(max=last))

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """The whole of all ranks' parts, cut to its length. Backward: the own part of a gradient equal on all ranks."""
        assert x.shape[dim] == self.own(length), f"{x.shape[dim]} of {length} tokens on each of {self.size} ranks"
        whole: Tensor = _Whole.apply(x, dim, self)  # type: ignore[assignment]  # apply has no types
        return whole.narrow(dim, 0, length)

    def own(self, length: int) -> int:
        """Tokens on each rank, padding included."""
        return -(-length // self.size)

    def places(self, lengths: Sequence[int], device: torch.device, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """Places (n,) of a rank's tokens among those of segments laid end to end, and which of them are no padding."""
        found, real, offset = [], [], 0
        for length in lengths:
            own = self.own(length)
            at = (self.rank if rank is None else rank) * own + torch.arange(own, device=device)
            found.append(offset + at.clamp(max=length - 1))
            real.append(at < length)
            offset += length
        return torch.cat(found), torch.cat(real)

    # ---- Attention ----

    def by_heads(self, heads: int) -> bool:
        """Whether a layer with so many heads attends to whole sequences, each rank with some of the heads; otherwise
        to a rank's own queries."""
        return heads % self.size == 0

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
        """Attention of own queries (B, n, H, D) over the keys and values of all ranks: (B, n, H, D').

        lengths: of the segments (video, text) that were split one by one and whose parts lie end to end. The attention
        sees them whole, in order and without padding.
        """
        q, k, v = in_autocast(q, k, v)
        if not self.by_heads(q.shape[2]):
            return self.attend_unevenly(attention, q, k, v, lengths)
        return self._attend_by_heads(attention, q, k, v, lengths)

    def attend_unevenly(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
        """Where heads do not divide: own queries, and the keys and values of all ranks."""
        rows, _ = self.places(lengths, q.device)
        keys, values = (self._joined(self._all(x), lengths) for x in (k, v))
        return attention.kernel(q, keys, values, rows)

    def _attend_by_heads(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
        """Whole sequences of own heads, there and back by two exchanges."""
        # Heads of keys that do not divide are repeated until they do: each rank then has those that its queries need.
        times = lcm(k.shape[2], self.size) // k.shape[2]
        if times > 1:
            k, v = k.repeat_interleave(times, 2), v.repeat_interleave(times, 2)
        parts = [x.unflatten(2, (self.size, -1)).flatten(3) for x in (q, k, v)]  # (B, n, S, own heads * width)
        sent = torch.cat(parts, 3).permute(2, 0, 1, 3).contiguous()
        exchanged = self._exchanged(sent).transpose(0, 1)  # (B, S, n, ...)
        whole = self._joined(exchanged, lengths).split([part.shape[3] for part in parts], 2)
        own_q, own_k, own_v = (x.unflatten(2, (-1, of.shape[3])) for x, of in zip(whole, (q, k, v), strict=True))
        out = attention.kernel(own_q, own_k, own_v, None)
        back = self._exchanged(self._parted(out.flatten(2), lengths))  # (S, B, n, own heads * width)
        return back.permute(1, 2, 0, 3).flatten(2).unflatten(2, (q.shape[2], -1))

    def _exchanged(self, x: Tensor) -> Tensor:
        """x (S, ...): to each rank its row, and from each rank a row."""
        out: Tensor = _Exchange.apply(x, self.group)  # type: ignore[assignment]  # apply has no types
        return out

    def _all(self, x: Tensor) -> Tensor:
        """(B, S, n, ...), every rank's x (B, n, ...)."""
        out: Tensor = _WholeForEach.apply(x, self)  # type: ignore[assignment]  # apply has no types
        return out

    def _joined(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """(B, N, ...) of x (B, S, n, ...): segments whole and in order, padding cut off."""
        parts = x.split([self.own(length) for length in lengths], 2)
        whole = [part.flatten(1, 2)[:, :length] for part, length in zip(parts, lengths, strict=True)]
        return whole[0] if len(whole) == 1 else torch.cat(whole, 1)

    def _parted(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """(S, B, n, W) of x (B, N, W), with zeros for padding."""
        parts = [
            pad(part, (0, 0, 0, self.own(length) * self.size - length)).unflatten(1, (self.size, -1))
            for part, length in zip(x.split(list(lengths), 1), lengths, strict=True)
        ]
        own = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return own.transpose(0, 1).contiguous()


def in_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype that attention would cast them to: they travel so, and have one dtype."""
    kind = q.device.type
    if not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)


class _Exchange(torch.autograd.Function):
    """All-to-all over the first dimension: its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _Exchange.apply(grads[0].contiguous(), ctx.group), None


class _Whole(torch.autograd.Function):
    """All parts along a dimension, for what is computed alike on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, ranks: Ulysses) -> Tensor:
        ctx.dim, ctx.ranks = dim, ranks
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(ranks.size)]
        dist.all_gather(parts, x, group=ranks.group)
        return torch.cat(parts, dim)

    @staticmethod
    @once_differentiable  # the gradient of "equal on all ranks" is no plain sum
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        own = grads[0].shape[ctx.dim] // ctx.ranks.size
        return grads[0].narrow(ctx.dim, ctx.ranks.rank * own, own).contiguous(), None, None


class _WholeForEach(torch.autograd.Function):
    """(B, S, n, ...), all parts of x (B, n, ...), for what each rank computes with otherwise: gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ulysses) -> Tensor:
        ctx.ranks = ranks
        out = x.new_empty(ranks.size, *x.shape)
        dist.all_gather(list(out), x.contiguous(), group=ranks.group)
        return out.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        # Sums of half-precision parts are taken in fp32.
        wide = grads[0].transpose(0, 1).to(torch.promote_types(grads[0].dtype, torch.float32)).contiguous()
        own = torch.empty_like(wide[0])
        dist.reduce_scatter(own, list(wide), group=ctx.ranks.group)
        return own.to(grads[0].dtype), None
