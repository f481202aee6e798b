"""One process on one device: the config section."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from weft.section import Section

if TYPE_CHECKING:
    from weft.contracts import Engine
    from weft.engines.residency import Residence


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
    offload_inputs: bool = Field(
        default=False,
        description="with recompute: the blocks' inputs wait in host memory between the forward and the backward pass",
    )
    stream_blocks: int = Field(
        default=0,
        ge=0,
        description="so many blocks, evenly spread, keep their frozen weights in host memory and pass through two "
        "places on the device just in time; saves memory from 3 on, needs recompute. Adapters never move",
    )
    experts: Literal["auto", "together", "one"] = Field(
        default="auto",
        description="of a model with two networks: keep both on the device (together), or only the one that is asked, "
        "the other in host memory (one); auto: together when their weights fill at most half of the GPU",
    )
    pinned: bool = Field(
        default=True,
        description="lock the host memory that a GPU copies from: faster, but never swapped out; false where the host "
        "is short of memory, or where Windows counts locked memory as the GPU's",
    )
    verified_copy: bool = Field(
        default=False,
        description="check every tensor's sum after its copy to the device, for GPUs whose copies return zeros",
    )

    @model_validator(mode="after")
    def _what_travels_is_recomputed(self) -> "Single":
        for name, asked in (("offload_inputs", self.offload_inputs), ("stream_blocks", self.stream_blocks)):
            if asked and not self.recompute:
                raise ValueError(
                    f"{name} needs recompute: true, since without it the backward pass keeps everything on the device"
                )
        return self

    def residence(self) -> "Residence":
        """What stays on the device, in the engine's own words."""
        from weft.engines.residency import Residence

        return Residence(
            recompute=self.recompute,
            offload_inputs=self.offload_inputs,
            stream_blocks=self.stream_blocks,
            experts=self.experts,
            pinned=self.pinned,
            verified=self.verified_copy,
        )

    def open(self) -> "Engine":
        """Raises ConfigError when the device is not there."""
        from weft.engines.single_device import SingleEngine

        return SingleEngine.open(self.device, self.precision, self.residence())
