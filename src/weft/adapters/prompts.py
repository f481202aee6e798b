"""The `adapter: {kind: prompt | p-tuning | prefix}` sections: virtual tokens are learned, and the network stays."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from weft.adapters.recipe import Earlier, Recipe
from weft.adapters.targets import Aliases, Matched, Shapes, TargetReport

if TYPE_CHECKING:
    import torch
    from peft import PromptLearningConfig
    from torch import Tensor, nn

    from weft.adapters.hf_prompts import Sizes
    from weft.adapters.named import Carrier


class SoftPrompt(Recipe):
    """A base of recipes whose adapter are virtual tokens, made by PEFT's own modules. They stand before every document
    and take their places of its context."""

    holds: ClassVar[tuple[str, ...]] = ()  # kinds of files that it can go on from

    tokens: int = Field(default=20, ge=1, description="virtual tokens; a document may be so many shorter")

    @property
    def virtual_tokens(self) -> int:
        """Places of the context that it takes away from documents."""
        return self.tokens

    def refusal(self, medium: str) -> str | None:
        """Only encoders are asked with virtual tokens."""
        if medium == "documents":
            return None
        return (
            f"kind {self.kind} puts virtual tokens before a document, which is built for encoders, and this is a "
            f"{medium} model. Write adapter.kind=lora"
        )

    @property
    def scale(self) -> float:
        """There is none."""
        return 1.0

    @abstractmethod
    def encoder_config(self, sizes: "Sizes") -> "PromptLearningConfig":
        """The recipe in PEFT's words for a network of these sizes, every value given."""

    def layers(self, network: "nn.Module") -> Shapes:
        """The tensors that are trained, by their canonical names. Raises ConfigError for a network that cannot be asked
        so."""
        from weft.adapters.hf_prompts import shapes_on

        return shapes_on(self, network)

    def match(self, layers: Shapes, presets: Mapping[str, str], aliases: Aliases) -> TargetReport:
        """No layer has an adapter."""
        return TargetReport((Matched(f"({self.tokens} virtual tokens)", "input", tuple(layers)),), (), (), dict(layers))

    def trainable(self, report: TargetReport) -> int:
        """Parameters of what makes the virtual tokens."""
        return sum(prod(shape) for shape in report.shapes.values())

    def carrier(self) -> "Callable[..., Carrier]":
        """Hooks that put virtual tokens before what the network is asked."""
        from weft.adapters.hf_prompts import SoftPrompts

        return SoftPrompts

    def first_values(
        self, chance: "Callable[[str], torch.Generator]", shapes: "Mapping[str, torch.Size]", layer: "nn.Module"
    ) -> "dict[str, Tensor]":
        """Nobody asks: they are those of PEFT's modules."""
        raise TypeError("virtual tokens stand on no layer")

    def exported(self, tensors: "Mapping[str, Tensor]") -> dict[str, Any]:
        """The virtual tokens themselves, whatever makes them."""
        from weft.adapters.hf_prompts import embeddings
        from weft.adapters.modules import EMBEDDING

        return {"kind": self.kind, "tensors": {EMBEDDING: embeddings(self, tensors)}, "rank": 0, "alpha": 0.0}

    def of_network(self, network: "nn.Module") -> dict[str, Any]:
        """How many virtual tokens there are, and of which sizes."""
        from weft.adapters.hf_prompts import sizes_of

        return {"num_virtual_tokens": self.tokens, **sizes_of(self, network).fields()}

    @classmethod
    def of(cls, earlier: Earlier, targets: tuple[str, ...]) -> Self:
        """The recipe under which an adapter from a file is applied."""
        return cls(tokens=int(earlier.options["num_virtual_tokens"]))

    def differences(self, earlier: Earlier) -> list[str]:
        """Why weights from a file cannot be continued."""
        if earlier.kind not in self.holds:
            return [f"adapter.kind={'prompt' if earlier.kind == 'p-tuning' else earlier.kind}"]
        count = int(earlier.options["num_virtual_tokens"])
        return [] if count == self.tokens else [f"adapter.tokens={count}"]


