"""One process on one device: the config section."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from weft.section import Section

if TYPE_CHECKING:
    from weft.contracts import Engine


class Single(Section):
    """One process on one device."""

    kind: Literal["single"] = "single"
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:1"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="of the multiplications; auto: bf16 where the device has it, else fp16, on a cpu fp32. "
        "The adapter's own weights are always fp32",
    )
    recompute: bool = Field(
        default=False, description="gradient checkpointing: recompute each block in the backward pass to save memory"
    )
    verified_copy: bool = Field(
        default=False,
        description="check every tensor's sum after its copy to the device, for GPUs whose copies return zeros",
    )

    def open(self) -> "Engine":
        """Raises ConfigError when the device is not there."""
        from weft.engines.single_device import SingleEngine

        return SingleEngine.open(self.device, self.precision, self.recompute, self.verified_copy)
