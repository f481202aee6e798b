"""A-GEM: a step that would raise the loss of earlier documents is turned until it does not.

Chaudhry et al. 2019, arXiv:1812.00420, eq. 11. It stands here in place of EWC, which wants a second pass over the data
at the end of each year for its Fisher matrix, and boundaries between years where a stream of notes has none.
"""

from typing import TYPE_CHECKING, Any, Literal

from weft.objectives.documents import OfDocuments
from weft.objectives.refusals import refuse_inner_gradients

if TYPE_CHECKING:
    from weft.contracts import Batch, Loss, Model, Rng, State


class Agem(OfDocuments):
    """Averaged gradient episodic memory: g - (g.r / r.r) r where g.r < 0, with g the gradient of the batch and r that
    of replayed documents; each micro-batch by its own. Two backward passes a step."""

    kind: Literal["agem"] = "agem"

    def check_run(self, config: Any) -> None:
        super().check_run(config)
        refuse_inner_gradients(config, twice=False)

    @property
    def gradient_evaluations(self) -> float:
        """The batch and the replayed documents are gone through apart, as much as together; the rest is small."""
        return 1.0

    def count(self, batch: "Batch") -> int:
        """Documents of the batch with a label: those that are replayed only bound the step."""
        from weft.objectives.rows import known

        return int(known(batch["labels"]).sum())

    def loss(self, phase: str, model: "Model", batch: "Batch", state: "State", rng: "Rng") -> "Loss":
        """Metrics: `accuracy` as ever, `turned` the share of micro-batches whose step was turned."""
        from weft.objectives.turning import turned_loss

        return turned_loss(model, batch)