class Prompt(SoftPrompt):
    """Virtual tokens at the input, each an embedding that is learned. Lester et al. 2021, arXiv:2104.08691. It goes on
    from files of p-tuning too, which hold the same."""

    holds: ClassVar[tuple[str, ...]] = ("prompt", "p-tuning")

    kind: Literal["prompt"] = "prompt"
    init: Literal["vocabulary", "random"] = Field(
        default="vocabulary", description="first values: embeddings of words drawn from the vocabulary, or N(0, 1)"
    )

    def encoder_config(self, sizes: "Sizes") -> "PromptLearningConfig":
        from peft import PromptTuningConfig
        from peft.tuners.prompt_tuning import PromptTuningInit

        start = PromptTuningInit.SAMPLE_VOCAB if self.init == "vocabulary" else PromptTuningInit.RANDOM
        return PromptTuningConfig(num_virtual_tokens=self.tokens, prompt_tuning_init=start, **sizes.fields())

    def summary(self) -> str:
        """The recipe in some words, for a plan."""
        return f"prompt of {self.tokens} virtual tokens"


class PTuning(SoftPrompt):
    """Virtual tokens at the input, made by a small network. Liu et al. 2021, arXiv:2103.10385. Files hold what it made,
    and not the network: from them only kind prompt goes on."""

    kind: Literal["p-tuning"] = "p-tuning"
    network: Literal["mlp", "lstm"] = Field(
        default="mlp", description="what makes the tokens: three layers, or an LSTM in both directions and two layers"
    )
    hidden: int | None = Field(
        default=None, ge=1, description="width inside that network; null: as wide as the model's embeddings"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="between the layers of an LSTM; it has two")

    @model_validator(mode="after")
    def _begins_anew(self) -> Self:
        if self.start_from is not None:
            raise ValueError(
                "start_from: a file holds the virtual tokens and not the network that made them, so p-tuning cannot go "
                "on. Write adapter.kind=prompt, which goes on from such a file"
            )
        if self.dropout and self.network == "mlp":
            raise ValueError("dropout is one of an LSTM, and network is mlp. Leave it out, or write network: lstm")
        return self

    @property
    def drops(self) -> bool:
        """Whether a dropout acts in training."""
        return self.dropout > 0

    def encoder_config(self, sizes: "Sizes") -> "PromptLearningConfig":
        from peft import PromptEncoderConfig
        from peft.tuners.p_tuning import PromptEncoderReparameterizationType as Makes

        return PromptEncoderConfig(
            num_virtual_tokens=self.tokens,
            encoder_reparameterization_type=Makes.MLP if self.network == "mlp" else Makes.LSTM,
            encoder_hidden_size=self.hidden or sizes.width,
            encoder_num_layers=2,
            encoder_dropout=self.dropout,
            **sizes.fields(),
        )

    def summary(self) -> str:
        """The recipe in some words, for a plan."""
        return f"p-tuning of {self.tokens} virtual tokens by an {self.network.upper()}"


class Prefix(SoftPrompt):
    """Keys and values before those of the document in every layer. Li and Liang 2021, arXiv:2101.00190. Only for
    networks that take keys and values from outside."""

    holds: ClassVar[tuple[str, ...]] = ("prefix",)
    recompute: ClassVar[str | None] = (
        "kind prefix hands every layer a store of keys and values, which a second computation would fill twice"
    )

    kind: Literal["prefix"] = "prefix"
    projection: bool = Field(
        default=False, description="make keys and values by a small network while training; files hold what it made"
    )
    hidden: int | None = Field(
        default=None, ge=1, description="width inside that network; null: as wide as the model. Needs projection"
    )

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.hidden and not self.projection:
            raise ValueError("hidden is the width of projection's network, and projection is false. Give both, or none")
        if self.projection and self.start_from is not None:
            raise ValueError(
                "start_from: a file holds keys and values and not the network that made them. Write projection: false"
            )
        return self

    def encoder_config(self, sizes: "Sizes") -> "PromptLearningConfig":
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            num_virtual_tokens=self.tokens,
            prefix_projection=self.projection,
            encoder_hidden_size=self.hidden or sizes.width,
            **sizes.fields(),
        )

    def summary(self) -> str:
        """The recipe in some words, for a plan."""
        return f"prefix of {self.tokens} virtual tokens{', projected' if self.projection else ''}"
