"""Products of one input with several frozen linear layers and their low-rank changes, keeping little for the backward.

y_i = h W_i^T + b_i + s_i (h A_i^T) B_i^T with h = produced(x). Kept is x, once for all of them, and of a
single layer its rank activations u = s h A^T; the rest is made again in the backward pass, which gives the gradients of
x, A and B alone.
Letters: N tokens, r rank, R the sum of ranks.

The low-rank part is computed first and the large product is added to it, there and back: what it adds lies in memory
for one pass of the large multiplication, which has the time for it, and the sum is rounded once.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from weft.projection import PLAIN, Kernel, LowRank, Projection, computing_dtype

Grads = tuple[Tensor | None, ...]


class Producer(Protocol):
    """Pointwise mathematics between what is kept, x (..., in), and what is multiplied, h (..., in): done twice.

    tensors: what it needs beside x; where one of them wants a gradient, autograd follows `forward` instead, unless it
    is a `Joint`.
    """

    tensors: tuple[Tensor, ...]

    def forward(self, x: Tensor, *tensors: Tensor) -> Tensor: ...
    def backward(self, x: Tensor, grad: Tensor, *tensors: Tensor) -> Tensor:
        """dL/dx from dL/dh; in x's dtype."""
        ...


class Joint(Protocol):
    """A producer of several inputs: its tensors are kept as x is, and have gradients of its own."""

    tensors: tuple[Tensor, ...]

    def forward(self, x: Tensor, *tensors: Tensor) -> Tensor: ...
    def again(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """forward in the backward pass, before `backward_all`: what that can use of it may stay until then."""
        ...

    def backward(self, x: Tensor, grad: Tensor, *tensors: Tensor) -> Tensor: ...
    def backward_all(self, x: Tensor, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """dL/dx and the gradient of each of its tensors. grad is nobody else's and may be overwritten."""
        ...


def is_joint(producer: Producer | None) -> TypeGuard[Joint]:
    """Whether a producer has several inputs. By one name: to ask for a whole protocol takes as long as a product."""
    return hasattr(producer, "backward_all")


def products(x: Tensor, projections: Sequence[Projection], producer: Producer | None = None) -> tuple[Tensor, ...]:
    """The answers (..., out_i) of several layers to one input (..., in), in the dtype that autocast computes in."""
    known = all(p.kernel is not None for p in projections)
    of_one = producer is not None and not is_joint(producer)
    traced = producer is not None and of_one and any(t.requires_grad for t in producer.tensors)
    if not known or traced or torch.compiler.is_compiling():
        return plain_products(x, projections, producer)
    made = producer.tensors if producer is not None else ()
    dtype = computing_dtype(x)
    flat: list[Tensor | None] = [*made]
    for each in projections:
        flat += each.tensors
        if each.change is not None:
            flat += _factors(each.change, dtype)
    plan = Plan(producer, len(made), projections, dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _Products.apply(x if producer is not None else x.to(dtype), plan, *flat)


def _factors(change: LowRank, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A and B as they are trained, and as they are multiplied with."""
    narrow = change.narrow
    if change.a.dtype == dtype:
        narrow = (change.a.detach(), change.b.detach())
    elif narrow is None or narrow[0].dtype != dtype:
        narrow = (change.a.detach().to(dtype), change.b.detach().to(dtype))
    return change.a, change.b, *narrow


def plain_products(
    x: Tensor, projections: Sequence[Projection], producer: Producer | None = None
) -> tuple[Tensor, ...]:
    """The same as autograd and torch.compile see through it."""
    h = x if producer is None else producer.forward(x, *producer.tensors)
    dtype = computing_dtype(h)
    answers = []
    for each in projections:
        if each.kernel is None:
            answers.append(each.module(h))
        elif each.change is None:
            answers.append(each.kernel.product(h.to(dtype), *each.tensors))
        else:
            y = plain_product(h.to(dtype).flatten(0, -2), each.kernel, each.tensors, each.change)
            answers.append(y.view(*h.shape[:-1], y.shape[-1]))
    return tuple(answers)


def plain_product(h: Tensor, kernel: Kernel, tensors: tuple[Tensor | None, ...], change: LowRank) -> Tensor:
    """One answer (N, out) to h (N, in), in h's dtype."""
    up = change.b.to(h.dtype).mT
    u = h @ change.a.to(h.dtype).mT * change.scale
    if kernel is not PLAIN:
        return torch.addmm(kernel.product(h, *tensors), u.to(h.dtype), up)
    weight, bias = tensors
    assert weight is not None
    y = u.to(h.dtype) @ up if bias is None else torch.addmm(bias.to(h.dtype), u.to(h.dtype), up)
    return torch.addmm(y, h, weight.to(h.dtype).mT)


class Layer(NamedTuple):
    """One layer of a call. low, high: A (r, in) and B (out, r) in the dtype that is computed in; at: of A among the
    call's tensors, and where its columns begin among R."""

    kernel: Kernel
    tensors: tuple[Tensor | None, ...]
    scale: float
    low: Tensor | None
    high: Tensor | None
    at: int
    begin: int

    def ranks(self, both: Tensor) -> Tensor:
        """Its columns of rank activations (N, R)."""
        assert self.low is not None
        return both if len(self.low) == both.shape[1] else both.narrow(1, self.begin, len(self.low))


class Plan:
    """What is known of a call beside its tensors."""

    def __init__(
        self, producer: Producer | None, made: int, projections: Sequence[Projection], dtype: torch.dtype
    ) -> None:
        self.producer, self.made, self.dtype = producer, made, dtype
        self.known = [(p.kernel, len(p.tensors), _number(p.change)) for p in projections]

    def layers(self, flat: Sequence[Any]) -> list[Layer]:
        """The layers, of a call's tensors but for x."""
        found, at, begin = [], self.made, 0
        for kernel, count, scale in self.known:
            assert kernel is not None
            tensors, at = tuple(flat[at : at + count]), at + count
            if scale is None:
                found.append(Layer(kernel, tensors, 1.0, None, None, at, begin))
                continue
            found.append(Layer(kernel, tensors, scale, flat[at + 2], flat[at + 3], at, begin))
            begin, at = begin + len(flat[at]), at + 4
        return found

    def produced(self, x: Tensor, flat: Sequence[Any], again: bool = False) -> Tensor:
        """h (N, in), in the dtype that is computed in. again: its gradient is wanted next."""
        if self.producer is None:
            h = x
        elif again and is_joint(self.producer):
            h = self.producer.again(x, *flat[: self.made])
        else:
            h = self.producer.forward(x, *flat[: self.made])
        return h.reshape(-1, h.shape[-1]).to(self.dtype)


def _number(change: LowRank | None) -> float | None:
    scale = None if change is None else change.scale
    assert not isinstance(scale, Tensor), "a scale is a tensor only while torch compiles"
    return scale


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, *flat: Tensor | None) -> tuple[Tensor, ...]:
        layers = plan.layers(flat)
        h = plan.produced(x, flat)
        changed = [layer for layer in layers if layer.low is not None]
        u = _scaled(h, changed) if changed else None  # (N, R)
        ctx.plan = plan
        # Of several layers the rank activations are made again too: one thin product, and less is kept.
        ctx.save_for_backward(x, u if len(changed) == 1 else None, *flat)
        answers = [_answer(h, u, layer) for layer in layers]
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in answers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        plan: Plan = ctx.plan
        x, u, *flat = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A gradient of this gradient is wanted (La-MAML): autograd follows the plain operators.
            return _followed(plan, x, flat, grads, ctx.needs_input_grad)
        layers = plan.layers(flat)
        asked = [
            (layer, grad.reshape(-1, grad.shape[-1]))
            for layer, grad in zip(layers, grads, strict=True)
            if grad is not None
        ]
        changed = [(layer, dy) for layer, dy in asked if layer.low is not None]
        v = _back(changed) if changed else None  # (N, R) of the changed layers
        found: list[Tensor | None] = [None] * len(flat)
        wanted = ctx.needs_input_grad[2:]
        if v is not None and any(wanted[layer.at] or wanted[layer.at + 1] for layer, _ in changed):
            h = plan.produced(x, flat, again=True)
            u = _scaled(h, [layer for layer in layers if layer.low is not None]) if u is None else u
            ranks = [layer.high.shape[1] for layer, _ in changed if layer.high is not None]
            das = _weight_gradient(v, h).to(flat[changed[0][0].at].dtype).split(ranks)
            del h  # as large as the input, and not needed below
            for (layer, dy), da in zip(changed, das, strict=True):
                found[layer.at] = da
                found[layer.at + 1] = _weight_gradient(dy, layer.ranks(u)).to(flat[layer.at + 1].dtype)
        dx = None
        if any(ctx.needs_input_grad[number] for number in (0, *range(2, 2 + plan.made))) and asked:
            dh = _input_gradient(asked, v, [layer for layer, _ in changed])
            dh = dh.view(*x.shape[:-1], dh.shape[-1])  # of no tokens too
            if is_joint(plan.producer):
                dx, *found[: plan.made] = plan.producer.backward_all(x, dh, *flat[: plan.made])
            else:
                dx = dh if plan.producer is None else plan.producer.backward(x, dh, *flat[: plan.made])
        return (dx, None, *found)


def _scaled(h: Tensor, layers: Sequence[Layer]) -> Tensor:
    """u (N, R): scale h A^T of each layer, side by side: of one multiplication where the scales are one."""
    lows = [layer.low for layer in layers if layer.low is not None]
    u = h.new_empty(len(h), sum(map(len, lows)))
    first = layers[0].scale
    if all(layer.scale == first for layer in layers):
        return u.addmm_(h, stacked(lows).mT, beta=0, alpha=first)  # beta 0: what is there is not read
    for layer, low in zip(layers, lows, strict=True):
        layer.ranks(u).addmm_(h, low.mT, beta=0, alpha=layer.scale)
    return u


def _answer(h: Tensor, u: Tensor | None, layer: Layer) -> Tensor:
    """(N, out)."""
    if u is None or layer.high is None:
        return layer.kernel.product(h, *layer.tensors)
    ranks, up = layer.ranks(u), layer.high.mT
    if layer.kernel is not PLAIN:
        return layer.kernel.product(h, *layer.tensors).addmm_(ranks, up)
    weight, bias = layer.tensors
    assert weight is not None
    y = ranks @ up if bias is None else torch.addmm(bias.to(h.dtype), ranks, up)
    return y.addmm_(h, weight.to(h.dtype).mT)


def _back(changed: Sequence[tuple[Layer, Tensor]]) -> Tensor:
    """v (N, R) = scale dy B of each layer, side by side."""
    ranks = [layer.high.shape[1] for layer, _ in changed if layer.high is not None]
    _, dy = changed[0]
    v = dy.new_empty(len(dy), sum(ranks))
    columns = v.split(ranks, 1) if len(ranks) > 1 else (v,)
    for (layer, dy), column in zip(changed, columns, strict=True):
        assert layer.high is not None
        column.addmm_(dy, layer.high, beta=0, alpha=layer.scale)
    return v


def _input_gradient(asked: Sequence[tuple[Layer, Tensor]], v: Tensor | None, changed: Sequence[Layer]) -> Tensor:
    """dL/dh (N, in): the sum over layers of dy W + v A."""
    total: Tensor | None = None
    for layer, dy in asked:
        if layer.kernel is not PLAIN:
            own = layer.kernel.gradient(dy, *layer.tensors)
            total = own if total is None else total.add_(own)
    if v is not None:
        down = stacked([layer.low for layer in changed if layer.low is not None])
        total = v @ down if total is None else total.addmm_(v, down)
    for layer, dy in asked:
        if layer.kernel is PLAIN:
            weight = layer.tensors[0]
            assert weight is not None
            total = dy @ weight.to(dy.dtype) if total is None else total.addmm_(dy, weight.to(dy.dtype))
    assert total is not None
    return total


def _weight_gradient(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, summed over tokens in fp32 and kept so where the device can."""
    if left.is_cuda and left.dtype != torch.float32 and torch.version.hip is None:
        return torch.mm(left.mT, right, out_dtype=torch.float32)
    return left.mT @ right


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """Matrices of one width below each other: without a copy where they lie so in memory."""
    first = rows[0]
    if len(rows) == 1:
        return first
    if all(_follows(one, other) for one, other in pairwise(rows)):
        return first.as_strided((sum(map(len, rows)), first.shape[1]), first.stride())
    return torch.cat(list(rows))


def _follows(one: Tensor, other: Tensor) -> bool:
    together = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    next_to = other.storage_offset() == one.storage_offset() + one.numel()
    return together and next_to and one.is_contiguous() and other.is_contiguous()


def _followed(
    plan: Plan, x: Tensor, flat: Sequence[Any], grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> Grads:
    """The same gradients, made by autograd, so that they have gradients themselves."""
    # Views stand in for the inputs: a gradient for one of them must not go on through another's own history.
    given = [t.view_as(t) if isinstance(t, torch.Tensor) and need else t
             for t, need in zip((x, *flat), (needs[0], *needs[2:]), strict=True)]  # fmt: skip
    x, *flat = given
    h = plan.produced(x, flat)
    outputs, cotangents = [], []
    for layer, grad in zip(plan.layers(flat), grads, strict=True):
        if grad is None:
            continue
        if layer.low is None:
            y = layer.kernel.product(h, *layer.tensors)
        else:
            y = plain_product(h, layer.kernel, layer.tensors, LowRank(flat[layer.at], flat[layer.at + 1], layer.scale))
        if y.requires_grad:
            outputs.append(y)
            cotangents.append(grad.reshape(y.shape))
    wanted = [number for number, tensor in enumerate(given) if tensor is not None and (needs[0], *needs[2:])[number]]
    made = torch.autograd.grad(
        outputs, [given[number] for number in wanted], cotangents, create_graph=True, allow_unused=True
    )
    found: list[Tensor | None] = [None] * len(given)
    for number, gradient in zip(wanted, made, strict=True):
        found[number] = gradient
    return (found[0], None, *found[1:])
