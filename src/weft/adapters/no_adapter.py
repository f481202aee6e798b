"""The `adapter: {kind: none}` section: no adapter, all parameters of the network itself are trained."""

from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Self

from pydantic import model_validator

from weft.adapters.recipe import Earlier, Recipe
from weft.adapters.targets import Aliases, Matched, Shapes, TargetReport
from weft.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from weft.adapters.named import Carrier


class NoAdapter(Recipe):
    """Full fine-tuning of an encoder: the network stays the plain object of transformers, and nothing is wrapped.

    It costs the gradient and the optimizer's moments of every weight, and there is no base to go back to. What is
    written is a whole model folder, which is a family.source again.
    """

    formats: ClassVar[tuple[str, ...]] = ("transformers",)
    has_base: ClassVar[bool] = False

    kind: Literal["none"] = "none"

    @model_validator(mode="after")
    def _has_no_files(self) -> Self:
        if self.start_from is not None:
            raise ValueError(
                "start_from: with kind none the whole model is trained, so an earlier one is where the run begins. "
                "Write it as family.source, or choose kind lora"
            )
        return self

    def refusal(self, medium: str) -> str | None:
        """Video and language models are trained by adapters alone."""
        if medium == "documents":
            return None
        return (
            f"kind none trains every weight, which is built for encoders, and this is a {medium} model, whose weights "
            "stay frozen here. Write adapter.kind=lora"
        )

    @property
    def scale(self) -> float:
        """There is none."""
        return 1.0

    def layers(self, network: "nn.Module") -> Shapes:
        """Every parameter, by its own name."""
        return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}

    def match(self, layers: Shapes, presets: Mapping[str, str], aliases: Aliases) -> TargetReport:
        """All of them; none is a layer with an adapter."""
        return TargetReport((Matched("(all parameters)", "network", tuple(layers)),), (), (), dict(layers))

    def trainable(self, report: TargetReport) -> int:
        """Numbers in all parameters."""
        return sum(prod(shape) for shape in report.shapes.values())

    def summary(self) -> str:
        """The recipe in some words, for a plan."""
        return "no adapter: all parameters of the network"

    def carrier(self) -> "Callable[..., Carrier]":
        """The network itself."""
        from weft.adapters.plain_network import PlainNetwork

        return PlainNetwork

    def first_values(
        self, chance: "Callable[[str], torch.Generator]", shapes: "Mapping[str, torch.Size]", layer: "nn.Module"
    ) -> "dict[str, Tensor]":
        """Nobody asks: the network has its values."""
        raise TypeError("a network that is trained itself begins as it is")

    def exported(self, tensors: "Mapping[str, Tensor]") -> dict[str, Any]:
        """All weights under their own names."""
        return {"kind": "none", "tensors": dict(tensors), "rank": 0, "alpha": 0.0}

    def of_network(self, network: "nn.Module") -> dict[str, Any]:
        """Its config, with the classes that it has."""
        from weft.adapters.plain_network import described

        return {"config": described(network)}

    @classmethod
    def of(cls, earlier: Earlier, targets: tuple[str, ...]) -> Self:
        """Raises ConfigError: a file of it is a model."""
        cls._refuse()

    def differences(self, earlier: Earlier) -> list[str]:
        """Raises ConfigError: a file of it is a model."""
        self._refuse()

    @classmethod
    def _refuse(cls) -> NoReturn:
        raise ConfigError("adapter.kind: what kind none leaves is a whole model. Write its folder as family.source.")
