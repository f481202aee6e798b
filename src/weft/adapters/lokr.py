"""The `adapter: {kind: lokr}` section: a change that is the Kronecker product of a small and a large matrix."""

from collections.abc import Callable, Mapping
from math import isqrt
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator

from weft.adapters.recipe import Earlier, WholeChange
from weft.adapters.targets import TargetReport

if TYPE_CHECKING:
    import torch
    from peft import LoKrConfig
    from torch import Tensor, nn


class LoKr(WholeChange):
    """W + scale (w1 kron w2), w2 of low rank. Edalati et al. 2022, arXiv:2212.10650; Yeh et al. 2023, arXiv:2309.14859.

    Carried by PEFT. The whole change (out, in) is made anew in every call, which costs memory that LoRA does not.
    """

    tensors: ClassVar[tuple[str, ...]] = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    formats: ClassVar[tuple[str, ...]] = ("peft", "comfyui", "musubi")

    kind: Literal["lokr"] = "lokr"
    rank: int = Field(
        default=8, ge=1, description="inner width of w2; w2 is whole where half its longer side is no more than this"
    )
    factor: int = Field(
        default=-1,
        ge=-1,
        description="sides of w1, where they divide those of a layer; else the largest divisors below; -1: the root",
    )
    decompose_both: bool = Field(default=False, description="w1 of low rank too, where that makes it smaller")

    @field_validator("factor")
    @classmethod
    def _divides(cls, value: int) -> int:
        if value == 0:
            raise ValueError("factor is 0, which divides nothing. Write -1 for the root, or a number such as 8")
        return value

    def trainable(self, report: TargetReport) -> int:
        """Parameters of one adapter on the layers of a report."""
        return report.total(self._parameters)

    def _parameters(self, out: int, fan_in: int) -> int:
        small_out, large_out = sides(out, self.factor)
        small_in, large_in = sides(fan_in, self.factor)
        w1, w2 = small_out * small_in, large_out * large_in
        if self.decompose_both and self.rank < max(small_out, small_in) / 2:
            w1 = self.rank * (small_out + small_in)
        if self.rank < max(large_out, large_in) / 2:
            w2 = self.rank * (large_out + large_in)
        return w1 + w2

    def summary(self) -> str:
        """The recipe in some words, for a plan."""
        return f"LoKr scale {self.scale:g} (rank {self.rank}, factor {self.factor})"

    def peft_config(self, layers: "Mapping[str, nn.Module]") -> "LoKrConfig":
        """The recipe in PEFT's words for exactly these layers."""
        from peft import LoKrConfig

        return LoKrConfig(
            r=self.rank,
            alpha=self.strength,  # pyright: ignore[reportArgumentType]  # annotated int, used as a float
            rank_dropout=0.0,
            module_dropout=0.0,
            decompose_both=self.decompose_both,
            decompose_factor=self.factor,
            target_modules=list(layers),
            init_weights=True,
        )

    def first_values(
        self, chance: "Callable[[str], torch.Generator]", shapes: "Mapping[str, torch.Size]", layer: "nn.Module"
    ) -> "dict[str, Tensor]":
        """All random but w1 or its first factor, which is zero."""
        from weft.adapters.initial import kaiming_but

        return kaiming_but(".lokr_w1" if ".lokr_w1" in shapes else ".lokr_w1_a", chance, shapes)

    def exported(self, tensors: "Mapping[str, Tensor]") -> dict[str, Any]:
        """The fields of a SavedAdapter that the kind decides."""
        options = {"decompose_factor": self.factor, "decompose_both": self.decompose_both}
        return {"kind": "lokr", "tensors": dict(tensors), "rank": self.rank, "alpha": self.strength, "options": options}

    @classmethod
    def of(cls, earlier: Earlier, targets: tuple[str, ...]) -> Self:
        """The recipe under which an adapter from a file is applied."""
        return cls(rank=earlier.rank, alpha=earlier.alpha, targets=targets, **_fields(earlier))

    def differences(self, earlier: Earlier) -> list[str]:
        """Why weights from a file cannot be continued."""
        if earlier.kind != self.kind:
            return [f"adapter.kind={earlier.kind}"]
        theirs = {"rank": earlier.rank, **_fields(earlier)}
        return [f"adapter.{k}={str(value).lower()}" for k, value in theirs.items() if getattr(self, k) != value]


def sides(length: int, factor: int) -> tuple[int, int]:
    """How a side of a layer is divided between w1 and w2: by the factor where it can be, else the largest divisor that
    is no more than the factor and the root; -1: the root alone. PEFT's rule."""
    if factor > 0 and length % factor == 0:
        return factor, length // factor
    limit = isqrt(length) if factor < 0 else min(isqrt(length), factor)
    small = next(d for d in range(limit, 0, -1) if length % d == 0)
    return small, length // small


def _fields(earlier: Earlier) -> dict[str, Any]:
    return {
        "factor": int(earlier.options.get("decompose_factor", -1)),
        "decompose_both": bool(earlier.options.get("decompose_both", False)),
    }
