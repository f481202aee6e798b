"""The `adapter: {kind: lora}` section: what is trained, how strongly it counts, and which backend carries it."""

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from weft.adapters.targets import TargetReport, match_targets
from weft.section import Section

if TYPE_CHECKING:
    from torch import nn

    from weft.adapters.named import NamedAdapters


class Lora(Section):
    """LoRA on linear layers: W + scale B A. Hu et al. 2021, arXiv:2106.09685.

    The four dropouts act in training only and are not exchangeable: `input_dropout` is PEFT's lora_dropout,
    `activation_dropout` is musubi's network_dropout.
    """

    kind: Literal["lora"] = "lora"
    backend: Literal["peft", "native"] = Field(
        default="peft", description="who carries the weights: same parameters, same files; native has less overhead"
    )
    rank: int = Field(default=16, ge=1, description="inner width of the change B A")
    alpha: float | None = Field(
        default=None, gt=0, description="scale is alpha / rank, with rslora alpha / sqrt(rank); null: alpha is the rank"
    )
    targets: str | tuple[str, ...] = Field(
        default="attention",
        description="target sets of the family, layer names such as attn1.to_q, or regexes on whole paths",
    )
    exclude: tuple[str, ...] = Field(default=(), description="what is taken away from targets, in the same language")
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank); arXiv:2312.03732")
    dora: bool = Field(
        default=False, description="train the magnitude of each output beside its direction; arXiv:2402.09353"
    )
    input_dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the input of A; PEFT's lora_dropout")
    activation_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="dropout on the rank activations, between A and B; musubi's network_dropout",
    )
    rank_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout of whole ranks of an item, the same for all of its tokens"
    )
    module_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="chance that a layer's whole change is left out of a call; the rest is not rescaled",
    )
    lora_plus: float = Field(
        default=1.0, gt=0, description="learning rate of B over that of A; arXiv:2402.12354 advises 16"
    )
    max_norm: float | None = Field(
        default=None, gt=0, description="upper limit of ||scale B A||_F of each layer, held after every optimizer step"
    )
    start_from: Path | None = Field(default=None, description="an adapter folder or file whose weights are continued")

    @field_validator("targets", "exclude")
    @classmethod
    def _are_names(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        patterns = (value,) if isinstance(value, str) else value
        if any(not pattern.strip() for pattern in patterns):
            raise ValueError("a pattern is empty. Name a target set such as 'attention', or layers such as attn1.to_q")
        return value

    @model_validator(mode="after")
    def _is_possible(self) -> "Lora":
        if not self.targets:
            raise ValueError("targets is empty, so nothing would be trained. Name a target set such as 'attention'")
        if self.dora:
            refused = {
                "activation_dropout": self.activation_dropout,
                "rank_dropout": self.rank_dropout,
                "module_dropout": self.module_dropout,
                "max_norm": self.max_norm,
            }
            given = [name for name, value in refused.items() if value]
            if given:
                raise ValueError(
                    f"dora does not go with {', '.join(given)}: DoRA measures the norm of W + scale B A, which these "
                    "would alter. Use input_dropout, or set dora: false"
                )
        return self

    @property
    def strength(self) -> float:
        """Alpha as a number: what was given, or the rank."""
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """The factor before B A."""
        return self.strength / (sqrt(self.rank) if self.rslora else self.rank)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Targets as a tuple, also when one was given as a word."""
        return (self.targets,) if isinstance(self.targets, str) else self.targets

    def match(
        self, linears: Mapping[str, tuple[int, int]], presets: Mapping[str, str], aliases: Mapping[str, str]
    ) -> TargetReport:
        """Which linear layers (path -> (out, in)) are adapted. Raises ConfigError for a pattern without a layer."""
        return match_targets(self.patterns, self.exclude, linears, presets, aliases)

    def lr_factor(self, parameter_name: str) -> float:
        """What the learning rate is multiplied with for one canonical parameter name. LoRA+, arXiv:2402.12354."""
        return self.lora_plus if parameter_name.endswith(".lora_B.weight") else 1.0

    def attach(self, network: "nn.Module", paths: Sequence[str], names: Sequence[str], seed: int) -> "NamedAdapters":
        """Put fresh adapters on the layers at paths, one set for each name, and freeze everything else."""
        if self.backend == "native":
            from weft.adapters.native import NativeAdapters

            return NativeAdapters(self, network, paths, names, seed)
        from weft.adapters.hf_peft import PeftAdapters

        return PeftAdapters(self, network, paths, names, seed)
