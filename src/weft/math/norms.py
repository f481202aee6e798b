"""Layer norms whose scale and shift come with the times, and gated sums: pointwise, with gradients in closed form.

Letters: B items, N tokens, d width. U rows of modulation for each item: N divides by U, and each row is that of N / U
tokens in order: one where an item has one time, one for each frame where frames have their own. Sums are taken in fp32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from weft.math.traced import is_followed, must_be_followed

aten = torch.ops.aten


class Modulated:
    """h = norm(x) weight + bias of x (B, N, d): a Producer. weight, bias: (B or 1, U, d) fp32. dtype: of h.

    Statistics of x (two numbers a token) stay here between the passes: one of these is made for each call.
    """

    def __init__(self, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> None:
        self.tensors = (weight, bias)
        self.eps, self.dtype = eps, dtype
        self.statistics: tuple[Tensor, Tensor] | None = None  # mean and 1 / deviation (B, N, 1)

    def forward(self, x: Tensor, *tensors: Tensor) -> Tensor:
        weight, bias = tensors
        if is_followed():
            normed = functional.layer_norm(x.float(), x.shape[-1:], eps=self.eps)
            return (in_rows(normed, weight) * weight[:, :, None] + bias[:, :, None]).flatten(1, 2).to(self.dtype)
        width = x.shape[-1:]
        if _is_one_row(x, weight):
            h, mean, inverse = aten.native_layer_norm(x, width, weight.view(-1), bias.view(-1), self.eps)
            self.statistics = mean, inverse
            return h.to(self.dtype)
        if x.dtype == weight.dtype:
            normed, mean, inverse = aten.native_layer_norm(x, width, None, None, self.eps)
            self.statistics = mean, inverse
        else:
            mean, inverse = self._statistics(x)
            normed = torch.addcmul(mean * -inverse, x, inverse)  # fp32: autograd's layer norm would round it to x's
        rows = in_rows(normed, weight)
        h = torch.empty_like(rows, dtype=self.dtype)
        return torch.addcmul(bias[:, :, None], rows, weight[:, :, None], out=h).flatten(1, 2)

    def backward(self, x: Tensor, grad: Tensor, *tensors: Tensor) -> Tensor:
        weight, bias = tensors
        mean, inverse = self._statistics(x)
        width, wanted = x.shape[-1:], (True, False, False)
        if _is_one_row(x, weight):
            scale = weight.view(-1)
            grad = grad.to(x.dtype)
            return aten.native_layer_norm_backward(grad, x, width, mean, inverse, scale, bias.view(-1), wanted)[0]
        rows = in_rows(grad, weight)
        scaled = torch.mul(rows, weight[:, :, None], out=torch.empty_like(rows, dtype=x.dtype)).flatten(1, 2)
        return aten.native_layer_norm_backward(scaled, x, width, mean, inverse, *_units(x), wanted)[0]

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.statistics is None:
            _, mean, inverse = aten.native_layer_norm(x, x.shape[-1:], *_units(x), self.eps)
            self.statistics = mean, inverse
        return self.statistics


class Gelu:
    """h = gelu(x) by its tanh formula: a Producer."""

    tensors: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor, *tensors: Tensor) -> Tensor:
        return functional.gelu(x, approximate="tanh")

    def backward(self, x: Tensor, grad: Tensor, *tensors: Tensor) -> Tensor:
        return aten.gelu_backward(grad.to(x.dtype), x, approximate="tanh")


GELU = Gelu()


def modulated(x: Tensor, norm: Modulated) -> Tensor:
    """h of a norm for whoever multiplies with it by himself: x alone is kept."""
    if must_be_followed(*norm.tensors) or not x.requires_grad:
        return norm.forward(x, *norm.tensors)
    return _Modulated.apply(x, norm, *norm.tensors)


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y gate (B, N, d) in x's dtype. gate: (B or 1, U, d) fp32."""
    if must_be_followed(gate):
        return (x.float() + (in_rows(y, gate) * gate[:, :, None]).flatten(1, 2)).to(x.dtype)
    return _Gated.apply(x, y, gate)


def in_rows(x: Tensor, modulation: Tensor) -> Tensor:
    """(B, U, N / U, d) of x (B, N, d)."""
    return x.unflatten(1, (modulation.shape[1], -1))


class _Modulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Modulated, *tensors: Tensor) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x, *tensors)
        return norm.forward(x, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        return ctx.norm.backward(x, grad, *tensors), None, *(None for _ in tensors)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate)
        ctx.dtype = y.dtype
        rows, summands = in_rows(x, gate), in_rows(y, gate)
        # Into the wanted dtype at once: fp32 in between stays in the kernel.
        return torch.addcmul(rows, summands, gate[:, :, None], out=torch.empty_like(rows)).flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gate,) = ctx.saved_tensors
        of_y = None
        if ctx.needs_input_grad[1]:
            rows = in_rows(grad, gate)
            of_y = torch.mul(rows, gate[:, :, None], out=torch.empty_like(rows, dtype=ctx.dtype)).flatten(1, 2)
        return grad, of_y, None


def _is_one_row(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own kernel takes weight and bias as its own: on a GPU they must have x's dtype."""
    return weight.shape[:2] == (1, 1) and (weight.dtype == x.dtype or x.device.type == "cpu")


def _units(x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias that change nothing. On a CPU they make torch keep the statistics of half precision in fp32."""
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return None, None
    return torch.ones(x.shape[-1], device=x.device), torch.zeros(x.shape[-1], device=x.device)
