"""What stands in a rehearsal for what fake tensors cannot do: a GPU's kernels, and the other ranks of a sequence."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from weft.contracts import ModelFamily
from weft.engines.ring import Ring
from weft.engines.sequence import Ulysses
from weft.families.causal_lm import CausalLM
from weft.families.text_packed import PACKED
from weft.math.attention import Attention

MASKLESS = "weft_without_masks"
# Of each kind the kernel that keeps the same tensors for the backward pass.
TWINS = {"cross_entropy": "chunked", "rms_norm": "fused", "mlp": "fused", "rotary": "fused"}


def rehearsable(family: ModelFamily) -> ModelFamily:
    """The family on kernels that run on fake tensors and keep what the chosen ones keep."""
    if not isinstance(family, CausalLM):
        return family
    changes = {name: twin for name, twin in TWINS.items() if getattr(family.kernels, name) == "liger"}
    if by_flash(family):
        changes["attention"] = "auto"
    return family.model_copy(update={"kernels": family.kernels.model_copy(update=changes)}) if changes else family


def by_flash(family: ModelFamily) -> bool:
    """Whether attention is told where conversations begin by numbers, and no mask of all pairs of tokens exists."""
    return isinstance(family, CausalLM) and family.kernels.attention in ("flash", "flex")


def attend_without_masks(network: nn.Module) -> None:
    """Let a network attend by torch's sdpa as if each row were one conversation, which takes no mask."""
    assert isinstance(network, PreTrainedModel)
    if network.config._attn_implementation in ("sdpa", PACKED):
        AttentionInterface.register(MASKLESS, AttentionInterface()["sdpa"])
        AttentionMaskInterface.register(MASKLESS, lambda *args, **options: None)
        network.config._attn_implementation = MASKLESS


class OneOfSequence(Ring):
    """The first rank of a sequence group without the others: what it would be sent has the right shape and size, and
    is its own."""

    def __init__(self, size: int, method: str) -> None:
        self.rank, self.size, self.method = 0, size, method

    def by_heads(self, heads: int) -> bool:
        return self.method != "ring" and heads % self.size == 0

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        return torch.cat([x] * self.size, dim).narrow(dim, 0, length)

    def attend_unevenly(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
        goes_round = attention.plain and (self.method == "ring" or (self.method == "auto" and attention.seen is None))
        if not goes_round:
            kind = Ring if self.method == "ring" else Ulysses
            return kind.attend_unevenly(self, attention, q, k, v, lengths)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # on a ring the keys of one rank are there at a time
        return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    def _exchanged(self, x: Tensor) -> Tensor:
        return x.clone()

    def _all(self, x: Tensor) -> Tensor:
        return torch.stack([x] * self.size, 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OneOfSequence":
        return self
