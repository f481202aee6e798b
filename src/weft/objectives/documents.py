"""What all objectives of documents share: one role, rows of a batch with their labels, and the loss of each row.

Labels say which loss it is: (B,) int64 are classes, cross-entropy, UNLEARNED where a row has none; (B, C) floats are
several labels at once, binary cross-entropy, nan where one is unknown. Every document counts alike: with several labels
a row's loss is the mean over those that are known.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from weft.errors import ConfigError
from weft.section import Section

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from weft.contracts import Batch, BuildOptimizer, Expert, Model, ModelFamily, Phase, State


class OfDocuments(Section):
    """An objective that trains one role on labelled documents; siblings say what the loss is."""

    medium: ClassVar[Literal["documents"]] = "documents"
    parts: ClassVar[tuple[str, ...]] = ()
    data_free: ClassVar[bool] = False
    replays: ClassVar[bool] = True  # whether it learns from earlier documents beside those of a batch

    kind: str

    # ---- What goes with what ----

    def check(self, family: "ModelFamily") -> None:
        """Raises ConfigError for what does not go with the family."""
        if family.medium != "documents":
            fitting = "flow-matching" if family.medium == "video" else "next-token"
            raise ConfigError(
                f"objective.kind: {self.kind} sorts documents, and the family is a {family.medium} model. Write "
                f"{fitting}, or choose an encoder."
            )

    def check_run(self, config: Any) -> None:
        """Raises ConfigError for what does not go with other sections of a run's config."""
        if self.replays and config.data.replay is None:
            raise ConfigError(
                f"data.replay: objective '{self.kind}' learns from earlier documents too, and none are kept. Write "
                "data.replay={size: 200, batch: 16}, or objective.kind=traditional."
            )

    def fitted(self, last_steps: Mapping[str, int]) -> Self:
        """The same for a stream whose experiences end at these steps, in order."""
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    @property
    def steady(self) -> frozenset[str]:
        """Names of optimizers whose learning rate no schedule moves, and whose gradients it does not cut."""
        return frozenset()

    @property
    def gradient_evaluations(self) -> float:
        """Forward and backward passes of one batch, replayed documents included, that a step costs."""
        return 1.0

    @property
    def texts(self) -> "Mapping[str, str]":
        """Documents say all."""
        return {}

    # ---- Roles, phases, counts ----

    def roles(self, experts: "Sequence[Expert]") -> tuple[str, ...]:
        return tuple(expert.name for expert in experts)

    def shown(self, experts: "Sequence[Expert]") -> tuple[str, ...]:
        return self.roles(experts)

    def init(self, model: "Model") -> "State":
        from weft.contracts import NoState

        return NoState()

    def optimizers(self, model: "Model", state: "State", build: "BuildOptimizer") -> "dict[str, Optimizer]":
        return {role: build(role, model.adapters.parameters(role)) for role in self.roles(model.family.experts)}

    def phases(self, step: int, experts: "Sequence[Expert]") -> "tuple[Phase, ...]":
        from weft.contracts import Phase

        (role,) = self.roles(experts)
        return (Phase("train", role, (role,)),)

    def count(self, batch: "Batch") -> int:
        """Documents with a label, replayed ones included."""
        from weft.objectives.rows import known

        names = ("labels", "replay/labels") if self.replays else ("labels",)
        return sum(int(known(batch[name]).sum()) for name in names if name in batch.tensors)

    # ---- Held-out documents ----

    def measured(self, experts: "Sequence[Expert]") -> tuple[tuple[str, float | None], ...]:
        return tuple((expert.name, None) for expert in experts)

    def measure(self, model: "Model", batch: "Batch", expert: str, time: float | None, seed: int) -> "Tensor":
        """Loss of each document (B,), 0 of one without a label."""
        import torch

        from weft.objectives.rows import current, row_losses

        rows = current(batch)
        with torch.no_grad():
            return row_losses(model.logits(rows.question()), rows.labels)

    def weights(self, batch: "Batch") -> "Tensor":
        """1 for each document with a label, (B,)."""
        from weft.objectives.rows import known

        return known(batch["labels"]).float()
