"""PyTorch's own engine, on one process or many: the config section."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from weft.engines.parallel import Parallel
from weft.errors import ConfigError
from weft.section import Section

if TYPE_CHECKING:
    import torch

    from weft.contracts import Engine
    from weft.engines.compiling import Compiler
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
    compile: bool | Literal["auto"] = Field(
        default=False,
        description="compile each block (torch.compile), which moves a fifth of the memory traffic between its "
        "multiplications; takes a minute or more at the start. auto: on a GPU with Triton, when the run is long enough "
        "to win that back, else off; true on a cpu needs a C++ compiler. Off by default, for it has not been tried on "
        "many GPUs",
    )
    activation_budget: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] | None = Field(
        default="auto",
        description="share of what compiled blocks would keep for the backward pass that they may keep, in [0, 1]. At "
        "0.5 a block of Wan 1.3B keeps half as much and does nothing twice but attend to the text, at 0.1 a sixth and "
        "half of its multiplications are done twice; attention among all tokens is done twice at 0 alone, which is as "
        "recompute. auto: the largest of 1, 0.7, 0.5, 0.4, 0.3, 0.1, 0 that fits the device; null: torch's own choice, "
        "1",
    )
    graphs: bool | Literal["auto"] = Field(
        default=False,
        description="record the steps of each shape as a CUDA graph and replay it: one launch in place of thousands, "
        "for the memory of the largest step, which stays taken. auto: on one GPU, for up to 8192 tokens in a "
        "micro-batch and few shapes, where nothing of the run speaks against it; true: for any size. Off by "
        "default, for it has not been tried on many GPUs",
    )
    recompute: bool | Literal["selective"] = Field(
        default=False,
        description="gradient checkpointing: recompute each block in the backward pass to save memory; selective: all "
        "of it but attention, whose answers are kept, for blocks that are not compiled",
    )
    offload_inputs: bool = Field(
        default=False,
        description="with recompute: the blocks' inputs wait in host memory between the forward and the backward pass",
    )
    offload_activations: bool = Field(
        default=False,
        description="without recompute: what blocks keep for the backward pass waits in host memory meanwhile; on the "
        "device stays what two blocks keep, and nothing is computed twice. Host memory holds 12 to 15 times the inputs "
        "of all blocks; pays where a block computes longer than its share is copied: long videos, a fast bus",
    )
    stream_blocks: int = Field(
        default=0,
        ge=0,
        description="so many blocks, evenly spread, keep their frozen weights in host memory and pass through two "
        "places on the device just in time; saves memory from 3 on. Adapters never move",
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
        if self.offload_inputs and not self.recompute:
            raise ValueError(
                "offload_inputs needs recompute: true, since without it the backward pass keeps more than inputs. "
                "Write offload_activations: true for all that it keeps"
            )
        if self.offload_activations and self.recompute:
            raise ValueError(
                "offload_activations is for blocks that run once; of those that are recomputed only the inputs are "
                "kept. Write offload_inputs: true, or recompute: false"
            )
        return self

    @model_validator(mode="after")
    def _a_budget_is_of_compiled_blocks(self) -> "Torch":
        if self.compile is True and self.recompute == "selective":
            raise ValueError(
                "recompute: selective is for blocks that are not compiled, since nothing sees attention inside of one. "
                "Write activation_budget: 0.3 in its place, or compile: false"
            )
        if not isinstance(self.activation_budget, float):
            return self
        if self.recompute:
            raise ValueError(
                "activation_budget: with recompute a block keeps next to nothing, whatever the budget. Leave one out"
            )
        if self.compile is not True:
            raise ValueError("activation_budget: a number is for compiled blocks. Write compile: true, or leave it out")
        return self

    def compiler(self, device: "torch.device") -> "Compiler | None":
        """How blocks are compiled, where that is said for certain: with auto the run decides, which knows its length.
        Raises ConfigError where it was asked for and there is no compiler."""
        if self.compile is not True:
            return None
        from weft.engines.compiling import Compiler, check_compiler

        check_compiler(device)
        return Compiler(budget=self.activation_budget if isinstance(self.activation_budget, float) else 1.0)

    def residence(self) -> "Residence":
        """What stays on the device, in the engine's own words."""
        from weft.engines.residency import Residence

        return Residence(
            recompute=self.recompute,
            offload_inputs=self.offload_inputs,
            offload_activations=self.offload_activations,
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
        compiler = self.compiler(device)
        if layout.world == 1:
            return SingleEngine(device, precision, self.residence(), compiler=compiler)
        join(place, device, self.timeout)
        processes = Together(layout, device)
        precision = processes.agreed(precision)  # machines may have GPUs of different kinds
        if layout.sequence > 1:
            from weft.engines.ring import sequence_ranks

            assert parallel is not None, "a layout with sequence groups was asked for"
            processes.sequence = sequence_ranks(meshes(layout, device.type).sequence, parallel.sequence_method)
        kind = ReplicatedEngine if layout.shard == 1 else ShardedEngine
        engine = kind(device, precision, self.residence(), processes, self.read == "broadcast")
        engine.compile_with(compiler)
        return engine

    def check(self, layout: "Layout") -> None:
        """Raises ConfigError for a setting that does not go with sharded weights or with parted sequences."""
        if layout.sequence > 1 and self.compile is True:
            raise ConfigError(
                f"engine.compile: not with parallel.sequence={layout.sequence}, whose ranks exchange tokens inside "
                "blocks. Leave engine.compile out, or write parallel.sequence=1."
            )
        if layout.shard == 1:
            return
        for name, said in (
            ("offload_inputs", self.offload_inputs),
            ("offload_activations", self.offload_activations),
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
        away = self.recompute or self.stream_blocks or self.offload_activations
        fast_weights = layout.shard == 1 and not away and self.compile is not True
        return frozenset({"roles", "functional"} if fast_weights else {"roles"})
