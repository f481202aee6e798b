"""Meta-learning on a stream: take inner steps through a batch, ask old and new documents after each, move by that.

Gupta et al. 2020, arXiv:2007.13904. A step costs several ordinary ones, and buys stability with plasticity.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from weft.errors import ConfigError
from weft.objectives.documents import OfDocuments
from weft.objectives.refusals import refuse_inner_gradients
from weft.section import Section

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from weft.contracts import Batch, BuildOptimizer, Expert, Loss, Model, Phase, Rng, State


class Rates(Section):
    """Rates of the inner steps that are themselves learned: where they begin, and how they move."""

    start: float = Field(default=0.1, gt=0, description="what each rate begins with (alpha_init)")
    head_start: float | None = Field(default=None, gt=0, description="of the classifier's; null: as start")
    granularity: Literal["element", "row", "tensor"] = Field(
        default="tensor",
        description="one rate for each number (the paper; as much memory again as what is trained, and four times that "
        "while Adam moves them), each row, or each tensor",
    )
    param: Literal["exp", "relu"] = Field(
        default="exp",
        description="exp: its logarithm is learned, so that it stays above 0; relu: itself (the paper), and below 0 it "
        "is dead for good",
    )
    optimizer: Literal["adam", "sgd"] = Field(
        default="adam", description="what moves them; without weight decay, and untouched by the schedule"
    )
    lr: float = Field(default=0.01, gt=0, description="its learning rate; the paper's SGD has 0.3 for MNIST")
    head_lr: float | None = Field(default=None, gt=0, description="of the classifier's; null: as lr")
    clip: float = Field(
        default=2.0, ge=0, description="length to which the gradient of each group of rates is cut; 0: none"
    )

    def start_of(self, group: str) -> float:
        """What the rates of a group begin with."""
        return self.head_start or self.start if group == "head" else self.start

    def lr_of(self, group: str) -> float:
        """The learning rate of a group of rates."""
        return self.head_lr or self.lr if group == "head" else self.lr


class MetaLearner(OfDocuments):
    """What the three meta-learners share: the inner loop, and the ordinary steps before it."""

    paper: ClassVar[Mapping[str, Any]] = {"inner_steps": 5, "warm_up": 0.0, "inner_clip": 2.0}
    learns_rates: ClassVar[bool] = False

    preset: Literal["paper"] | None = Field(
        default=None,
        description="paper: whatever is not given is as published, in place of what measured best here. The published "
        "length of the outer gradient is schedule.max_norm=2",
    )
    inner_steps: int = Field(default=4, ge=1, description="parts that a batch is cut into, one inner step for each")
    order: Literal["second", "first"] = Field(
        default="second",
        description="second: differentiate through the inner steps, which wants attention by plain products and memory "
        "for all of them at once; first: take inner gradients for constants, in the memory of one ordinary step and "
        "half the time, less stable on small data",
    )
    dropout: bool = Field(
        default=False,
        description="the network's dropout in inner steps and after them; its chance is 43 % of the gradient's length "
        "at p = 0.1",
    )
    inner_clip: float | None = Field(
        default=None,
        gt=0,
        description="size to which each number of an inner gradient is cut; null: none, as the published code for "
        "MNIST does in truth, 2: as for CIFAR",
    )
    warm_up: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of the first experience's steps that are ordinary ones on the batch and what is replayed: a "
        "LoRA's B is zero at first, and its A would have no inner gradient",
    )
    warm_up_steps: int | None = Field(
        default=None, ge=0, description="the same in steps; null: what warm_up comes to once the data is known"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("preset") != "paper":
            return given
        merged = {**cls.paper, **given}
        if isinstance(given.get("rates"), dict) and "rates" in cls.paper:
            merged["rates"] = {**cls.paper["rates"], **given["rates"]}
        return merged

    # ---- What goes with what ----

    def check_run(self, config: Any) -> None:
        super().check_run(config)
        if config.data.batch_size < self.inner_steps:
            raise ConfigError(
                f"objective.inner_steps: {self.inner_steps} steps take a document each at least, and data.batch_size "
                f"is {config.data.batch_size}. Write objective.inner_steps={config.data.batch_size}, or a larger batch."
            )
        refuse_inner_gradients(config, twice=self.order == "second")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"functional"}) if self.order == "second" else frozenset()

    @property
    def steady(self) -> frozenset[str]:
        return frozenset({"rates"}) if self.learns_rates else frozenset()

    @property
    def gradient_evaluations(self) -> float:
        """All of the batch once in the inner steps and once after each; second order goes back through them again,
        which costs about as much as was gone forward."""
        return 1.0 + self.inner_steps * (2 if self.order == "second" else 1)

    def fitted(self, last_steps: Mapping[str, int]) -> Self:
        if self.warm_up_steps is not None or not last_steps:
            return self
        first = next(iter(last_steps.values()))
        return self.model_copy(update={"warm_up_steps": round(self.warm_up * first)})

    # ---- Steps ----

    @property
    def ordinary_steps(self) -> int:
        """So many at the beginning are ordinary."""
        return self.warm_up_steps or 0

    def init(self, model: "Model") -> "State":
        from weft.objectives.inner_loop import check_network

        check_network(self, model)
        return super().init(model)

    def phases(self, step: int, experts: "Sequence[Expert]") -> "tuple[Phase, ...]":
        from weft.contracts import Phase

        (role,) = self.roles(experts)
        if step < self.ordinary_steps:
            return (Phase("train", role, (self.warming(role),)),)
        return (Phase("train", role, ("rates", role) if self.learns_rates else (role,)),)

    def warming(self, role: str) -> str:
        """The optimizer that moves a role in ordinary steps."""
        return role

    def loss(self, phase: str, model: "Model", batch: "Batch", state: "State", rng: "Rng") -> "Loss":
        """An ordinary step's, or the mean loss after the inner steps; the gradient comes with it."""
        from weft.objectives.inner_loop import meta_loss
        from weft.objectives.rows import current, replayed, summed

        if rng.done < self.ordinary_steps:
            return summed(model, current(batch).beside(replayed(batch)))
        return meta_loss(self, model, batch, state, rng)


