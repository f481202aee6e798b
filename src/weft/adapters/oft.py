"""The `adapter: {kind: oft}` section: inputs of a layer are rotated, in blocks, by matrices that are learned."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from weft.adapters.recipe import Earlier, OnLayers
from weft.adapters.targets import Aliases, Shapes, TargetReport
from weft.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from peft import OFTConfig
    from torch import Tensor, nn

# The version of PEFT in which the series got its present form; its loader warns of files that do not name one as new.
SERIES_SINCE = "0.18.0"


class Oft(OnLayers):
    """W R with R orthogonal in blocks: lengths and angles of the rows of W stay. Qiu et al. 2023, arXiv:2306.07280.

    Carried by PEFT, which rotates inputs in place of weights (arXiv:2506.19847), so the base may be quantized. There is
    no scale and no strength: a rotation by zero is the base.
    """

    tensors: ClassVar[tuple[str, ...]] = ("oft_R",)

    kind: Literal["oft"] = "oft"
    block_size: int = Field(default=32, ge=2, description="inputs that are rotated together; must divide a layer's in")
    share_blocks: bool = Field(default=False, description="one rotation for all blocks of a layer")
    series: int | None = Field(
        default=5, ge=2, description="terms of the series in place of an inverse; null: the inverse, exact and slower"
    )

    @property
    def scale(self) -> float:
        """A rotation has none."""
        return 1.0

    def match(self, layers: Shapes, presets: Mapping[str, str], aliases: Aliases) -> TargetReport:
        """Which layers are adapted. Raises ConfigError for a pattern without a layer, or a layer of another width."""
        report = super().match(layers, presets, aliases)
        odd = {path: shape[1] for path, shape in report.shapes.items() if shape[1] % self.block_size}
        if odd:
            path, width = next(iter(odd.items()))
            fits = [d for d in range(2, width + 1) if all(shape[1] % d == 0 for shape in report.shapes.values())]
            near = sorted(fits, key=lambda size: abs(size - self.block_size))[:3]
            advice = f"Sizes that divide all: {', '.join(map(str, sorted(near)))}." if near else "Exclude it."
            raise ConfigError(
                f"adapter.block_size: {self.block_size} does not divide the {width} inputs of '{path}', nor those of "
                f"{len(odd) - 1} others. {advice}"
            )
        return report

    def trainable(self, report: TargetReport) -> int:
        """Parameters of one adapter on the layers of a report: of a block as many as it has planes."""
        planes = self.block_size * (self.block_size - 1) // 2
        return report.total(lambda out, fan_in: planes * (1 if self.share_blocks else fan_in // self.block_size))

    def summary(self) -> str:
        """The recipe in some words, for a plan."""
        return f"OFT in blocks of {self.block_size}{', shared' if self.share_blocks else ''}"

    def peft_config(self, layers: "Mapping[str, nn.Module]") -> "OFTConfig":
        """The recipe in PEFT's words for exactly these layers."""
        from peft import OFTConfig

        return OFTConfig(
            r=0, module_dropout=0.0, target_modules=list(layers), bias="none", init_weights=True, **self._options()
        )

    def _options(self) -> dict[str, Any]:
        return {
            "oft_block_size": self.block_size,
            "block_share": self.share_blocks,
            "use_cayley_neumann": self.series is not None,
            "num_cayley_neumann_terms": self.series or 5,
        }

    def first_values(
        self, chance: "Callable[[str], torch.Generator]", shapes: "Mapping[str, torch.Size]", layer: "nn.Module"
    ) -> "dict[str, Tensor]":
        """Angles of zero: the identity."""
        import torch

        return {end: torch.zeros(shape) for end, shape in shapes.items()}

    def exported(self, tensors: "Mapping[str, Tensor]") -> dict[str, Any]:
        """The fields of a SavedAdapter that the kind decides; rank and alpha are none of them."""
        options = {**self._options(), "peft_version": SERIES_SINCE}
        return {"kind": "oft", "tensors": dict(tensors), "rank": 0, "alpha": 0.0, "options": options}

    @classmethod
    def of(cls, earlier: Earlier, targets: tuple[str, ...]) -> Self:
        """The recipe under which an adapter from a file is applied."""
        return cls(targets=targets, **_fields(earlier))

    def differences(self, earlier: Earlier) -> list[str]:
        """Why weights from a file cannot be continued."""
        if earlier.kind != self.kind:
            return [f"adapter.kind={earlier.kind}"]
        wrong = {key: value for key, value in _fields(earlier).items() if getattr(self, key) != value}
        return [f"adapter.{key}={'null' if value is None else str(value).lower()}" for key, value in wrong.items()]


def _fields(earlier: Earlier) -> dict[str, Any]:
    options = earlier.options
    return {
        "block_size": int(options["oft_block_size"]),
        "share_blocks": bool(options["block_share"]),
        "series": int(options["num_cayley_neumann_terms"]) if options["use_cayley_neumann"] else None,
    }
