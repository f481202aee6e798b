"""Attention of texts packed into rows: each by itself, where the host knows how long they are; or under one mask.

A mask of a row makes every kernel work through the square of the row, and shuts out the fastest. Text by text the work
is that of the texts, causal, without any mask. Letters: B rows, L tokens of a row, H heads, G of keys, d their width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from weft.math.packed_attention import Lengths, parts

PACKED = "weft_packed"  # transformers' name for this attention
PACKING = "weft_packing"  # under which layers hand on what is known of their rows
SHORT = 64  # tokens: shorter texts, on the mean, cost more as calls than under a mask
FEW = 4  # texts a row that are called one by one, however short


@dataclass
class Packing:
    """What attention must know of rows. texts: lengths; positions (B, L). Masks are made once for all layers."""

    texts: Lengths
    positions: Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def by_text(self, window: int | None) -> bool:
        """Whether texts are attended to one by one: they are long enough, and none is longer than the window."""
        if window is not None and any(length > window for row in self.texts for length in row):
            return False
        count = sum(map(len, self.texts))
        return count <= FEW * len(self.texts) or sum(map(sum, self.texts)) >= SHORT * count

    def mask(self, window: int | None) -> Tensor:
        """Who sees whom, (B, 1, L, L) bool. window: how many tokens are seen, the own one among them."""
        if window not in self.masks:
            self.masks[window] = seen(self.positions, window)
        return self.masks[window]


def seen(positions: Tensor, window: int | None = None) -> Tensor:
    """(B, 1, L, L) bool of positions (B, L), of which a 0 begins a text."""
    text = (positions == 0).cumsum(1)
    places = torch.arange(positions.shape[1], device=positions.device)
    back = places[:, None] - places
    near = back >= 0 if window is None else (back >= 0) & (back < window)
    return ((text[:, :, None] == text[:, None]) & near)[:, None]


def register_packed() -> str:
    """Make the attention known to transformers, and tell its name."""
    AttentionInterface.register(PACKED, attend)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    return PACKED


def told(packing: Packing) -> dict[str, Any]:
    """What a decoder is asked with beside ids and positions. A mask of four dimensions goes through transformers as it
    is: nobody looks for texts on the device, which would wait for it."""
    marker = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packing.positions.device)
    return {PACKING: packing, "attention_mask": marker}


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    sliding_window: int | None = None, weft_packing: Packing | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """torch's sdpa as transformers calls attentions: q (B, H, L, d), k and v (B, G, L, d) -> (B, L, H, d)."""
    if weft_packing is None:
        options = {**kwargs, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale, dropout = kwargs.get("scaling"), kwargs.get("dropout", 0.0)
    if not weft_packing.by_text(sliding_window):
        mask = weft_packing.mask(sliding_window)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scale, dropout=dropout)
    grouped = query.shape[1] != key.shape[1]
    rows = []
    for places, lengths in parts(weft_packing.texts):
        own = (x[places].split(lengths, 2) for x in (query, key, value))
        found = [
            scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped)
            for q, k, v in zip(*own, strict=True)
        ]
        rows.append(joined([x.transpose(1, 2) for x in found], 1))
    return joined(rows, 0), None


def joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
