"""A gradient that is turned away from what would hurt earlier documents: A-GEM's projection."""

from collections.abc import Mapping

import torch
from torch import Tensor

from weft.contracts import DEFAULT, Batch, Loss, Model
from weft.math.meta import carrying, gradients
from weft.objectives.inner_loop import mean_loss, refuse_scaled_losses
from weft.objectives.rows import current, hits, replayed, row_losses


def turned_loss(model: Model, batch: Batch) -> Loss:
    """The loss of a batch's documents, its gradient turned where it is against that of the replayed ones."""
    refuse_scaled_losses(batch["ids"].device)
    rows, earlier = current(batch), replayed(batch)
    trained = model.adapters.parameters(DEFAULT.name)
    known = rows.known()
    logits = model.logits(rows.question())
    loss = row_losses(logits, rows.labels).sum() / known.clamp(min=1)
    metrics = {"accuracy": hits(logits.detach(), rows.labels).sum(), "turned": torch.zeros_like(loss)}
    if earlier is None:
        return Loss(loss * known, {name: number.detach() for name, number in metrics.items()})
    found = gradients(loss, trained)
    reference = gradients(mean_loss(model, earlier), trained)
    found, against = turned(found, reference)
    metrics["turned"] = against * known
    return Loss(carrying(loss.detach(), dict(trained), found, known), metrics)


@torch.no_grad()
def turned(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """g without its part against r, and whether there was any, () 0 or 1. A tensor that only one of them has counts as
    zeros in the other. Sums in fp32 or wider."""
    both = found.keys() & reference.keys()
    along = _sum([(_wide(found[name]) * _wide(reference[name])).sum() for name in both], found)
    length = _sum([_wide(each).square().sum() for each in reference.values()], found)
    factor = torch.where((along < 0) & (length > 0), along / length, 0.0)
    out = {}
    for name in [*found, *(n for n in reference if n not in found)]:
        parts = []
        if name in found:
            parts.append(found[name])
        if name in reference:
            parts.append(-factor.to(reference[name].dtype) * reference[name])
        out[name] = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return out, (factor != 0).to(factor.dtype)


def _sum(numbers: list[Tensor], like: Mapping[str, Tensor]) -> Tensor:
    if numbers:
        return torch.stack(numbers).sum()
    return _wide(torch.zeros_like(next(iter(like.values())).flatten()[0]))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