class CMaml(MetaLearner):
    """C-MAML: inner steps of one fixed rate, and the run's optimizer on the gradient of what they lead to."""

    paper: ClassVar[Mapping[str, Any]] = {**MetaLearner.paper, "rate": 0.1}

    kind: Literal["cmaml"] = "cmaml"
    rate: float = Field(default=0.1, gt=0, description="of the inner steps")
    head_rate: float | None = Field(default=None, gt=0, description="of the classifier's; null: as rate")

    def init(self, model: "Model") -> "State":
        from weft.objectives.inner_loop import FixedRates

        super().init(model)
        return FixedRates.of(self.rate, self.head_rate or self.rate, model)


class LearningRates(MetaLearner):
    """What the two that learn their inner rates share."""

    paper: ClassVar[Mapping[str, Any]] = {
        **MetaLearner.paper,
        "rates": {"start": 0.15, "granularity": "element", "param": "relu", "optimizer": "sgd", "lr": 0.3, "clip": 2.0},
    }
    learns_rates: ClassVar[bool] = True

    rates: Rates = Field(default_factory=Rates, description="the rates of the inner steps")
    inner_relu: bool = Field(
        default=True,
        description="with rates.param relu: a rate below 0 takes no inner step. false: it goes uphill, as in the "
        "published code for CIFAR",
    )

    def init(self, model: "Model") -> "State":
        from weft.contracts import DEFAULT
        from weft.objectives.learned_rates import LearnedRates

        super().init(model)
        return LearnedRates.of(self.rates, model, model.adapters.parameters(DEFAULT.name))

    def optimizers(self, model: "Model", state: "State", build: "BuildOptimizer") -> "dict[str, Optimizer]":
        from weft.objectives.learned_rates import LearnedRates

        assert isinstance(state, LearnedRates)
        return {"rates": state.optimizer(), **super().optimizers(model, state, build)}


class SyncMaml(LearningRates):
    """Sync: learned rates inside, and the run's optimizer on the gradient of what they lead to."""

    kind: Literal["sync"] = "sync"


class LaMaml(LearningRates):
    """La-MAML: learned rates inside, and in the outer step too, where they hold back what would be forgotten."""

    paper: ClassVar[Mapping[str, Any]] = {**LearningRates.paper, "outer": "sgd_alpha"}

    kind: Literal["lamaml"] = "lamaml"
    outer: Literal["optimizer_alpha", "sgd_alpha"] = Field(
        default="optimizer_alpha",
        description="the outer step: the optimizer's own, stretched by how much each rate has grown (measured best; "
        "not in the paper), or the gradient times the rate (sgd_alpha, the paper; weak on LoRA), where optimizer moves "
        "the warm-up alone and schedule.curve is a further factor",
    )

    def check_run(self, config: Any) -> None:
        super().check_run(config)
        if self.outer == "sgd_alpha" and not (self.warm_up_steps if self.warm_up_steps is not None else self.warm_up):
            own, fields = config.optimizer, type(config.optimizer).model_fields
            if odd := [n for n, f in fields.items() if n != "kind" and getattr(own, n) != f.get_default()]:
                raise ConfigError(
                    f"optimizer.{odd[0]}: with objective.outer=sgd_alpha and no warm_up the learned rates are the "
                    "step, and the optimizer never moves. Write optimizer={kind: adamw} alone, objective.warm_up, or "
                    "objective.outer=optimizer_alpha."
                )

    def warming(self, role: str) -> str:
        return "warm_up" if self.outer == "sgd_alpha" else role

    def optimizers(self, model: "Model", state: "State", build: "BuildOptimizer") -> "dict[str, Optimizer]":
        from weft.objectives.learned_rates import LearnedRates
        from weft.objectives.outer_steps import RateDescent, StretchedStep

        assert isinstance(state, LearnedRates)
        (role,) = self.roles(model.family.experts)
        made = super().optimizers(model, state, build)
        if self.outer == "optimizer_alpha":
            return {**made, role: StretchedStep(made[role], state.grown)}
        own = RateDescent(model.adapters.parameters(role), state.steps)
        return {"rates": made["rates"], role: own, **({"warm_up": made[role]} if self.ordinary_steps else {})}
