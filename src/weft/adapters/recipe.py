"""What every `adapter:` section has in common: the layers that it stands on, how it begins, how it is saved."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from pydantic import Field, field_validator, model_validator

from weft.adapters.targets import Aliases, Shapes, TargetReport, match_targets
from weft.section import Section

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from torch import Tensor, nn

    from weft.adapters.fused import Factors
    from weft.adapters.hooked import Change
    from weft.adapters.named import Carrier, NamedAdapters


class Earlier(Protocol):
    """The facts of an adapter that was read from a file, as far as a recipe asks for them."""

    @property
    def kind(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def rslora(self) -> bool: ...
    @property
    def dora(self) -> bool: ...
    @property
    def conv_rank(self) -> int | None: ...
    @property
    def conv_alpha(self) -> float | None: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


class Recipe(Section):
    """A way to adapt layers. Subclasses are the sections that a config chooses by kind."""

    # Fields of PEFT's layer that hold its tensors, in the order of their canonical names.
    tensors: ClassVar[tuple[str, ...]] = ()
    formats: ClassVar[tuple[str, ...]] = ("peft",)  # that files of its kind can be written in
    keeps_dtype: ClassVar[bool] = False  # whether PEFT's wrapper answers in the dtype of the layer inside it
    has_base: ClassVar[bool] = True  # whether the network answers as it was where no adapter is in use
    inner: ClassVar[str | None] = None  # why it cannot be trained by an inner loop of fast weights, as a sentence
    recompute: ClassVar[str | None] = None  # why no block may be computed a second time, as a sentence

    kind: Any = None  # a subclass's own name, here for the first place among the keys
    start_from: Path | None = Field(default=None, description="an adapter folder or file whose weights are continued")

    def refusal(self, medium: str) -> str | None:
        """Why it cannot be trained on a model of this medium, as a sentence; None where it can."""
        return None

    @property
    def biases(self) -> str:
        """Which of the network's own biases are trained beside it, in PEFT's words: none, all or lora_only."""
        return "none"

    @property
    def virtual_tokens(self) -> int:
        """Places of the context that it takes away from documents."""
        return 0

    @property
    def holders(self) -> tuple[str, ...]:
        """Those of its formats that can hold it as it is set."""
        return self.formats

    @property
    def limit(self) -> str:
        """Which of its fields keeps it from the others, as an end of a sentence."""
        return ""

    @property
    @abstractmethod
    def scale(self) -> float:
        """The factor before the change; 1 where there is none."""

    @property
    def conv_scale(self) -> float | None:
        """The factor before the change of convolutions; None where they are not adapted."""
        return None

    def layers(self, network: "nn.Module") -> Shapes:
        """The layers of a network that can be adapted, for `match`."""
        from weft.adapters.modules import linears_of

        return linears_of(network)

    @abstractmethod
    def match(self, layers: Shapes, presets: Mapping[str, str], aliases: Aliases) -> TargetReport:
        """Which layers are adapted. Raises ConfigError for a pattern without a layer."""

    @abstractmethod
    def trainable(self, report: TargetReport) -> int:
        """Parameters of one adapter on the layers of a report."""

    @abstractmethod
    def summary(self) -> str:
        """The recipe in some words, for a plan."""

    def lr_factor(self, parameter_name: str) -> float:
        """What the learning rate is multiplied with for one canonical parameter name."""
        return 1.0

    def attach(self, network: "nn.Module", paths: Sequence[str], names: Sequence[str], seed: int) -> "NamedAdapters":
        """Put fresh adapters on the layers at paths, one set for each name, and freeze everything else."""
        from weft.adapters.attach import attach

        assert len(set(names)) == len(names), f"adapter names must differ: {list(names)}"
        return attach(network, {name: Standing(self, paths) for name in names}, seed)

    def carrier(self) -> "Callable[..., Carrier]":
        """What holds its adapters on a network: PEFT's wrappers, made of `peft_config`, hooks of ours, which ask for
        `change`, or what a kind of its own has."""
        from weft.adapters.hf_peft import PeftAdapters

        return PeftAdapters

    def change(self, layer: "nn.Module") -> "Change":
        """What one adapter is on one layer, where hooks carry it."""
        raise TypeError(f"{type(self).__name__} is carried by PEFT")

    def peft_config(self, layers: "Mapping[str, nn.Module]") -> "PeftConfig":
        """The recipe in PEFT's words for exactly these layers, every value given: PEFT's defaults are not ours."""
        raise TypeError(f"{type(self).__name__} is carried by hooks")

    def check_layers(self, layers: "Mapping[str, nn.Module]") -> None:
        """Raises ModelError for a layer that cannot be adapted so."""

    def complete(self, wrappers: "Mapping[str, nn.Module]", name: str) -> None:
        """Add to PEFT's fresh wrappers what the recipe asks for and PEFT has no word for."""

    def factors(self, wrapper: "nn.Module", name: str) -> "Factors | None":
        """A and B in PEFT's wrapper, where they are all that the adapter is, but for dropouts."""
        return None

    @property
    def drops(self) -> bool:
        """Whether a dropout acts in training."""
        return False

    @abstractmethod
    def first_values(
        self, chance: Callable[[str], "torch.Generator"], shapes: "Mapping[str, torch.Size]", layer: "nn.Module"
    ) -> "dict[str, Tensor]":
        """First values of one adapter on one layer, of tensors by the end of their names (".lora_A.weight").

        chance: a generator for each tensor, seeded for its place. Together they change nothing.
        """

    @property
    def has_rule(self) -> bool:
        """Whether something must hold after each optimizer step: see `after_step`."""
        return False

    def after_step(
        self, paths: Sequence[str], parameters: "Mapping[str, nn.Parameter]", moved: "Tensor | None" = None
    ) -> "Mapping[str, Tensor]":
        """What must hold after each optimizer step; numbers () worth logging, on the device. moved: () bool, whether
        that step moved anything; None: it did."""
        return {}

    @abstractmethod
    def exported(self, tensors: "Mapping[str, Tensor]") -> dict[str, Any]:
        """The state of an adapter as other programs apply it: those fields of a SavedAdapter that the kind decides."""

    def of_network(self, network: "nn.Module") -> dict[str, Any]:
        """What a file has to say of the network that it is for, among the options of a SavedAdapter."""
        return {}

    @classmethod
    @abstractmethod
    def of(cls, earlier: Earlier, targets: tuple[str, ...]) -> Self:
        """The recipe under which an adapter from a file is applied."""

    @abstractmethod
    def differences(self, earlier: Earlier) -> list[str]:
        """Why weights from a file cannot be continued, each as the assignment that would mend it."""


