"""The `adapter: {kind: loha}` section: a change that is the product, number by number, of two low-rank ones."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from weft.adapters.recipe import Earlier, WholeChange
from weft.adapters.targets import TargetReport

if TYPE_CHECKING:
    import torch
    from peft import LoHaConfig
    from torch import Tensor, nn


class LoHa(WholeChange):
    """W + scale (w1_a w1_b) * (w2_a w2_b), of rank up to rank^2. Hyeon-Woo et al. 2021, arXiv:2108.06098, section 2.2.

    Carried by PEFT. The whole change (out, in) is made anew in every call, which costs memory that LoRA does not.
    """

    tensors: ClassVar[tuple[str, ...]] = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    formats: ClassVar[tuple[str, ...]] = ("peft", "comfyui", "musubi")

    kind: Literal["loha"] = "loha"
    rank: int = Field(default=8, ge=1, description="inner width of each of the two factors; the change has rank^2")

    def trainable(self, report: TargetReport) -> int:
        """Parameters of one adapter on the layers of a report."""
        return report.total(lambda out, fan_in: 2 * self.rank * (out + fan_in))

    def summary(self) -> str:
        """The recipe in some words, for a plan."""
        return f"LoHa scale {self.scale:g} (rank {self.rank})"

    def peft_config(self, layers: "Mapping[str, nn.Module]") -> "LoHaConfig":
        """The recipe in PEFT's words for exactly these layers."""
        from peft import LoHaConfig

        return LoHaConfig(
            r=self.rank,
            alpha=self.strength,  # pyright: ignore[reportArgumentType]  # annotated int, used as a float
            rank_dropout=0.0,
            module_dropout=0.0,
            target_modules=list(layers),
            init_weights=True,
        )

    def first_values(
        self, chance: "Callable[[str], torch.Generator]", shapes: "Mapping[str, torch.Size]", layer: "nn.Module"
    ) -> "dict[str, Tensor]":
        """All random but w2_b, which is zero."""
        from weft.adapters.initial import kaiming_but

        return kaiming_but(".hada_w2_b", chance, shapes)

    def exported(self, tensors: "Mapping[str, Tensor]") -> dict[str, Any]:
        """The fields of a SavedAdapter that the kind decides."""
        return {"kind": "loha", "tensors": dict(tensors), "rank": self.rank, "alpha": self.strength}

    @classmethod
    def of(cls, earlier: Earlier, targets: tuple[str, ...]) -> Self:
        """The recipe under which an adapter from a file is applied."""
        return cls(rank=earlier.rank, alpha=earlier.alpha, targets=targets)

    def differences(self, earlier: Earlier) -> list[str]:
        """Why weights from a file cannot be continued."""
        if earlier.kind != self.kind:
            return [f"adapter.kind={earlier.kind}"]
        return [] if earlier.rank == self.rank else [f"adapter.rank={earlier.rank}"]
