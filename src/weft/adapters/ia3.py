"""The `adapter: {kind: ia3}` section: activations are scaled by learned vectors."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from weft.adapters.recipe import Earlier, OnLayers
from weft.adapters.targets import TargetReport

if TYPE_CHECKING:
    import torch
    from peft import IA3Config
    from torch import Tensor, nn

VECTOR = ".ia3_l"


class Ia3(OnLayers):
    """(IA)^3: a number for each output of a layer, or for each input where a layer narrows (the second one of a feed-
    forward block), with which it is multiplied. Liu et al. 2022, arXiv:2205.05638, section 3.3. Carried by PEFT."""

    tensors: ClassVar[tuple[str, ...]] = ("ia3_l",)

    kind: Literal["ia3"] = "ia3"
    targets: str | tuple[str, ...] = Field(
        default="ia3",
        description="target sets of the family, layer names such as value, or regexes on whole paths; ia3: keys, "
        "values and the second layer of each feed-forward block",
    )

    def refusal(self, medium: str) -> str | None:
        """Measured and written for encoders alone."""
        if medium == "documents":
            return None
        return f"kind ia3 is built for encoders, and this is a {medium} model. Write adapter.kind=lora"

    @property
    def scale(self) -> float:
        """A vector of ones is the base; there is no other strength."""
        return 1.0

    def trainable(self, report: TargetReport) -> int:
        """Parameters of one adapter on the layers of a report."""
        return report.total(lambda out, fan_in: fan_in if narrows(out, fan_in) else out)

    def summary(self) -> str:
        """The recipe in some words, for a plan."""
        return "(IA)^3, a vector for each layer"

    def check_layers(self, layers: "Mapping[str, nn.Module]") -> None:
        """Raises ModelError for a layer whose weight is packed."""
        from weft.adapters.modules import refuse_packed

        refuse_packed(self.kind, layers)

    def peft_config(self, layers: "Mapping[str, nn.Module]") -> "IA3Config":
        """The recipe in PEFT's words for exactly these layers."""
        from peft import IA3Config

        from weft.adapters.modules import linears_at

        shapes = linears_at(layers)
        inner = [path for path, shape in shapes.items() if narrows(*shape)]
        return IA3Config(target_modules=list(layers), feedforward_modules=inner, init_ia3_weights=True)

    def first_values(
        self, chance: "Callable[[str], torch.Generator]", shapes: "Mapping[str, torch.Size]", layer: "nn.Module"
    ) -> "dict[str, Tensor]":
        """Ones: the base."""
        import torch

        return {end: torch.ones(shape) for end, shape in shapes.items()}

    def exported(self, tensors: "Mapping[str, Tensor]") -> dict[str, Any]:
        """The fields of a SavedAdapter that the kind decides; a vector along the inputs is a row."""
        inner = [key.removesuffix(VECTOR) for key, tensor in tensors.items() if tensor.shape[0] == 1]
        options = {"feedforward_modules": inner}
        return {"kind": "ia3", "tensors": dict(tensors), "rank": 0, "alpha": 0.0, "options": options}

    @classmethod
    def of(cls, earlier: Earlier, targets: tuple[str, ...]) -> Self:
        """The recipe under which an adapter from a file is applied."""
        return cls(targets=targets)

    def differences(self, earlier: Earlier) -> list[str]:
        """Why weights from a file cannot be continued."""
        return [] if earlier.kind == self.kind else [f"adapter.kind={earlier.kind}"]


def narrows(out: int, fan_in: int) -> bool:
    """Whether a layer has fewer outputs than inputs, of which then the inputs are scaled."""
    return out < fan_in
