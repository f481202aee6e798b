"""Distribution-matching distillation: an adapter with which a model needs a few steps and no guidance.

One frozen base plays all three parts: the teacher is the base alone, student and critic are the base under adapters of
their own. Yin et al. 2024, arXiv:2405.14867 (DMD2); the student's own way to its later steps: Huang et al. 2025,
arXiv:2506.08009 (Self-Forcing).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from weft.errors import ConfigError
from weft.few_steps import MOST_STEPS, StepList
from weft.objectives.flow_matching import LogitNormal, Shift, Sigmoid, Uniform
from weft.objectives.ranges import in_common, refuse_empty, refuse_first_frame
from weft.section import Section

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from weft.contracts import Batch, BuildOptimizer, Expert, Loss, Model, ModelFamily, Phase, Rng, State
    from weft.objectives.few_step import Rollout, Scene

STUDENT, CRITIC = "student", "critic"


class Dmd(Section):
    """Few-step distillation: the student learns to make in a few steps what the teacher makes in many."""

    medium: ClassVar[Literal["video"]] = "video"
    parts: ClassVar[tuple[str, ...]] = (STUDENT, CRITIC)
    data_free: ClassVar[bool] = True

    kind: Literal["dmd"] = "dmd"
    steps: int = Field(default=4, ge=1, le=MOST_STEPS, description="denoising steps that the student will need")
    shift: float | None = Field(
        default=None, gt=0, description="of the list of steps, s t / (1 + (s-1) t); null: the model's own"
    )
    inputs: Literal["simulated", "data"] = Field(
        default="simulated",
        description="what the student meets at its later steps: what it makes itself in the earlier ones, as when it "
        "is sampled (simulated), or noised clips (data)",
    )
    student_every: int = Field(
        default=5, ge=1, description="the student moves at every so-many-th step, the critic at every one"
    )
    guidance: float = Field(
        default=4.0, ge=0, description="of the teacher, g in u + g (c-u), 1: off. Self-Forcing's number is g - 1"
    )
    guidance_low: float | None = Field(
        default=None, ge=0, description="of the teacher that is the low expert of two; null: as guidance"
    )
    critic_guidance: float = Field(default=1.0, ge=0, description="of the critic when the student asks it; 1: off")
    negative: str = Field(default="", description="negative prompt of the guidance")
    timesteps: Annotated[Uniform | Sigmoid | LogitNormal | Shift, Field(discriminator="kind")] | None = Field(
        default=None,
        description="density of the times at which teacher and critic look; null: uniform, moved by the shift",
    )
    times: tuple[float, float] = Field(
        default=(0.02, 0.98), description="they look at times in this range; at its ends they know too much, or nothing"
    )
    strata: int = Field(
        default=16,
        ge=1,
        description="so many draws in a row hit each of so many equal parts of the density once; 1: off",
    )
    first_frame: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share of clips whose first frame is given, as image-to-video of TI2V-5B; null: half, where the "
        "model takes a clean frame and there are clips, else none",
    )
    turn: int = Field(
        default=50,
        ge=1,
        description="with family.expert: both, so many steps train one expert's student and critic before the other's "
        "turn",
    )

    @model_validator(mode="after")
    def _ranges_hold(self) -> "Dmd":
        low, high = self.times
        if not 0 < low < high < 1:
            raise ValueError(
                f"objective.times: [{low:g}, {high:g}] is no range within (0, 1). At 1 nothing is left of the sample, "
                "and at 0 there is no noise. Write [0.02, 0.98]"
            )
        return self

    # ---- What goes with what ----

    def step_list(self, family: "ModelFamily") -> StepList:
        """The times at which the student is asked, in training and when it is sampled."""
        from weft.contracts import as_video

        return StepList.of(self.steps, self.shift or as_video(family).flow_shift)

    def check(self, family: "ModelFamily") -> None:
        """Raises ConfigError for what does not go with the family."""
        from weft.contracts import as_video

        refuse_first_frame(self.first_frame, as_video(family).image)
        refuse_empty(self.times, family.experts)
        if self.guidance_low is not None and "low" not in [expert.name for expert in family.all_experts]:
            raise ConfigError("objective.guidance_low: this model has one network. Leave it out.")
        steps = self.step_list(family)
        for expert in family.experts:
            if not self.rollout(expert, family).exits:
                raise ConfigError(
                    f"objective.steps: none of the student's {steps} is a time of expert "
                    f"'{expert.name}', {list(expert.times)}. Write more steps, another objective.shift, or train the "
                    "other expert alone."
                )

    @property
    def teaching(self) -> str:
        """The teacher's guidance with its convention, for a plan."""
        low = "" if self.guidance_low is None else f", of the low expert {self.guidance_low:g}"
        return f"teacher's guidance {self.guidance:g}{low} (u + g (c - u))"

    def needs_clips(self, family: "ModelFamily") -> str | None:
        """Why captions alone are not enough to train on; None when they are."""
        if self.inputs == "data":
            return "objective.inputs is data"
        if self.first_frame:
            return f"objective.first_frame is {self.first_frame:g}, and a first frame is a clip's"
        for expert in family.experts:
            first = self.rollout(expert, family).first
            if first:
                time = self.step_list(family).times[first]
                return f"expert '{expert.name}' alone begins at time {time:.4g}, where a noised clip must stand"
        return None

    def rollout(self, expert: "Expert", family: "ModelFamily") -> "Rollout":
        """The way of an expert's student."""
        from weft.objectives.few_step import rollout_of

        return rollout_of(self.step_list(family), expert, family.experts, family.all_experts, self.inputs == "data")

    def range_of(self, expert: "Expert") -> tuple[float, float]:
        """The times at which an expert's teacher and critic look."""
        return in_common(self.times, expert)

    @property
    def texts(self) -> Mapping[str, str]:
        """What every batch tells beside its captions."""
        return {"negative": self.negative} if self._guided else {}

    @property
    def _guided(self) -> bool:
        return any(g not in (1, None) for g in (self.guidance, self.guidance_low, self.critic_guidance))

    # ---- Roles and phases ----

    def roles(self, experts: "Sequence[Expert]") -> tuple[str, ...]:
        from weft.objectives.few_step import part_of

        return tuple(part_of(part, expert) for expert in experts for part in self.parts)

    def shown(self, experts: "Sequence[Expert]") -> tuple[str, ...]:
        from weft.objectives.few_step import part_of

        return tuple(part_of(STUDENT, expert) for expert in experts)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"roles"})

    def init(self, model: "Model") -> "State":
        from weft.contracts import NoState

        return NoState()

    def optimizers(self, model: "Model", state: "State", build: "BuildOptimizer") -> "dict[str, Optimizer]":
        return {role: build(role, model.adapters.parameters(role)) for role in self.roles(model.family.experts)}

    def phases(self, step: int, experts: "Sequence[Expert]") -> "tuple[Phase, ...]":
        """The critic's phase, and after it at every k-th of an expert's own steps the student's."""
        from weft.contracts import Phase
        from weft.objectives.few_step import part_of

        turn, place = divmod(step, self.turn)
        rounds, number = divmod(turn, len(experts))
        own = rounds * self.turn + place  # steps that this expert has had
        parts = self.parts[::-1] if (own + 1) % self.student_every == 0 else (CRITIC,)
        names = [part_of(part, experts[number]) for part in parts]
        return tuple(Phase(name, name, (name,)) for name in names)

    def count(self, batch: "Batch") -> int:
        return len(batch.keys)

    # ---- Losses ----

    def loss(self, phase: str, model: "Model", batch: "Batch", state: "State", rng: "Rng") -> "Loss":
        from weft.objectives.few_step import given_first, part_of, scene_of

        family = model.family
        part = phase.partition("_")[0]
        expert = next(e for e in family.experts if part_of(part, e) == phase)
        scene = scene_of(batch, expert.name, given_first(batch, self.share(model, batch), phase, rng))
        rollout = self.rollout(expert, family)
        sample = rollout.run(model, scene, rollout.exit(rng, phase), rng, learn=part == STUDENT)
        t, noise = self.look(expert, family, scene, rng), scene.noise(rng)
        if part == CRITIC:
            return self.critic_loss(model, scene, sample, t, noise)
        return self.student_loss(model, scene, sample, t, noise)

    def share(self, model: "Model", batch: "Batch") -> float:
        """Share of clips whose first frame is given. A picture has nothing to go on to."""
        from weft.contracts import as_video

        if as_video(model.family).image != "frames" or "latents" not in batch.tensors or batch["latents"].shape[2] == 1:
            return 0.0
        return 0.5 if self.first_frame is None else self.first_frame

    def look(self, expert: "Expert", family: "ModelFamily", scene: "Scene", rng: "Rng") -> "Tensor":
        """Times (B,) at which teacher and critic look at a noised sample: cut from the density, where others clamp, so
        that no mass gathers at the ends."""
        import torch

        from weft.math.timesteps import Density, draw_times, stratified

        shift = self.step_list(family).shift
        density = Density(shift=shift) if self.timesteps is None else self.timesteps.density()
        uniform = torch.rand(len(scene.like), generator=rng.own, device=scene.like.device)
        if self.strata > 1:
            uniform = stratified(uniform, rng.draw * len(uniform), self.strata, rng.seed)
        return draw_times(density, uniform, *self.range_of(expert))

    def student_loss(self, model: "Model", scene: "Scene", sample: "Tensor", t: "Tensor", noise: "Tensor") -> "Loss":
        """1/2 mean (x - stop(x - g))^2 with g the matching gradient. Its metrics: `distance`, how far on average the
        sample is from what the teacher takes it for; `gap`, how far critic and teacher are from each other."""
        import torch

        from weft.contracts import Loss
        from weft.math.dmd import learned_mean, matching_gradient, surrogate_loss
        from weft.objectives.few_step import estimate, part_of

        with torch.no_grad():
            x = scene.noised(sample, noise, t)
            fake = estimate(model, scene, x, t, part_of(CRITIC, scene.expert), guidance=self.critic_guidance)
            real = self.teacher(model, scene, x, t)
            gradient = matching_gradient(sample, fake, real, scene.given)
            metrics = {
                "distance": learned_mean((sample - real).abs(), scene.given).sum(),
                "gap": learned_mean((fake - real).abs(), scene.given).sum(),
            }
        return Loss(surrogate_loss(sample, gradient, scene.given).sum(), metrics)

    def teacher(self, model: "Model", scene: "Scene", x: "Tensor", t: "Tensor") -> "Tensor":
        """What the guided base takes x for; of a model that is told its guidance, the base that is told it."""
        import torch

        from weft.contracts import as_video
        from weft.objectives.few_step import estimate

        guidance = self.guidance_low if scene.expert == "low" and self.guidance_low is not None else self.guidance
        if as_video(model.family).embeds_guidance:
            return estimate(model, scene, x, t, None, told={"guidance": torch.full_like(t, guidance)})
        return estimate(model, scene, x, t, None, guidance=guidance)

    def critic_loss(self, model: "Model", scene: "Scene", sample: "Tensor", t: "Tensor", noise: "Tensor") -> "Loss":
        """Flow matching on the student's samples: the critic learns the distribution that the student has now."""
        from weft.contracts import Denoise, Loss
        from weft.math.dmd import learned_mean
        from weft.math.flow import velocity_target

        x = scene.noised(sample, noise, t)
        velocity = model.velocity(Denoise(x, t, scene.cond, scene.given, scene.expert)).float()
        return Loss(learned_mean((velocity - velocity_target(sample, noise)).square(), scene.given).sum())
