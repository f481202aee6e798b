"""The gradient of a loss that is asked after each of some inner steps: by a closed form, or through the steps.

Inner step j takes weights to w_j+1 = w_j - r * g_j, g_j the gradient of chunk j's loss at w_j, r a rate for each
number (or row, or tensor). The loss is the mean over j of `after` at w_j+1. Wanted are its gradients with respect to
w_0 and r.
Gupta et al. 2020, arXiv:2007.13904 (C-MAML, La-MAML), as montrealrobotics/La-MAML computes it.

First order takes g_j for constants: with h_j the gradient of `after` at w_j+1, the gradients are mean(h_j) and
-mean(h_j * sum of g_i, i <= j). Weights are changed in place and put back, so one graph is alive at a time, memory does
not grow with the number of steps, and any attention kernel will do. Second order differentiates the steps themselves:
weights are handed to the network by name, and every kernel must have a second derivative.

Weights, rates and gradients meet by name, never by position.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from weft.errors import ModelError

Weights = Mapping[str, Tensor]
Ask = Callable[[], Tensor]  # a mean loss () at the weights that the network has
AskAt = Callable[[Weights], Tensor]  # the same at given weights


@dataclass(frozen=True)
class MetaGradient:
    """loss: () the mean over inner steps, of no graph. weights and rates: its gradients by name; a weight that no loss
    depends on has none, and then its rate has none either."""

    loss: Tensor
    weights: dict[str, Tensor]
    rates: dict[str, Tensor]


# ---- Names ---------------------------------------------------------------------------------------------------------


def names_in(network: nn.Module, trained: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Name of a trained parameter -> its name in the network, found by identity. Raises ModelError unless these are all
    that the network trains: whatever else has a gradient would have no inner step, and a name that the network does not
    know would be ignored when weights are handed to it."""
    own = {id(parameter): name for name, parameter in network.named_parameters()}
    if lost := [name for name, parameter in trained.items() if id(parameter) not in own]:
        raise ModelError(
            f"{len(lost)} trained tensors are no parameters of the network, first '{lost[0]}': an inner step cannot "
            "reach them. Choose another adapter.kind, or objective.kind=replay."
        )
    ours = {id(parameter) for parameter in trained.values()}
    more = [own[id(p)] for p in network.parameters() if p.requires_grad and id(p) not in ours]
    if more:
        raise ModelError(
            f"{len(more)} parameters of the network would be trained without a rate of their own, first '{more[0]}'. "
            "Inner steps move exactly what the adapter trains."
        )
    return {name: own[id(parameter)] for name, parameter in trained.items()}


def check_names(weights: Weights, rates: Weights) -> None:
    """Raises ModelError unless every weight has a rate, and every rate a weight, of shapes that meet."""
    if odd := sorted(weights.keys() ^ rates.keys()):
        raise ModelError(
            f"{len(odd)} names are of a trained tensor without a rate, or of a rate without a tensor, first '{odd[0]}'."
        )
    for name, rate in rates.items():
        if torch.broadcast_shapes(rate.shape, weights[name].shape) != weights[name].shape:
            raise ModelError(f"the rate of '{name}' is {tuple(rate.shape)}, the tensor {tuple(weights[name].shape)}.")


# ---- First order ---------------------------------------------------------------------------------------------------


def first_order(
    weights: Mapping[str, nn.Parameter], rates: Weights, chunks: Sequence[Ask], after: Ask, clip: float | None = None
) -> MetaGradient:
    """By the closed form. The parameters are moved in place while it lasts, and stand where they were afterwards,
    whatever happens; their `.grad` is left alone. clip: of each number of an inner gradient, its largest size."""
    check_names(weights, rates)
    assert chunks, "there is no inner step to take"
    loss = torch.zeros((), device=next(iter(weights.values())).device)
    total, of_rates, path = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    with put_back(weights):
        for chunk in chunks:
            step = clipped(gradients(chunk(), weights), clip)
            for name, gradient in step.items():
                path[name] = path[name] + gradient if name in path else gradient
            move(weights, rates, step)
            value = after()
            loss = loss + value.detach()
            for name, gradient in gradients(value, weights).items():
                total[name] = total[name] + gradient if name in total else gradient
                if name in path:
                    part = (gradient * path[name]).sum_to_size(rates[name].shape)
                    of_rates[name] = of_rates[name] - part if name in of_rates else -part
    count = len(chunks)
    divided = ({name: gradient / count for name, gradient in each.items()} for each in (total, of_rates))
    return MetaGradient(loss / count, *divided)


