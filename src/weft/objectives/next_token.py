"""Next-token prediction: the sum of -log p over the tokens that are learned."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from weft.section import Section

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from weft.contracts import Batch, BuildOptimizer, Expert, Loss, Model, ModelFamily, Phase, Rng, State, Tokens


class NextToken(Section):
    """Cross-entropy of the tokens that the data marks as learned, each of them counted alike."""

    medium: ClassVar[Literal["text"]] = "text"
    parts: ClassVar[tuple[str, ...]] = ()  # that `roles` may give something of their own
    data_free: ClassVar[bool] = False  # whether captions alone may do
    kind: Literal["next-token"] = "next-token"

    def check(self, family: "ModelFamily") -> None:
        """Raises ConfigError for what does not go with the family."""
        from weft.errors import ConfigError

        if family.medium != "text":
            raise ConfigError(
                "objective.kind: next-token learns text, and the family is a video model. Write flow-matching, or "
                "choose a language model."
            )

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
        from weft.contracts import Phase

        (role,) = self.roles(experts)
        return (Phase("train", role, (role,)),)

    def count(self, batch: "Batch") -> int:
        """Tokens that are learned."""
        return int(learned(batch).sum())

    def loss(self, phase: str, model: "Model", batch: "Batch", state: "State", rng: "Rng") -> "Loss":
        return self.loss_of(phase, model, batch, {})

    def draws(self, phase: str, model: "Model", batch: "Batch", rng: "Rng") -> "dict[str, Tensor]":
        """Nothing is left to chance."""
        return {}

    def loss_of(self, phase: str, model: "Model", batch: "Batch", drawn: "Mapping[str, Tensor]") -> "Loss":
        """Its metric `probability` is the mean chance that the model gave the right token."""
        from weft.contracts import Loss

        losses = model.losses(tokens_of(batch))  # (B, L) fp32
        chance = (losses.detach().neg().exp() * learned(batch)).sum()
        return Loss(losses.sum(), {"probability": chance})

    def measured(self, experts: "Sequence[Expert]") -> tuple[tuple[str, float | None], ...]:
        return tuple((expert.name, None) for expert in experts)

    def measure(self, model: "Model", batch: "Batch", expert: str, time: float | None, seed: int) -> "Tensor":
        """Mean loss of each row (B,) over its learned tokens; 0 for a row without any."""
        import torch

        with torch.no_grad():
            return model.losses(tokens_of(batch)).sum(1) / learned(batch).sum(1).clamp(min=1)

    def weights(self, batch: "Batch") -> "Tensor":
        """Learned tokens of each row, (B,)."""
        return learned(batch).sum(1).float()


def tokens_of(batch: "Batch") -> "Tokens":
    from weft.contracts import Tokens

    return Tokens(batch["ids"], batch["positions"], batch["labels"], batch.tensors.get("learned"), batch.texts)


def learned(batch: "Batch") -> "Tensor":
    """(B, L) bool: the places that are learned."""
    from weft.contracts import UNLEARNED

    return batch["labels"] != UNLEARNED
