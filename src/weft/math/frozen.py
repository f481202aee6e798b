"""A product with a frozen weight, made as a kernel knows how: gradients go to the input alone, by the kernel's way."""

from typing import Any, Protocol

import torch
from torch import Tensor


class Multiplier(Protocol):
    """How a frozen layer multiplies: x (N, in) -> (N, out) in x's dtype, and back."""

    def multiplied(self, x: Tensor, *tensors: Tensor | None) -> Tensor: ...
    def gradient(self, grad: Tensor, *tensors: Tensor | None) -> Tensor: ...


def frozen_product(multiplier: Multiplier, x: Tensor, *tensors: Tensor | None) -> Tensor:
    """x (..., in) -> (..., out). tensors: the layer's own, its bias last. For the backward pass all but that one
    are kept, which are there anyhow."""
    return _Product.apply(x, multiplier, *tensors)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, multiplier: Multiplier, *tensors: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = multiplier.multiplied(x.reshape(-1, x.shape[-1]), *tensors)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.multiplier, *tensors, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), tensors = gradients, ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            found = ctx.multiplier.gradient(grad.reshape(-1, grad.shape[-1]), *tensors, None)
        return (found.view(*grad.shape[:-1], found.shape[-1]), None, *(None for _ in tensors), None)
