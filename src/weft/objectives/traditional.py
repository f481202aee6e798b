"""Ordinary fine-tuning: the mean loss of the documents that come, one year after the other or all of them at once."""

from typing import TYPE_CHECKING, ClassVar, Literal

from weft.objectives.documents import OfDocuments

if TYPE_CHECKING:
    from weft.contracts import Batch, Loss, Model, Rng, State


class Traditional(OfDocuments):
    """Fine-tuning on the documents of each batch: sequential (forgets what it does not see again), or with data.mode
    joint the upper bound that sees all years at once."""

    replays: ClassVar[bool] = False

    kind: Literal["traditional"] = "traditional"

    def check_run(self, config: object) -> None:
        """Raises ConfigError for documents that are kept to be replayed and never would be."""
        from weft.errors import ConfigError

        super().check_run(config)
        if config.data.replay is not None:  # type: ignore[attr-defined]
            raise ConfigError(
                "data.replay: objective 'traditional' learns from each batch alone, and would never look at what is "
                "replayed. Write objective.kind=replay, or leave data.replay out."
            )

    def loss(self, phase: str, model: "Model", batch: "Batch", state: "State", rng: "Rng") -> "Loss":
        """Its metric `accuracy` is the share of labels that were right before the step."""
        from weft.objectives.rows import current, summed

        return summed(model, current(batch))
