"""A frozen linear layer and what an adapter adds to it at the moment: families ask here, adapters and storages tell.

Letters: N tokens (all dimensions before the last), r rank. A family that computes a block by itself does not call its
linear layers; it asks what each of them is at the moment, and multiplies with that in `math/products.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

CHANGE = "weft_change"  # attribute of an adapted layer or its wrapper, () -> LowRank | None | Opaque
KERNEL = "weft_kernel"  # attribute of a layer whose weight is not plain numbers, () -> tuple[Kernel, tensors]
FORWARD = "weft_forward"  # attribute of a layer whose forward an adapter has replaced: that which stands there
HOOKS = "weft_hooks"  # attribute of an adapted layer: how many of its hooks around forward are its adapter's
SPREAD = "ds_id"  # what DeepSpeed's ZeRO-3 writes on weights that are there only while their module runs


@dataclass(frozen=True, slots=True)
class LowRank:
    """y += scale x A^T B^T. a: (r, in), b: (out, r), both fp32 and trained.

    scale: a number, or while torch compiles a tensor () of fp32, so that another scale is no other graph. narrow: A and
    B as whoever tells has cast them, in half precision; None: they are cast for each product.
    """

    a: Tensor
    b: Tensor
    scale: float | Tensor
    narrow: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Opaque:
    """What an adapter does here cannot be said so: the module itself must be called. reason: for whoever wonders."""

    reason: str


class Kernel(Protocol):
    """How a frozen layer multiplies, given the tensors that it is made of."""

    def product(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        """x W^T + b (N, out) of x (N, in), in x's dtype: a new tensor."""
        ...

    def gradient(self, grad: Tensor, *tensors: Tensor | None) -> Tensor:
        """dL/dx = grad W (N, in) of grad (N, out), in grad's dtype: a new tensor."""
        ...


class Plain:
    """A weight (out, in) that lies in memory as numbers, and a bias (out,) or None."""

    def product(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        weight, bias = tensors
        assert weight is not None
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def gradient(self, grad: Tensor, *tensors: Tensor | None) -> Tensor:
        weight, _ = tensors
        assert weight is not None
        return grad @ weight.to(grad.dtype)


PLAIN = Plain()


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer as it stands at the moment. kernel None: the module itself must be called."""

    module: nn.Module
    kernel: Kernel | None = None
    tensors: tuple[Tensor | None, ...] = ()
    change: LowRank | None = None


def projection(module: nn.Module) -> Projection:
    """What a linear layer, or the wrapper around it, does at the moment."""
    tell: Callable[[], LowRank | Opaque | None] | None = getattr(module, CHANGE, None)
    change = None if tell is None else tell()
    base = base_of(module)
    if base is None or isinstance(change, Opaque):
        return Projection(module)
    of_storage = getattr(base, KERNEL, None)
    if of_storage is not None:
        kernel, tensors = of_storage()
        return Projection(module, kernel, tensors, change)
    weight = base._parameters.get("weight")
    # A weight that is trained, not whole here or not plain numbers, or another forward, is the module's own business.
    if type(base).forward is not nn.Linear.forward or weight is None or weight.requires_grad:
        return Projection(module)
    if tuple(weight.shape) != (base.out_features, base.in_features) or not weight.is_floating_point():
        return Projection(module)
    return Projection(module, PLAIN, (weight, base._parameters.get("bias")), change)


def counted(module: nn.Module) -> None:
    """Say of one hook more on a module that it is its adapter's, and does nothing that `CHANGE` does not tell."""
    module.__dict__[HOOKS] = module.__dict__.get(HOOKS, 0) + 1


def base_of(module: nn.Module) -> nn.Linear | None:
    """The frozen linear layer: the module itself, or the one inside PEFT's wrappers. None for anything else, and where
    somebody else has a say in what a layer does."""
    while not isinstance(module, nn.Linear):
        inner = module._modules.get("base_layer")
        if inner is None or CHANGE not in module.__dict__ or _is_touched(module):
            return None
        module = inner
    return None if _is_touched(module) else module


def _is_touched(module: nn.Module) -> bool:
    """Whether hooks or a forward stand on a module that are not its adapter's, or its weight is spread: who computes
    without asking the module would go past them."""
    own: dict[str, Any] = module.__dict__
    if len(module._forward_hooks) + len(module._forward_pre_hooks) > own.get(HOOKS, 0):
        return True
    if module._backward_hooks or module._backward_pre_hooks or own.get("forward") is not own.get(FORWARD):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and hasattr(weight, SPREAD)


def computing_dtype(x: Tensor) -> torch.dtype:
    """In which a linear layer multiplies x: autocast's dtype, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
