"""Attention in parts: what a layer asks of it, and softmax over some of the keys, to be joined with the others' later.

Shapes: q (B, H, M, D), k (B, G, N, D), v (B, G, N, D'), where G heads of keys serve H heads of queries in order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.math.sdpa import kernel_for

TILE = 1 << 22  # scores that are held at a time where no fused kernel does the sum

Seen = Callable[[Tensor, Tensor], Tensor]  # places (M,) and (N,) -> (B or 1, 1, M, N) bool: which key which query sees


@dataclass(frozen=True)
class Attention:
    """How one layer attends, for those who bring it whole sequences or run it in parts.

    kernel: (q (B, M, H, D), k (B, N, G, D), v (B, N, G, D'), rows) -> (B, M, H, D'), the layer's own way. rows (M,):
    the places of the queries among the keys, None where they are as many and in the same order. seen: None where each
    query sees all keys. scale: of the scores; None: 1 / sqrt(D). plain: whether softmax(scale q k) v over what is seen
    is all that the kernel does, so that it can be summed in parts.
    """

    kernel: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    seen: Seen | None = None
    scale: float | None = None
    plain: bool = True


def seen_by(mask: Tensor) -> Seen:
    """What a mask (B or 1, 1, N or 1, N) says, bool."""

    def seen(rows: Tensor, columns: Tensor) -> Tensor:
        of_rows = rows_of(mask, rows)[..., columns]
        return of_rows.expand(-1, -1, len(rows), -1)

    return seen


def rows_of(mask: Tensor, rows: Tensor | None) -> Tensor:
    """A mask (..., N or 1, N) of some of the queries; rows None: of all."""
    return mask if rows is None or mask.shape[-2] == 1 else mask[..., rows, :]


def partial_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax over these keys alone: (B, H, M, D') and its log-sum-exp (B, H, M), in fp32 or more.

    mask: (B or 1, 1, M, N) bool. A query that sees none of the keys gets zeros, and a log-sum-exp of -inf.
    """
    if mask is None and (fused := kernel_for(q, *(own := _repeated(q, k, v)))) is not None:
        out, normalizer, _ = fused.forward(q, *own, scale)
        return out.to(_wide(q)), normalizer.to(_wide(q))
    outs, normalizers = [], []
    for rows in _tiles(q, k):
        scores = _scores(q[:, :, rows], k, None if mask is None else mask[:, :, rows], scale)
        normalizer = scores.logsumexp(-1)
        weights = (scores - _finite(normalizer)[..., None]).exp()
        outs.append((weights @ _grouped(v, k).to(_wide(q))).flatten(1, 2))
        normalizers.append(normalizer.flatten(1, 2))
    return torch.cat(outs, 2), torch.cat(normalizers, 2)


def joined(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from that over each. Rabe and Staats 2021, arXiv:2112.05682, section 3."""
    (a, log_a), (b, log_b) = one, other
    log = torch.logaddexp(log_a, log_b)
    share_a, share_b = ((part - _finite(log)).exp()[..., None] for part in (log_a, log_b))
    return a * share_a + b * share_b, log


def partial_gradients(
    grad: Tensor, out: Tensor, normalizer: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys add to the gradients of q, k and v, in fp32 or more.

    grad, out and normalizer are those of attention over ALL keys: with them each weight of the whole softmax is known,
    and the sum over sets of keys is exact. Dao 2023, arXiv:2307.08691, algorithm 2.
    """
    if mask is None and (fused := kernel_for(q, *(own := _repeated(q, k, v)))) is not None:
        heads = k.shape[1]
        asked = (q, *own)
        dq, dk, dv = fused.backward(grad.to(q.dtype), asked, out.to(q.dtype), normalizer.to(_wide(q)), scale)
        return dq.to(_wide(q)), _sum_of_groups(dk.to(_wide(q)), heads), _sum_of_groups(dv.to(_wide(q)), heads)
    dq, dk, dv = [], torch.zeros_like(k, dtype=_wide(q)), torch.zeros_like(v, dtype=_wide(q))
    keys, values = _grouped(k, k).to(_wide(q)), _grouped(v, k).to(_wide(q))
    for rows in _tiles(q, k):
        scores = _scores(q[:, :, rows], k, None if mask is None else mask[:, :, rows], scale)
        weights = (scores - _finite(_grouped(normalizer[:, :, rows, None], k))).exp()
        above = _grouped(grad[:, :, rows].to(_wide(q)), k)
        delta = (above * _grouped(out[:, :, rows].to(_wide(q)), k)).sum(-1, keepdim=True)
        of_scores = weights * (above @ values.mT - delta) * scale
        dq.append((of_scores @ keys).flatten(1, 2))
        dk += (of_scores.mT @ _grouped(q[:, :, rows].to(_wide(q)), k)).sum(2)
        dv += (weights.mT @ above).sum(2)
    return torch.cat(dq, 2), dk, dv


def _wide(x: Tensor) -> torch.dtype:
    """In which sums are taken."""
    return torch.promote_types(x.dtype, torch.float32)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """(B, G, H / G, M, D) of x (B, H, M, D): queries beside those that share their keys."""
    return x.unflatten(1, (k.shape[1], -1))


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, G, H / G, M, N), -inf where a key is not seen."""
    wide = _wide(q)
    scores = (_grouped(q, k).to(wide) @ _grouped(k, k).to(wide).mT) * scale
    return scores if mask is None else scores.masked_fill(~mask[:, :, None], float("-inf"))


def _finite(normalizer: Tensor) -> Tensor:
    """0 in place of -inf, so that exp(-inf - it) is 0 and not nan."""
    return normalizer.masked_fill(normalizer == float("-inf"), 0.0)


def _tiles(q: Tensor, k: Tensor) -> list[slice]:
    """Rows of q, so many at a time that their scores fit TILE numbers."""
    step = max(1, TILE // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    return [slice(start, start + step) for start in range(0, q.shape[2], step)]


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values once for each head of queries, for kernels that do not know of groups."""
    times = q.shape[1] // k.shape[1]
    return (k, v) if times == 1 else (k.repeat_interleave(times, 1), v.repeat_interleave(times, 1))


def _sum_of_groups(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(1, (heads, -1)).sum(2)
