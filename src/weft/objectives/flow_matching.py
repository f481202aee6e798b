"""Rectified-flow matching: the adapter learns the velocity from data to noise. Liu et al. 2022, arXiv:2209.03003."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from weft.section import Section

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from weft.contracts import Batch, BuildOptimizer, Loss, Model, Phase, Rng, State
    from weft.math.timesteps import Density

ROLE = "default"  # PEFT's own name of a single adapter, so that files carry no name of ours


class Uniform(Section):
    """Every time alike."""

    kind: Literal["uniform"] = "uniform"

    def density(self) -> "Density":
        from weft.math.timesteps import Density

        return Density()


class Sigmoid(Section):
    """t = sigmoid(scale x normal): more of the middle."""

    kind: Literal["sigmoid"] = "sigmoid"
    scale: float = Field(default=1.0, gt=0, description="standard deviation before the sigmoid")

    def density(self) -> "Density":
        from weft.math.timesteps import Density

        return Density(std=self.scale)


class LogitNormal(Section):
    """logit(t) is normal(mean, std)."""

    kind: Literal["logit-normal"] = "logit-normal"
    mean: float = Field(default=0.0, description="of logit(t); above 0 moves toward noise")
    std: float = Field(default=1.0, gt=0, description="of logit(t)")

    def density(self) -> "Density":
        from weft.math.timesteps import Density

        return Density(mean=self.mean, std=self.std)


class Shift(Section):
    """Times moved toward noise by s t / (1 + (s-1) t), as large frames need."""

    kind: Literal["shift"] = "shift"
    shift: float = Field(default=5.0, gt=0, description="s: 3 to 5 for Wan 2.1, 5 for TI2V-5B, 12 for Wan 2.2 T2V-A14B")
    scale: float | None = Field(
        default=1.0, gt=0, description="before the shift t is sigmoid(scale x normal); null: uniform"
    )

    def density(self) -> "Density":
        from weft.math.timesteps import Density

        return Density(std=self.scale, shift=self.shift)


class FlowMatching(Section):
    """Mean squared error of the velocity at random times."""

    kind: Literal["flow-matching"] = "flow-matching"
    timesteps: Annotated[Uniform | Sigmoid | LogitNormal | Shift, Field(discriminator="kind")] = Field(
        default_factory=Shift, description="density of the training times"
    )
    times: tuple[float, float] = Field(
        default=(0.0, 1.0), description="train only on times in this range; the density is cut there, not squeezed"
    )
    strata: int = Field(
        default=16,
        ge=1,
        description="so many draws in a row hit each of so many equal parts of the density once; 1: off",
    )
    weighting: Literal["none", "sigma-sqrt", "cosmap"] = Field(
        default="none", description="weight of the loss over time"
    )
    validation_times: tuple[float, ...] = Field(
        default=(0.1, 0.3, 0.5, 0.7, 0.9), min_length=1, description="times at which validation measures, in [0, 1]"
    )

    @model_validator(mode="after")
    def _ranges_hold(self) -> "FlowMatching":
        low, high = self.times
        if not 0 <= low < high <= 1:
            raise ValueError(f"objective.times: [{low}, {high}] is no range within [0, 1]. Write the lower end first.")
        outside = [t for t in self.validation_times if not 0 <= t <= 1]
        if outside:
            raise ValueError(f"objective.validation_times: {outside[0]} is not in [0, 1]; 0 is data and 1 is noise.")
        return self

    @property
    def roles(self) -> tuple[str, ...]:
        return (ROLE,)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def init(self, model: "Model") -> "State":
        from weft.contracts import NoState

        return NoState()

    def optimizers(self, model: "Model", state: "State", build: "BuildOptimizer") -> "dict[str, Optimizer]":
        return {ROLE: build(ROLE, model.adapters.parameters(ROLE))}

    def phases(self, step: int) -> "tuple[Phase, ...]":
        from weft.contracts import Phase

        return (Phase("train", ROLE, (ROLE,)),)

    def count(self, batch: "Batch") -> int:
        return len(batch.keys)

    def loss(self, phase: str, model: "Model", batch: "Batch", state: "State", rng: "Rng") -> "Loss":
        import torch

        from weft.contracts import Loss
        from weft.math.flow import loss_weight
        from weft.math.timesteps import draw_times, stratified

        latents = batch["latents"]  # (B, C, F, H, W)
        uniform = torch.rand(len(latents), generator=rng.own, device=latents.device)
        first = rng.draw * len(latents)
        if self.strata > 1:
            uniform = stratified(uniform, first, self.strata, rng.seed)
        t = draw_times(self.timesteps.density(), uniform, *self.times)  # (B,) fp32
        noise = torch.randn(latents.shape, generator=rng.own, device=latents.device)
        error = self.errors(model, batch, noise, t)  # (B,)
        return Loss((loss_weight(t, self.weighting) * error).sum(), {"unweighted_loss": error.detach().sum()})

    def errors(self, model: "Model", batch: "Batch", noise: "Tensor", t: "Tensor") -> "Tensor":
        """Mean squared error of the velocity of each item, (B,), summed in fp32."""
        from weft.contracts import Denoise
        from weft.math.flow import noised, velocity_target

        latents = batch["latents"]
        predicted = model.velocity(Denoise(noised(latents, noise, t), t, conditions(batch)))
        return (predicted.float() - velocity_target(latents, noise)).square().flatten(1).mean(1)

    def measure(self, model: "Model", batch: "Batch", time: float, seed: int) -> "Tensor":
        """Each item's error (B,) at one time, on noise that depends on the seed and the item's key alone."""
        import torch

        from weft.math.chance import generator

        latents = batch["latents"]
        shape = latents.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=generator("cpu", seed, "validation", k)) for k in batch.keys])
        t = torch.full((len(latents),), time, device=latents.device)
        with torch.no_grad():
            return self.errors(model, batch, noise.to(latents.device), t)


def conditions(batch: "Batch") -> "Mapping[str, Tensor]":
    """All of a batch but its latents: what the family conditions on."""
    return {name: tensor for name, tensor in batch.tensors.items() if name != "latents"}
