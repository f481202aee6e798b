"""Experience replay: the mean loss of the documents that come and of earlier ones, drawn anew for each batch."""

from typing import TYPE_CHECKING, Literal

from weft.objectives.documents import OfDocuments

if TYPE_CHECKING:
    from weft.contracts import Batch, Loss, Model, Rng, State


class ExperienceReplay(OfDocuments):
    """Fine-tuning on each batch and on documents of the memory together, all counted alike. Chaudhry et al. 2019,
    arXiv:1902.10486. The recommended default: hard to beat at equal compute."""

    kind: Literal["replay"] = "replay"

    def loss(self, phase: str, model: "Model", batch: "Batch", state: "State", rng: "Rng") -> "Loss":
        """Its metric `accuracy` is the share of labels that were right before the step."""
        from weft.objectives.rows import current, replayed, summed

        return summed(model, current(batch).beside(replayed(batch)))
