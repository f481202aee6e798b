"""Rows of labelled documents: those of a batch, those replayed, cut into chunks, and the loss of each row.

Labels (B,) int64 are classes, UNLEARNED where a row has none; (B, C) floats are several labels at once, 0 or 1, nan
where one is unknown.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from weft.contracts import UNLEARNED, Batch, Documents, Loss, Model


@dataclass(frozen=True)
class Rows:
    """Some documents of a batch: ids and mask (B, L), labels (B,) or (B, C)."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def question(self) -> Documents:
        return Documents(self.ids, self.mask)

    def known(self) -> Tensor:
        """How many of them have a label, () int64 on their device."""
        return known(self.labels).sum()

    def ordered(self, order: Tensor) -> "Rows":
        """The rows in another order (B,)."""
        return Rows(self.ids[order], self.mask[order], self.labels[order])

    def beside(self, other: "Rows | None") -> "Rows":
        """These rows, and behind them others of the same length in tokens."""
        if other is None:
            return self
        pairs = zip((self.ids, self.mask, self.labels), (other.ids, other.mask, other.labels), strict=True)
        return Rows(*(torch.cat(pair) for pair in pairs))

    def chunks(self, number: int) -> "list[Rows]":
        """Cut into so many parts of nearly equal size; of fewer rows than parts, one row each."""
        parts = min(number, len(self.labels))
        cut = zip(*(t.tensor_split(parts) for t in (self.ids, self.mask, self.labels)), strict=True)
        return [Rows(*each) for each in cut]


def current(batch: Batch) -> Rows:
    """The documents that a batch is of."""
    return Rows(batch["ids"], batch["mask"], batch["labels"])


def replayed(batch: Batch) -> Rows | None:
    """Earlier documents that came with it; None while there are none."""
    if "replay/ids" not in batch.tensors:
        return None
    return Rows(batch["replay/ids"], batch["replay/mask"], batch["replay/labels"])


def known(labels: Tensor) -> Tensor:
    """(B,) bool: whether a row has any label."""
    return labels.isfinite().any(1) if labels.is_floating_point() else labels != UNLEARNED


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of each row (B,) of logits (B, C): cross-entropy, or the mean binary cross-entropy of its known labels; 0 of
    a row without any."""
    if not labels.is_floating_point():
        return functional.cross_entropy(logits, labels, reduction="none", ignore_index=UNLEARNED)
    there = labels.isfinite()
    targets = torch.where(there, labels, 0.0).to(logits.dtype)
    each = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")  # (B, C)
    return torch.where(there, each, 0.0).sum(1) / there.sum(1).clamp(min=1)


@torch.no_grad()
def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of its labels that each row (B,) has right; 0 of a row without any."""
    if not labels.is_floating_point():
        return (logits.argmax(1) == labels).to(torch.float32)  # UNLEARNED is no class
    there = labels.isfinite()
    right = ((logits > 0) == (labels > 0.5)) & there
    return right.sum(1) / there.sum(1).clamp(min=1)


def summed(model: Model, rows: Rows) -> Loss:
    """The loss summed over rows; its metric `accuracy` is summed too."""
    logits = model.logits(rows.question())
    return Loss(row_losses(logits, rows.labels).sum(), {"accuracy": hits(logits.detach(), rows.labels).sum()})
