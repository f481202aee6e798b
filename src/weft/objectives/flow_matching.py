"""Rectified-flow matching: the adapter learns the velocity from data to noise. Liu et al. 2022, arXiv:2209.03003."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from weft.errors import ConfigError
from weft.objectives.ranges import in_common, refuse_empty, refuse_first_frame
from weft.section import Section

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from weft.contracts import Batch, BuildOptimizer, Expert, Loss, Model, ModelFamily, Phase, Rng, State
    from weft.math.timesteps import Density

MEASURED = (0.1, 0.3, 0.5, 0.7, 0.9)  # parts of an expert's range of times at which validation measures it


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

    medium: ClassVar[Literal["video"]] = "video"
    parts: ClassVar[tuple[str, ...]] = ()  # that `roles` may give something of their own
    data_free: ClassVar[bool] = False  # whether captions alone may do
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
    first_frame: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share of clips whose first frame stays clean and is not learned, as image-to-video of TI2V-5B; "
        "null: half, where the model takes a clean frame, else none",
    )
    turn: int = Field(
        default=50,
        ge=1,
        description="with family.expert: both, so many steps train one expert before the other's turn; half of "
        "schedule.steps or more: one after the other",
    )
    validation_times: tuple[float, ...] | None = Field(
        default=None,
        min_length=1,
        description="times at which validation measures, in [0, 1]; null: at 10, 30, 50, 70 and 90 % of each expert's "
        "range",
    )

    @model_validator(mode="after")
    def _ranges_hold(self) -> "FlowMatching":
        low, high = self.times
        if not 0 <= low < high <= 1:
            raise ValueError(f"objective.times: [{low}, {high}] is no range within [0, 1]. Write the lower end first.")
        outside = [t for t in self.validation_times or () if not 0 <= t <= 1]
        if outside:
            raise ValueError(f"objective.validation_times: {outside[0]} is not in [0, 1]; 0 is data and 1 is noise.")
        return self

    def check(self, family: "ModelFamily") -> None:
        """Raises ConfigError for what does not go with the family."""
        from weft.contracts import as_video

        refuse_first_frame(self.first_frame, as_video(family).image)
        refuse_empty(self.times, family.experts)
        if not self.measured(family.experts):
            raise ConfigError(
                f"objective.validation_times: none of {list(self.validation_times or ())} is a time of "
                f"{', '.join(f'{e.name} {list(e.times)}' for e in family.experts)}. Leave the key out."
            )

    def range_of(self, expert: "Expert") -> tuple[float, float]:
        """The times that an expert is trained at."""
        return in_common(self.times, expert)

    def roles(self, experts: "Sequence[Expert]") -> tuple[str, ...]:
        return tuple(expert.name for expert in experts)

    def shown(self, experts: "Sequence[Expert]") -> tuple[str, ...]:
        return self.roles(experts)

    @property
    def texts(self) -> "Mapping[str, str]":
        """Captions say all."""
        return {}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def init(self, model: "Model") -> "State":
        from weft.contracts import NoState

        return NoState()

    def optimizers(self, model: "Model", state: "State", build: "BuildOptimizer") -> "dict[str, Optimizer]":
        return {role: build(role, model.adapters.parameters(role)) for role in self.roles(model.family.experts)}

    def phases(self, step: int, experts: "Sequence[Expert]") -> "tuple[Phase, ...]":
        """One phase, `train`; with several experts that of the one whose turn it is, under its name."""
        from weft.contracts import DEFAULT, Phase

        name = experts[step // self.turn % len(experts)].name
        return (Phase("train" if name == DEFAULT.name else name, name, (name,)),)

    def count(self, batch: "Batch") -> int:
        return len(batch.keys)

    def loss(self, phase: str, model: "Model", batch: "Batch", state: "State", rng: "Rng") -> "Loss":
        return self.loss_of(phase, model, batch, self.draws(phase, model, batch, rng))

    def draws(self, phase: str, model: "Model", batch: "Batch", rng: "Rng") -> "dict[str, Tensor]":
        """Noise, times, and which clips have a given first frame; the last only where there is one."""
        import torch

        from weft.math.chance import generator
        from weft.math.sending import sent
        from weft.math.timesteps import draw_times, stratified

        expert = self.expert_of(phase, model)
        latents = batch["latents"]  # (B, C, F, H, W)
        uniform = torch.rand(len(latents), generator=rng.own, device=latents.device)
        if self.strata > 1:
            uniform = stratified(uniform, rng.draw * len(latents), self.strata, rng.seed)
        t = draw_times(self.timesteps.density(), uniform, *self.range_of(expert))  # (B,) fp32
        noise = torch.randn(latents.shape, generator=rng.own, device=latents.device)
        share = self.share(model.family, latents.shape[2])
        # On the host, for a question without a given frame is another, cheaper call: one time for all tokens.
        dice = generator("cpu", rng.seed, "first frame", phase, rng.draw)
        chosen = torch.rand(len(latents), generator=dice) < share if share else None
        if chosen is None or not bool(chosen.any()):
            return {"noise": noise, "t": t}
        return {"noise": noise, "t": t, "chosen": sent(chosen, latents.device)}

    def loss_of(self, phase: str, model: "Model", batch: "Batch", drawn: "Mapping[str, Tensor]") -> "Loss":
        from weft.contracts import Loss
        from weft.math.flow import loss_weight

        question = Question(drawn["noise"], drawn["t"], self.expert_of(phase, model).name, drawn.get("chosen"))
        error = self.errors(model, batch, question)  # (B,)
        weighted = loss_weight(question.t, self.weighting) * error
        return Loss(weighted.sum(), {"unweighted_loss": error.detach().sum()})

    def expert_of(self, phase: str, model: "Model") -> "Expert":
        """The network that a phase trains."""
        return next(expert for expert in model.family.experts if phase in (expert.name, "train"))

    def share(self, family: "ModelFamily", frames: int) -> float:
        """Share of clips of so many latent frames whose first one stays clean. A picture has nothing to go on to."""
        from weft.contracts import as_video

        if as_video(family).image != "frames" or frames == 1:
            return 0.0
        return 0.5 if self.first_frame is None else self.first_frame

    def errors(self, model: "Model", batch: "Batch", question: "Question") -> "Tensor":
        """Mean squared error of the velocity of each item, (B,), summed in fp32, over the frames that are not given."""
        from weft.contracts import Denoise
        from weft.math.flow import noised, velocity_target

        latents, given = batch["latents"], question.given(batch)
        x = noised(latents, question.noise, question.t)
        if given is not None:
            x = x.where(~given[:, None, :, None, None], latents)
        asked = Denoise(x, question.t, conditions(batch), given, question.expert)
        return question.mean(batch, (model.velocity(asked).float() - velocity_target(latents, question.noise)).square())

    def measured(self, experts: "Sequence[Expert]") -> tuple[tuple[str, float | None], ...]:
        """Each (name of an expert, time) that validation measures."""
        pairs = []
        for expert in experts:
            low, high = self.range_of(expert)
            times = self.validation_times or [round(low + part * (high - low), 6) for part in MEASURED]
            pairs += [(expert.name, time) for time in times if expert.times[0] <= time <= expert.times[1]]
        return tuple(pairs)

    def weights(self, batch: "Batch") -> "Tensor":
        """Every clip counts alike."""
        import torch

        return torch.ones(len(batch.keys))

    def measure(self, model: "Model", batch: "Batch", expert: str, time: float | None, seed: int) -> "Tensor":
        """Each item's error (B,) at one time, on noise that depends on the seed and the item's key alone."""
        import torch

        from weft.math.chance import generator

        assert time is not None, "a velocity is asked for at a time"
        latents = batch["latents"]
        device = latents.device

        def dice(what: str) -> "list[torch.Generator]":
            return [generator("cpu", seed, what, key) for key in batch.keys]

        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in dice("validation")])
        share = self.share(model.family, latents.shape[2])
        chosen = torch.cat([torch.rand(1, generator=g) for g in dice("first frame")]) < share if share else None
        t = torch.full((len(latents),), time, device=device)
        with torch.no_grad():
            question = Question(noise.to(device), t, expert, chosen if chosen is None else chosen.to(device))
            return self.errors(model, batch, question)


@dataclass(frozen=True)
class Question:
    """What a network is asked about a batch. noise: as the latents. t: (B,). chosen: (B,) bool, whose first frame is
    given."""

    noise: "Tensor"
    t: "Tensor"
    expert: str
    chosen: "Tensor | None" = None

    def given(self, batch: "Batch") -> "Tensor | None":
        """(B, F) bool: the latent frames that are given."""
        import torch

        if self.chosen is None:
            return None
        first = torch.arange(batch["latents"].shape[2], device=self.chosen.device) == 0
        return self.chosen[:, None] & first

    def mean(self, batch: "Batch", squared: "Tensor") -> "Tensor":
        """The mean (B,) of squared errors (B, C, F, H, W) over the frames that are not given."""
        given = self.given(batch)
        if given is None:
            return squared.flatten(1).mean(1)
        by_frame = squared.mean((1, 3, 4))  # (B, F)
        return (by_frame * ~given).sum(1) / (~given).sum(1)


def conditions(batch: "Batch") -> "Mapping[str, Tensor]":
    """All of a batch but its latents: what the family conditions on."""
    return {name: tensor for name, tensor in batch.tensors.items() if name != "latents"}
