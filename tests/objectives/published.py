"""C-MAML, Sync and La-MAML written a second time, from the algorithm's box: explicit weights, whole autograd graphs.

Gupta et al. 2020, arXiv:2007.13904, with what the published code adds: values of inner gradients cut to [-c, c], norms
of both outer gradients cut to c, rates below 0 that do nothing (lamaml.py) or go uphill (lamaml_cifar.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tests.small_documents import WORDS
from weft.contracts import Batch

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """A row of the table of variants. clip: of the outer gradients' norms; 0: none. groups: names that share it."""

    second: bool
    learn_rates: bool
    sync: bool
    steps: int
    eta: float  # of the rates
    weight_lr: float  # of the weights where the outer step is synchronous
    inner_clip: float | None = None
    inner_relu: bool = True
    clip: float = 0.0


def answers(weights: Named, ids: Tensor) -> Tensor:
    """Logits of a perceptron with layers body.0, body.1, ..., head."""
    x = ids.double() / (WORDS - 1)
    layers = sorted({name.rpartition(".")[0] for name in weights if name.startswith("body.")})
    for layer in layers:
        x = functional.linear(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"]).relu()
    return functional.linear(x, weights["head.weight"], weights["head.bias"])


def meta_step(weights: Named, rates: Named, batch: Batch, order: Tensor, recipe: Recipe) -> tuple[Named, Named]:
    """The weights and rates after one update on a batch whose rows come in this order."""
    theta = {name: w.detach().requires_grad_() for name, w in weights.items()}
    alpha = {name: a.detach().requires_grad_() for name, a in rates.items()}
    ids, labels = batch["ids"][order], batch["labels"][order]
    later_ids = torch.cat([batch["ids"], batch["replay/ids"]])
    later_labels = torch.cat([batch["labels"], batch["replay/labels"]])
    fast, losses = theta, []
    for x, y in zip(ids.tensor_split(recipe.steps), labels.tensor_split(recipe.steps), strict=True):
        if len(x) == 0:
            continue
        loss = functional.cross_entropy(answers(fast, x), y)
        found = torch.autograd.grad(loss, list(fast.values()), create_graph=recipe.second)
        if recipe.inner_clip is not None:
            found = [g.clamp(-recipe.inner_clip, recipe.inner_clip) for g in found]
        fast = {
            name: w - (alpha[name].relu() if recipe.inner_relu else alpha[name]) * g
            for (name, w), g in zip(fast.items(), found, strict=True)
        }
        losses.append(functional.cross_entropy(answers(fast, later_ids), later_labels))
    whole = torch.autograd.grad(sum(losses) / len(losses), [*theta.values(), *alpha.values()])
    of_theta, of_alpha = (cut(part, recipe.clip) for part in (whole[: len(theta)], whole[len(theta) :]))
    new_rates, new = dict(rates), {}
    if recipe.learn_rates:
        new_rates = {name: a - recipe.eta * g for (name, a), g in zip(rates.items(), of_alpha, strict=True)}
    for (name, w), g in zip(weights.items(), of_theta, strict=True):
        new[name] = w - (recipe.weight_lr if recipe.sync else new_rates[name].relu()) * g
    return new, new_rates


def cut(gradients: Sequence[Tensor], length: float) -> list[Tensor]:
    """As torch.nn.utils.clip_grad_norm_."""
    if not length:
        return list(gradients)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    return [g * min(1.0, length / (float(norm) + 1e-6)) for g in gradients]
