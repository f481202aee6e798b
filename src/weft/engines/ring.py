"""Ring attention: keys and values travel from rank to rank, and each rank adds up its own queries' attention.

Liu, Zaharia and Abbeel 2023, arXiv:2310.01889. Letters as in sequence.py.

When it is right: where heads do not divide among the ranks, for it has no use for heads; and where one rank cannot hold
the keys and values of a whole sequence for its share of heads. Where heads divide, Ulysses moves fewer bytes (each
rank sends a share of q, k, v and the output, here all keys and values S - 1 times), keeps the layer's own kernel, and
shares out a causal mask evenly: in a ring the rank with the last tokens has the most to do, the others wait.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.engines.sequence import Ulysses
from weft.errors import ConfigError
from weft.math.attention import Attention, joined, partial_attention, partial_gradients

Method = Literal["auto", "ulysses", "ring"]


def sequence_ranks(process_group: dist.ProcessGroup, method: Method = "auto") -> Ulysses:
    """The ranks of one sequence, and how they attend. auto: by heads where those divide among the ranks; otherwise a
    ring where all tokens see each other, and gathered keys and values where a mask says what is seen."""
    return {"auto": Either, "ulysses": Ulysses, "ring": Ring}[method](process_group)


class Ring(Ulysses):
    """Ranks that hand their keys and values round, whatever the heads."""

    def by_heads(self, heads: int) -> bool:
        return False

    def attend_unevenly(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
        if not attention.plain:
            raise ConfigError(
                "parallel.sequence_method: a ring cannot do what this model does between scores and softmax, such as a "
                "soft cap. Write ulysses."
            )
        return ring_attention(self, attention, q, k, v, lengths)


class Either(Ulysses):
    """By heads where those divide, by a ring where they do not and all tokens see each other."""

    def attend_unevenly(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
        if attention.plain and attention.seen is None:
            return ring_attention(self, attention, q, k, v, lengths)
        return super().attend_unevenly(attention, q, k, v, lengths)


def ring_attention(
    ranks: Ulysses, attention: Attention, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]
) -> Tensor:
    """(B, n, H, D') of own queries (B, n, H, D), keys (B, n, G, D) and values (B, n, G, D'). In q's dtype."""
    scale = attention.scale if attention.scale is not None else 1 / sqrt(q.shape[-1])
    return round_the_ring(q, k, v, Masks(ranks, attention, lengths, q.device), scale)


def round_the_ring(q: Tensor, k: Tensor, v: Tensor, masks: "Masks", scale: float) -> Tensor:
    out: Any = _RingAttention.apply(*(x.transpose(1, 2) for x in (q, k, v)), masks, scale)
    return out.transpose(1, 2)


class Masks:
    """What own queries see of each rank's keys, worked out when it is needed: (n, n) is much for a long sequence."""

    def __init__(self, ranks: Ulysses, attention: Attention, lengths: Sequence[int], device: torch.device) -> None:
        self.ranks, self.attention, self.lengths, self.device = ranks, attention, tuple(lengths), device
        self.rows, _ = ranks.places(self.lengths, device)

    def of(self, rank: int) -> tuple[bool, Tensor | None]:
        """(whether anything is seen, mask (B or 1, 1, n, n) or None where all is)."""
        columns, real = self.ranks.places(self.lengths, self.device, rank)
        padded = any(length % self.ranks.size for length in self.lengths)
        seen = self.attention.seen
        if seen is None:
            return (bool(real.any()), real.expand(1, 1, len(self.rows), -1)) if padded else (True, None)
        mask = seen(self.rows, columns) & real
        return bool(mask.any()), None if bool(mask.all()) else mask

    def travel(self, parcel: Tensor) -> "Travel":
        """Send a tensor to the next rank."""
        return _Travel(parcel, self.ranks)


class Travel(Protocol):
    def arrived(self) -> Tensor: ...


class _RingAttention(torch.autograd.Function):
    """Layout (B, heads, n, width), as partial_attention has it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, masks: Masks, scale: float) -> Tensor:
        ranks = masks.ranks
        total: tuple[Tensor, Tensor] | None = None
        parcel = torch.cat([k, v], -1)
        for step in range(ranks.size):
            travel = masks.travel(parcel) if step < ranks.size - 1 else None
            anything, mask = masks.of((ranks.rank - step) % ranks.size)
            if anything:
                keys, values = parcel.split([k.shape[-1], v.shape[-1]], -1)
                part = partial_attention(q, keys, values, mask, scale)
                total = part if total is None else joined(total, part)
            parcel = parcel if travel is None else travel.arrived()
        assert total is not None, "a token sees itself"
        out, normalizer = total
        ctx.save_for_backward(q, k, v, out.to(q.dtype), normalizer)
        ctx.masks, ctx.scale = masks, scale
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, out, normalizer = ctx.saved_tensors
        ranks, widths = ctx.masks.ranks, [k.shape[-1], v.shape[-1]]
        wide = torch.promote_types(q.dtype, torch.float32)
        of_q, parcel = torch.zeros_like(q, dtype=wide), torch.cat([k, v], -1)
        # The gradients of keys and values travel with them, one step behind, and end where they belong.
        gathered = torch.zeros_like(parcel, dtype=wide)
        for step in range(ranks.size):
            travel = ctx.masks.travel(parcel) if step < ranks.size - 1 else None
            anything, mask = ctx.masks.of((ranks.rank - step) % ranks.size)
            if anything:
                keys, values = parcel.split(widths, -1)
                dq, dk, dv = partial_gradients(grads[0], out, normalizer, q, keys, values, mask, ctx.scale)
                of_q += dq
                gathered += torch.cat([dk, dv], -1)
            gathered = ctx.masks.travel(gathered).arrived()
            parcel = parcel if travel is None else travel.arrived()
        of_k, of_v = gathered.split(widths, -1)
        return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), None, None


class _Travel:
    """A tensor on its way to the next rank, while that of the one before comes."""

    def __init__(self, parcel: Tensor, ranks: Ulysses) -> None:
        self.sent = parcel.contiguous()  # held until it has left
        self.received = torch.empty_like(self.sent)
        group, size = ranks.group, ranks.size
        following, previous = (dist.get_global_rank(group, (ranks.rank + by) % size) for by in (1, -1))
        self.under_way = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self.sent, following, group),
                dist.P2POp(dist.irecv, self.received, previous, group),
            ]
        )

    def arrived(self) -> Tensor:
        for each in self.under_way:
            each.wait()
        return self.received
