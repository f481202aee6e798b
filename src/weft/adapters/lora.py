"""The `adapter: {kind: lora}` section: what is trained, how strongly it counts, and which backend carries it."""

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from weft.adapters.recipe import Earlier, OnLayers
from weft.adapters.targets import Aliases, Shapes, TargetReport, match_targets
from weft.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import Tensor, nn

    from weft.adapters.fused import Factors
    from weft.adapters.hooked import Change
    from weft.adapters.named import Carrier


class Lora(OnLayers):
    """LoRA on linear layers: W + scale B A. Hu et al. 2021, arXiv:2106.09685.

    The four dropouts act in training only and are not exchangeable: `input_dropout` is PEFT's lora_dropout,
    `activation_dropout` is musubi's network_dropout.
    """

    tensors: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_magnitude_vector")
    formats: ClassVar[tuple[str, ...]] = ("peft", "diffusers", "comfyui", "musubi", "videox-fun", "original")
    keeps_dtype: ClassVar[bool] = True

    kind: Literal["lora"] = "lora"
    backend: Literal["peft", "native"] = Field(
        default="peft", description="who carries the weights: same parameters, same files; native has less overhead"
    )
    fused: bool = Field(
        default=True,
        description="multiply with a plain LoRA in fewer passes and keep its input once; equal to rounding. false: as "
        "the backend does it, slower and with more memory",
    )
    rank: int = Field(default=16, ge=1, description="inner width of the change B A")
    alpha: float | None = Field(
        default=None, gt=0, description="scale is alpha / rank, with rslora alpha / sqrt(rank); null: alpha is the rank"
    )
    conv_rank: int | None = Field(
        default=None,
        ge=1,
        description="rank on the convolutions that targets name, such as patch_embedding; null: none",
    )
    conv_alpha: float | None = Field(default=None, gt=0, description="alpha of conv_rank; null: it is conv_rank")
    init: Literal["kaiming", "pissa"] = Field(
        default="kaiming",
        description="first weights: no change with a random A, or the principal part of the base's own weights, which "
        "is then trained; arXiv:2404.02948",
    )
    pissa_iterations: int | None = Field(
        default=16, ge=1, description="power iterations of PiSSA's fast decomposition; null: the exact one, slow"
    )
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
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none",
        description="of an encoder, which of its own biases are trained too: all of the network's, or those of the "
        "adapted layers; they come with the adapter's files, and fused does not apply to it",
    )
    max_norm: float | None = Field(
        default=None, gt=0, description="upper limit of ||scale B A||_F of each layer, held after every optimizer step"
    )

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        dropouts = ("input_dropout", "activation_dropout", "rank_dropout", "module_dropout")
        self._refuse_beside("dora", self.dora, (*dropouts[1:], "max_norm", "conv_rank"),
                            "DoRA measures the norm of W + scale B A, which these would alter. Use input_dropout, or "
                            "set dora: false")  # fmt: skip
        self._refuse_beside("init: pissa", self.init == "pissa", (*dropouts, "max_norm", "dora", "start_from"),
                            "PiSSA trains a part of the base's own weights, which must begin whole. Set init: "
                            "kaiming")  # fmt: skip
        if self.conv_alpha and not self.conv_rank:
            raise ValueError("conv_alpha has no meaning without conv_rank. Give both, or neither")
        return self

    def _refuse_beside(self, what: str, chosen: bool, others: Sequence[str], reason: str) -> None:
        given = [name for name in others if getattr(self, name)]
        if chosen and given:
            raise ValueError(f"{what} does not go with {', '.join(given)}: {reason}")

    @property
    def is_plain(self) -> bool:
        """Whether its change of a linear layer is two factors and nothing else, but for dropouts, and is fused."""
        return self.fused and not self.dora and self.init == "kaiming" and self.bias == "none"

    @property
    def biases(self) -> str:
        """Which of the network's own biases are trained too."""
        return self.bias

    def refusal(self, medium: str) -> str | None:
        """A bias of the base cannot be trained where several adapters stand on it."""
        if self.bias == "none" or medium == "documents":
            return None
        return (
            f"bias {self.bias} trains biases of the model itself, which is built for encoders, and this is a {medium} "
            "model, on which several adapters may stand. Write adapter.bias=none"
        )

    @property
    def drops(self) -> bool:
        """Whether a dropout acts in training."""
        return bool(self.input_dropout or self.activation_dropout or self.rank_dropout or self.module_dropout)

    @property
    def strength(self) -> float:
        """Alpha as a number: what was given, or the rank."""
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """The factor before B A of linear layers."""
        return self._scale(self.strength, self.rank)

    @property
    def holders(self) -> tuple[str, ...]:
        """DoRA is applied as PEFT defines it in two alone, and musubi-tuner and VideoX-Fun load no convolutions."""
        if self.dora:
            return ("peft", "diffusers")
        return tuple(name for name in self.formats if not (self.conv_rank and name in ("musubi", "videox-fun")))

    @property
    def limit(self) -> str:
        """Which field keeps it from other formats."""
        if self.holders == self.formats:
            return ""
        return " (adapter.dora is true)" if self.dora else f" (adapter.conv_rank is {self.conv_rank})"

    @property
    def conv_scale(self) -> float | None:
        """The factor before B A of convolutions."""
        return self._scale(self.conv_alpha or self.conv_rank, self.conv_rank) if self.conv_rank else None

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (sqrt(rank) if self.rslora else rank)

    def width(self, convolution: bool) -> tuple[int, float]:
        """Rank and scale on a kind of layer."""
        if convolution:
            assert self.conv_rank and self.conv_scale, "a convolution is adapted only where conv_rank is given"
            return self.conv_rank, self.conv_scale
        return self.rank, self.scale

    def layers(self, network: "nn.Module") -> Shapes:
        """Linear layers and convolutions: `match` takes the latter only with conv_rank."""
        from weft.adapters.modules import layers_of

        return layers_of(network)

    def match(self, layers: Shapes, presets: Mapping[str, str], aliases: Aliases) -> TargetReport:
        """Which layers are adapted. Raises ConfigError for a pattern without a layer, or conv_rank without one."""
        if not self.conv_rank:
            self._refuse_convolutions(layers)
            return super().match(layers, presets, aliases)
        report = match_targets(self.patterns, self.exclude, layers, presets, aliases)
        if not report.convolutions:
            known = [path for path, shape in layers.items() if len(shape) > 2]
            advice = f"Add one to adapter.targets, such as '{known[0]}', or" if known else "This network has none:"
            raise ConfigError(f"adapter.conv_rank: no target is a convolution. {advice} leave conv_rank out.")
        return report

    def _refuse_convolutions(self, layers: Shapes) -> None:
        """Raises ConfigError for a target that names convolutions and nothing else."""
        for pattern in self.patterns:
            named = [shape for path, shape in layers.items() if path == pattern or path.endswith(f".{pattern}")]
            if named and all(len(shape) > 2 for shape in named):
                raise ConfigError(
                    f"adapter.targets: '{pattern}' is a convolution, and adapter.conv_rank is not given. "
                    "Write adapter.conv_rank=4, or leave it out."
                )

    def trainable(self, report: TargetReport) -> int:
        """Parameters of one adapter on the layers of a report."""
        return report.parameters(self.rank, self.dora, self.conv_rank or 0)

    def summary(self) -> str:
        """The recipe in some words, for a plan."""
        conv = f", convolutions {self.conv_scale:g} (rank {self.conv_rank})" if self.conv_rank else ""
        flags = "".join(f", {name}" for name in ("dora", "rslora") if getattr(self, name))
        start = ", PiSSA" if self.init == "pissa" else ""
        return f"LoRA scale {self.scale:g} (rank {self.rank}){conv}{flags}{start}, backend {self.backend}"

    def lr_factor(self, parameter_name: str) -> float:
        """What the learning rate is multiplied with for one canonical parameter name. LoRA+, arXiv:2402.12354."""
        return self.lora_plus if parameter_name.endswith(".lora_B.weight") else 1.0

    def carrier(self) -> "Callable[..., Carrier]":
        """Hooks of ours, or PEFT's wrappers."""
        from weft.adapters.hooked import HookedAdapters

        return HookedAdapters if self.backend == "native" else super().carrier()

    def check_layers(self, layers: "Mapping[str, nn.Module]") -> None:
        """Raises ModelError for a layer that cannot be adapted so."""
        if self.backend == "native" and self.dora:
            from weft.adapters.native import refuse_packed

            refuse_packed(layers)

    def change(self, layer: "nn.Module") -> "Change":
        """What one adapter is on one layer, where hooks carry it."""
        from weft.adapters.native import LowRank

        return LowRank(self, layer)

    def peft_config(self, layers: "Mapping[str, nn.Module]") -> "LoraConfig":
        """The recipe in PEFT's words for exactly these layers."""
        from weft.adapters.hf_lora import lora_config

        return lora_config(self, layers)

    def complete(self, wrappers: "Mapping[str, nn.Module]", name: str) -> None:
        """Three dropouts and PiSSA, which PEFT has not, or not on an untouched base."""
        from weft.adapters.hf_lora import complete

        complete(self, wrappers, name)

    def factors(self, wrapper: "nn.Module", name: str) -> "Factors | None":
        """A and B in PEFT's wrapper, of a plain LoRA on a linear layer."""
        from weft.adapters.hf_lora import factors_in

        return factors_in(wrapper, name) if self.is_plain else None

    def first_values(
        self, chance: "Callable[[str], torch.Generator]", shapes: "Mapping[str, torch.Size]", layer: "nn.Module"
    ) -> "dict[str, Tensor]":
        """A random and B zero, or with PiSSA the principal factors of W twice: once to train, once to take away."""
        from weft.adapters.low_rank import first_values

        return first_values(self, chance, shapes, layer)

    @property
    def has_rule(self) -> bool:
        return self.max_norm is not None

    def after_step(
        self, paths: Sequence[str], parameters: "Mapping[str, nn.Parameter]", moved: "Tensor | None" = None
    ) -> "Mapping[str, Tensor]":
        """Shrink every ||scale B A||_F above max_norm to it, half in A and half in B. Once per optimizer step."""
        from weft.adapters.low_rank import shrink

        return shrink(self, paths, parameters, moved)

    def exported(self, tensors: "Mapping[str, Tensor]") -> dict[str, Any]:
        """A plain LoRA. PiSSA's change B A - B0 A0 is one of twice the rank, on the untouched base."""
        facts = {"rank": self.rank, "alpha": self.strength, "rslora": self.rslora, "dora": self.dora,
                 "conv_rank": self.conv_rank, "conv_alpha": self.conv_alpha or self.conv_rank}  # fmt: skip
        if self.init != "pissa":
            return {"kind": "lora", "tensors": dict(tensors), **facts}
        from weft.adapters.low_rank import without_first

        facts |= {"rank": 2 * self.rank, "alpha": 2 * self.rank * self.scale, "rslora": False}
        if self.conv_rank and self.conv_scale:
            facts |= {"conv_rank": 2 * self.conv_rank, "conv_alpha": 2 * self.conv_rank * self.conv_scale}
        return {"kind": "lora", "tensors": without_first(tensors), **facts}

    @classmethod
    def of(cls, earlier: Earlier, targets: tuple[str, ...]) -> Self:
        """The recipe under which an adapter from a file is applied."""
        return cls(backend="native", rank=earlier.rank, alpha=earlier.alpha, rslora=earlier.rslora, dora=earlier.dora,
                   conv_rank=earlier.conv_rank, conv_alpha=earlier.conv_alpha, targets=targets)  # fmt: skip

    def differences(self, earlier: Earlier) -> list[str]:
        """Why weights from a file cannot be continued: another kind, rank, or no magnitudes. Scales are converted."""
        if earlier.kind != self.kind:
            return [f"adapter.kind={earlier.kind}"]
        pairs = (("rank", earlier.rank), ("dora", earlier.dora), ("conv_rank", earlier.conv_rank))
        wrong = [(name, value) for name, value in pairs if getattr(self, name) != value]
        return [f"adapter.{name}={str(value).lower() if value is not None else 'null'}" for name, value in wrong]
