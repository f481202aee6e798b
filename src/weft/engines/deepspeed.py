"""DeepSpeed's ZeRO on many processes: the config section."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from weft.engines.parallel import Layout, Parallel
from weft.errors import ConfigError
from weft.section import Section

if TYPE_CHECKING:
    from weft.contracts import Engine
    from weft.engines.residency import Residence


class DeepSpeed(Section):
    """ZeRO-2 and ZeRO-3 of DeepSpeed, for one network. Needs the extra `deepspeed`."""

    # What only kind torch can do, in the words in which the memory ladder asks of every engine.
    stream_blocks: ClassVar[int] = 0
    offload_inputs: ClassVar[bool] = False
    offload_activations: ClassVar[bool] = False
    experts: ClassVar[str] = "together"
    compile: ClassVar[bool] = False
    graphs: ClassVar[bool] = False
    activation_budget: ClassVar[None] = None

    kind: Literal["deepspeed"] = "deepspeed"
    zero: Literal[2, 3] = Field(
        default=2,
        description="what is spread over all processes: gradients and moments of the adapters (2), or the base's "
        "weights too (3)",
    )
    offload_optimizer: bool = Field(
        default=False, description="moments and the optimizer's arithmetic in host memory, for the adapters' sake alone"
    )
    offload_parameters: bool = Field(
        default=False, description="with zero: 3, this process's part of the base's weights waits in host memory"
    )
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda)$", description="auto, cpu or cuda")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="of the multiplications; auto: bf16 where the device has it, else fp16, on a cpu fp32. "
        "The adapter's own weights are always fp32",
    )
    recompute: bool = Field(
        default=False, description="gradient checkpointing: recompute each block in the backward pass to save memory"
    )
    pinned: bool = Field(default=True, description="lock the host memory of what is offloaded, so that copies are fast")
    timeout: float = Field(
        default=30, gt=0, description="minutes that a process waits for the others before the run fails"
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_compiled(cls, given: Any) -> Any:
        for name in ("compile", "activation_budget"):
            if isinstance(given, dict) and name in given:
                raise ValueError(
                    f"{name} is not for kind 'deepspeed', whose hooks inside of blocks no compiler can follow. Leave "
                    "it out, or write kind: torch"
                )
        return given

    @model_validator(mode="after")
    def _weights_are_spread(self) -> "DeepSpeed":
        if self.offload_parameters and self.zero != 3:
            raise ValueError(
                "offload_parameters needs zero: 3, which spreads the weights. Write zero: 3, or leave it out"
            )
        return self

    def residence(self) -> "Residence":
        """What stays on the device, in the engine's own words."""
        from weft.engines.residency import Residence

        return Residence(recompute=self.recompute, experts="together", pinned=self.pinned)

    def open(self, parallel: Parallel | None = None) -> "Engine":
        """The engine of this process; several meet here. Raises ConfigError when deepspeed is not installed, the device
        is not there, or the layout asks for more than data parallelism."""
        import torch

        from weft.engines.processes import device_of, place_here
        from weft.engines.single_device import best_precision, device_here
        from weft.engines.zero_engine import ZeroEngine
        from weft.engines.zero_setup import Zero, meet

        place = place_here()
        layout = (parallel or Parallel()).resolved(place.world)
        self.check(layout)
        device = device_of(device_here(self.device), place, torch.cuda.device_count())
        precision = best_precision(device) if self.precision == "auto" else self.precision
        zero = Zero(self.zero, self.offload_optimizer, self.offload_parameters, self.pinned)
        return ZeroEngine(device, precision, self.residence(), meet(place, layout, device, self.timeout), zero)

    def check(self, layout: Layout) -> None:
        """Raises ConfigError for a layout that is not data parallel."""
        for name, asked in (("shard", layout.shard), ("sequence", layout.sequence)):
            if asked > 1:
                spreads = "the weights too" if self.zero == 3 else "gradients and moments; with zero: 3 weights too"
                raise ConfigError(
                    f"parallel.{name}: {asked} is not for engine.kind 'deepspeed', whose ZeRO-{self.zero} spreads over "
                    f"all processes {spreads}. Leave parallel.{name} out, or write engine.kind=torch."
                )

    def can(self, layout: Layout) -> frozenset[str]:
        """What objectives may ask of the engine in a layout, without opening it: several roles, no fast weights."""
        return frozenset({"roles"})
