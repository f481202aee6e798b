"""What stands in a rehearsal for what fake tensors cannot do: a GPU's kernels, and the other ranks of a sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from weft.contracts import ModelFamily
from weft.engines.ring import Masks, Ring, Travel, round_the_ring
from weft.engines.sequence import Ulysses
from weft.families.causal_lm import CausalLM
from weft.families.storage import PackedLinear
from weft.families.text_packed import PACKED
from weft.math.attention import Attention
from weft.math.float8 import Float8Kernel, by_hardware

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


@dataclass(frozen=True)
class OnHardware(Float8Kernel):
    """A product in fp8 that takes what a GPU's takes; a processor's emulation holds fp32 copies beside."""

    def scaled(
        self, a: Tensor, b: Tensor, of_rows: Tensor, of_columns: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return by_hardware(a, b, of_rows, of_columns, bias, dtype, rows=True)


def multiply_on_hardware(network: nn.Module) -> None:
    """Let a network on fake tensors multiply in fp8 as a GPU would."""
    for module in network.modules():
        if isinstance(module, PackedLinear) and isinstance(module.kernel, Float8Kernel):
            module.kernel = OnHardware(module.kernel.exact)


class _Arrived:
    """What came from the rank before, beside what was sent."""

    def __init__(self, parcel: Tensor) -> None:
        self.sent = parcel.contiguous()
        self.received = torch.empty_like(self.sent)

    def arrived(self) -> Tensor:
        return self.received


class _Seen(Masks):
    """Masks whose numbers nobody knows: some of each rank's keys are seen, and some are not."""

    def of(self, rank: int) -> tuple[bool, Tensor | None]:
        columns, real = self.ranks.places(self.lengths, self.device, rank)
        assert self.attention.seen is not None
        return True, self.attention.seen(self.rows, columns) & real

    def travel(self, parcel: Tensor) -> Travel:
        return _Arrived(parcel)


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
        if attention.seen is not None:
            scale = attention.scale if attention.scale is not None else q.shape[-1] ** -0.5
            return round_the_ring(q, k, v, _Seen(self, attention, lengths, q.device), scale)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # on a ring the keys of one rank are there at a time
        return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    def _exchanged(self, x: Tensor) -> Tensor:
        return x.clone()

    def _all(self, x: Tensor) -> Tensor:
        return torch.stack([x] * self.size, 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OneOfSequence":
        return self
