"""PyTorch's own engine, on one process or many: the config section."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from weft.engines.parallel import Parallel
from weft.errors import ConfigError
from weft.section import Section

if TYPE_CHECKING:
    from weft.contracts import Engine
    from weft.engines.parallel import Layout
    from weft.engines.residency import Residence


class Torch(Section):
    """PyTorch's own means: one process, DDP, FSDP2, HSDP and sequence parallelism, as `parallel` says."""

    kind: Literal["torch"] = "torch"
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
    read: Literal["each", "broadcast"] = Field(
        default="each",
        description="of several processes each reads the weights from its own disk, or the first one reads them and "
        "sends them to the others (broadcast): for disks that are slow or shared by all",
    )
    timeout: float = Field(
        default=30, gt=0, description="minutes that a process waits for the others before the run fails"
    )

    @model_validator(mode="after")
    def _what_travels_is_recomputed(self) -> "Torch":
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

    def open(self, parallel: Parallel | None = None) -> "Engine":
        """The engine of this process; several meet here. Raises ConfigError when the device is not there, when the
        processes do not make the layout, or when a setting does not go with it."""
        import torch

        from weft.engines.processes import Together, device_of, join, meshes, place_here
        from weft.engines.replicated import ReplicatedEngine
        from weft.engines.sharded import ShardedEngine
        from weft.engines.single_device import SingleEngine, best_precision, device_here

        place = place_here()
        layout = (parallel or Parallel()).resolved(place.world)
        self.check(layout)
        device = device_of(device_here(self.device), place, torch.cuda.device_count())
        precision = best_precision(device) if self.precision == "auto" else self.precision
        if layout.world == 1:
            return SingleEngine(device, precision, self.residence())
        join(place, device, self.timeout)
        processes = Together(layout, device)
        precision = processes.agreed(precision)  # machines may have GPUs of different kinds
        if layout.sequence > 1:
            from weft.engines.ring import sequence_ranks

            assert parallel is not None, "a layout with sequence groups was asked for"
            processes.sequence = sequence_ranks(meshes(layout, device.type).sequence, parallel.sequence_method)
        kind = ReplicatedEngine if layout.shard == 1 else ShardedEngine
        return kind(device, precision, self.residence(), processes, self.read == "broadcast")

    def check(self, layout: "Layout") -> None:
        """Raises ConfigError for a setting that does not go with sharded weights."""
        if layout.shard == 1:
            return
        for name, said in (
            ("offload_inputs", self.offload_inputs),
            ("stream_blocks", self.stream_blocks),
            ("experts", self.experts == "one"),
        ):
            if said:
                raise ConfigError(
                    f"engine.{name}: not with parallel.shard={layout.shard}, which spreads the weights over the "
                    f"processes already. Leave engine.{name} out, or write parallel.shard=1."
                )

    def can(self, layout: "Layout") -> frozenset[str]:
        """What objectives may ask of the engine in a layout, without opening it."""
        fast_weights = layout.shard == 1 and not self.recompute
        return frozenset({"roles", "functional"} if fast_weights else {"roles"})
