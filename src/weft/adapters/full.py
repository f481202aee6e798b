"""The `adapter: {kind: full}` section: a whole matrix of its own beside the weight of each layer."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Self

from pydantic import Field, model_validator

from weft.adapters.recipe import Earlier, OnLayers
from weft.adapters.targets import Aliases, Shapes, TargetReport, match_targets
from weft.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from weft.adapters.hooked import Change, HookedAdapters

NO_FILES = (
    "kind full is for roles that are not exported, such as roles.critic.adapter, for no file format here holds it. "
    "Write adapter.kind=lora"
)


class FullChange(OnLayers):
    """W + D, D of any rank and beginning at zero: what full fine-tuning can learn, on a base that stays.

    D is kept in fp32 beside W, so it costs four bytes a weight, and its gradient and AdamW's moments twelve more. Its
    answer is added to that of the layer, whose own weight may be packed.
    """

    formats: ClassVar[tuple[str, ...]] = ()

    kind: Literal["full"] = "full"
    bias: bool = Field(default=True, description="also a change of the bias, of layers that have one")

    @model_validator(mode="after")
    def _has_no_files(self) -> Self:
        if self.start_from is not None:
            raise ValueError(f"start_from: {NO_FILES}, or leave start_from out")
        return self

    @property
    def scale(self) -> float:
        """D has none."""
        return 1.0

    def carrier(self) -> "type[HookedAdapters]":
        """Hooks of ours."""
        from weft.adapters.hooked import HookedAdapters

        return HookedAdapters

    def layers(self, network: "nn.Module") -> Shapes:
        """Linear layers and convolutions, and the biases that are changed."""
        from weft.adapters.modules import biases_of, layers_of

        return {**layers_of(network), **(biases_of(network) if self.bias else {})}

    def match(self, layers: Shapes, presets: Mapping[str, str], aliases: Aliases) -> TargetReport:
        """Which layers are adapted, convolutions too where they are named, and their biases."""
        weights = {path: shape for path, shape in layers.items() if len(shape) > 1}
        report = match_targets(self.patterns, self.exclude, weights, presets, aliases)
        biases = {path: shape for path, shape in layers.items() if path.removesuffix(".bias") in report.shapes}
        return replace(report, biases={path: shape for path, shape in biases.items() if len(shape) == 1})

    def trainable(self, report: TargetReport) -> int:
        """Parameters of one adapter on the layers of a report."""
        return sum(prod(shape) for shape in [*report.shapes.values(), *report.biases.values()])

    def summary(self) -> str:
        """The recipe in some words, for a plan."""
        return f"full rank{', biases too' if self.bias else ''}"

    def change(self, layer: "nn.Module") -> "Change":
        """What one adapter is on one layer."""
        from weft.adapters.full_rank import FullRank

        return FullRank(layer, self.bias)

    def first_values(
        self, chance: "Callable[[str], torch.Generator]", shapes: "Mapping[str, torch.Size]", layer: "nn.Module"
    ) -> "dict[str, Tensor]":
        """Zero: the base."""
        import torch

        return {end: torch.zeros(shape) for end, shape in shapes.items()}

    def exported(self, tensors: "Mapping[str, Tensor]") -> dict[str, Any]:
        """Raises ConfigError: there is no format for it."""
        self._refuse()

    @classmethod
    def of(cls, earlier: Earlier, targets: tuple[str, ...]) -> Self:
        """Raises ConfigError: there is no format for it."""
        cls._refuse()

    def differences(self, earlier: Earlier) -> list[str]:
        """Raises ConfigError: there is no format for it."""
        self._refuse()

    @classmethod
    def _refuse(cls) -> NoReturn:
        raise ConfigError(f"adapter.kind: {NO_FILES}.")