class OnLayers(Recipe):
    """A base of recipes that stand on layers which a config names."""

    targets: str | tuple[str, ...] = Field(
        default="attention",
        description="target sets of the family, layer names such as attn1.to_q, or regexes on whole paths",
    )
    exclude: tuple[str, ...] = Field(default=(), description="what is taken away from targets, in the same language")

    @field_validator("targets", "exclude")
    @classmethod
    def _are_names(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        patterns = (value,) if isinstance(value, str) else value
        if any(not pattern.strip() for pattern in patterns):
            raise ValueError("a pattern is empty. Name a target set such as 'attention', or layers such as attn1.to_q")
        return value

    @model_validator(mode="after")
    def _has_targets(self) -> Self:
        if not self.targets:
            raise ValueError("targets is empty, so nothing would be trained. Name a target set such as 'attention'")
        return self

    @property
    def patterns(self) -> tuple[str, ...]:
        """Targets as a tuple, also when one was given as a word."""
        return (self.targets,) if isinstance(self.targets, str) else self.targets

    def match(self, layers: Shapes, presets: Mapping[str, str], aliases: Aliases) -> TargetReport:
        """Which layers are adapted. Raises ConfigError for a pattern without a layer."""
        linears = {path: shape for path, shape in layers.items() if len(shape) == 2}
        return match_targets(self.patterns, self.exclude, linears, presets, aliases)


@dataclass(frozen=True)
class Standing:
    """A recipe, and the layers that it stands on. whole: paths of modules that are trained whole beside them."""

    recipe: Recipe
    paths: Sequence[str]
    whole: tuple[str, ...] = ()


class WholeChange(OnLayers):
    """A base of recipes whose change of a layer is made as a whole matrix in every call, by PEFT."""

    rank: int = Field(default=8, ge=1, description="inner width of the low-rank factors")
    alpha: float | None = Field(default=None, gt=0, description="scale is alpha / rank; null: alpha is the rank")

    @property
    def strength(self) -> float:
        """Alpha as a number: what was given, or the rank."""
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """The factor before the change."""
        return self.strength / self.rank

    def check_layers(self, layers: "Mapping[str, nn.Module]") -> None:
        """Raises ModelError for a layer whose weight is packed."""
        from weft.adapters.modules import refuse_packed

        refuse_packed(self.kind, layers)

    def complete(self, wrappers: "Mapping[str, nn.Module]", name: str) -> None:
        """Take from PEFT's layers a draw that nothing here asks for."""
        from weft.adapters.hf_peft import without_chance

        without_chance(wrappers)


def recipe_of(earlier: Earlier, targets: Sequence[str]) -> Recipe:
    """The recipe under which an adapter from a file is applied to the layers at paths."""
    from weft.adapters.loha import LoHa
    from weft.adapters.lokr import LoKr
    from weft.adapters.lora import Lora
    from weft.adapters.oft import Oft

    kinds: dict[str, type[Recipe]] = {"lora": Lora, "loha": LoHa, "lokr": LoKr, "oft": Oft}
    return kinds[earlier.kind].of(earlier, tuple(targets))