@contextmanager
def put_back(weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside, parameters may be moved in place; afterwards they hold what they held, bit by bit."""
    before = {name: parameter.detach().clone() for name, parameter in weights.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(before[name])
        torch.clear_autocast_cache()


@torch.no_grad()
def move(weights: Mapping[str, nn.Parameter], rates: Weights, step: Weights) -> None:
    """One inner step in place. Counted by the parameters' versions, and autocast forgets the casts that it has made of
    them: it keeps those by tensor, whatever became of its numbers since."""
    for name, gradient in step.items():
        weights[name].sub_(rates[name] * gradient)
    torch.clear_autocast_cache()


def gradients(loss: Tensor, weights: Weights) -> dict[str, Tensor]:
    """Of a loss, by name; none of a weight that it does not depend on."""
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}


def clipped(step: Mapping[str, Tensor], clip: float | None) -> dict[str, Tensor]:
    """Each number cut to [-clip, clip]; None: as it is."""
    return dict(step) if clip is None else {name: g.clamp(-clip, clip) for name, g in step.items()}


# ---- Second order --------------------------------------------------------------------------------------------------


def second_order(
    weights: Mapping[str, nn.Parameter],
    rates: Weights,
    chunks: Sequence[AskAt],
    after: AskAt,
    clip: float | None = None,
) -> MetaGradient:
    """Through the steps. Nothing is moved in place. Raises ModelError where a kernel has no second derivative."""
    check_names(weights, rates)
    assert chunks, "there is no inner step to take"
    rates = {name: rate.detach().requires_grad_() for name, rate in rates.items()}
    fast, losses = dict[str, Tensor](weights), list[Tensor]()
    with twice_differentiable():
        for chunk in chunks:
            found = torch.autograd.grad(chunk(fast), list(fast.values()), create_graph=True, allow_unused=True)
            step = {name: g for name, g in zip(fast, found, strict=True) if g is not None}
            step = clipped(step, clip)
            fast = {name: w - rates[name] * step[name] if name in step else w for name, w in fast.items()}
            losses.append(after(fast))
        loss = torch.stack(losses).mean()
        whole = torch.autograd.grad(loss, [*weights.values(), *rates.values()], allow_unused=True)
    of_weights, of_rates = (
        {name: g for name, g in zip(weights, part, strict=True) if g is not None}
        for part in (whole[: len(weights)], whole[len(weights) :])
    )
    return MetaGradient(loss.detach(), of_weights, of_rates)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, torch attends by plain products: its fused kernels have no second derivative, and which of them it takes
    depends on dropout, so that an evaluation may fail where training has not. Raises ModelError for what has none all
    the same."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as failed:
        text = str(failed)
        if "derivative for" in text or "double backward" in text or "once_differentiable" in text:
            raise ModelError(
                "objective.order: second differentiates twice, and something in this network can only be "
                f"differentiated once ({text.splitlines()[0][:120]}). Write objective.order=first, or an attention of "
                "plain products such as family.attention=eager."
            ) from failed
        raise


# ---- Handing gradients over ----------------------------------------------------------------------------------------


def carrying(value: Tensor, tensors: Weights, found: Weights, weight: Tensor) -> Tensor:
    """A loss () worth weight * value whose gradient is weight times the one that was found, for each tensor by name.
    Where any number of it is not finite all of it becomes so: then none of the optimizers moves, and not some."""
    sums = [gradient.sum() for gradient in found.values()]
    witness = 0.0 * torch.stack([s.to(value.dtype) for s in sums]).sum() if sums else torch.zeros_like(value)
    terms = [(tensors[name] * (g + witness.to(g.dtype))).sum().to(value.dtype) for name, g in found.items()]
    if not terms:
        return (value * weight).detach()
    total = torch.stack(terms).sum()
    return weight * (value.detach() + (total - total.detach()))
