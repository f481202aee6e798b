"""RMSNorm with a frozen weight: beside its input one number a row is kept, and its gradient is one operator.

y = w x / l sqrt(d) with l = sqrt(|x|^2 + d eps) is a weight norm of each row (Salimans and Kingma 2016,
arXiv:1602.07868, eq. 2), whose gradient torch has as one kernel on a CPU; on an NVIDIA or AMD GPU torch has RMSNorm's
own. Letters: d the width that is normed; a row is what lies before it. Sums are taken in fp32.
"""

from dataclasses import dataclass
from math import log2, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from weft.math.traced import is_followed, must_be_followed

aten = torch.ops.aten


@dataclass(frozen=True)
class RmsNorm:
    """x / sqrt(mean(x^2) + eps) times offset + w; Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4."""

    eps: float
    offset: float

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """y (..., d) of x (..., d) and w (d,), by operators that autograd and compilers follow."""
        if self.offset:
            # 1 + w in half precision would lose most of w.
            return functional.rms_norm(x.float(), x.shape[-1:], self.offset + weight.float(), self.eps).to(x.dtype)
        return functional.rms_norm(x, x.shape[-1:], weight.to(x.dtype), self.eps)

    def forward(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """y in a dtype, and the inverse 1 / sqrt(mean(x^2) + eps) (..., 1), which `again` and `backward` want."""
        if x.is_cuda and not self.offset:
            y, inverse = self._by_one_kernel(x, weight)
            return y.to(dtype), inverse
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x))
        inverse = inverse.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return self.again(x, weight, inverse, dtype), inverse

    def again(self, x: Tensor, weight: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
        """y once more. Without an offset it is rounded before its weight too, as Llama's own code does."""
        if self.offset or x.dtype != dtype:
            return torch.mul(x * inverse, self._scale(weight, inverse), out=torch.empty_like(x, dtype=dtype))
        if x.is_cuda:
            return self._by_one_kernel(x, weight)[0]
        return torch.mul(x, inverse, out=torch.empty_like(x)).mul_(weight)

    def backward(self, x: Tensor, grad: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
        """dL/dx in x's dtype of dL/dy: with g = w dy and the inverse r, r g - r^3 x mean(x g)."""
        if x.is_cuda:
            own = None if self.offset else weight.to(x.dtype)
            grad = _scaled(grad, self._scale(weight, inverse), x) if self.offset else grad.to(x.dtype)
            return aten._fused_rms_norm_backward(grad, x, x.shape[-1:], inverse, own, (True, False))[0]
        if x.device.type == "cpu" and x.numel():  # of no rows torch divides by their number
            return _by_weight_norm(x, grad, self._scale(weight, inverse), inverse)
        return plain_gradient(x, grad, self._scale(weight, inverse), inverse)

    def _by_one_kernel(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return aten._fused_rms_norm(x, x.shape[-1:], weight.to(x.dtype), self.eps)

    def _scale(self, weight: Tensor, inverse: Tensor) -> Tensor:
        scale = weight.to(inverse.dtype)
        return scale + self.offset if self.offset else scale


def plain_gradient(x: Tensor, grad: Tensor, scale: Tensor, inverse: Tensor) -> Tensor:
    """`RmsNorm.backward` in plain arithmetic, for devices without a kernel of it."""
    wide, inner = x.to(inverse.dtype), grad * scale
    dot = (inner * wide).mean(-1, keepdim=True).mul_(inverse.pow(3))
    return inner.mul_(inverse).addcmul_(wide, dot, value=-1).to(x.dtype)


def _by_weight_norm(x: Tensor, grad: Tensor, scale: Tensor, inverse: Tensor) -> Tensor:
    """Weight norm of rows v has dv = (g / |v|) (dw - v (v . dw) / |v|^2). g, in x's dtype, is a power of two near
    sqrt(d), so that it is not rounded; what is missing goes into the scale."""
    width = x.shape[-1]
    near = 2.0 ** round(log2(width) / 2)
    rows = x.reshape(-1, width).contiguous()
    weighed = _scaled(grad.reshape(-1, width), scale * (sqrt(width) / near), rows)
    lengths = (sqrt(width) / inverse).view(-1, 1)
    given = rows.new_full(lengths.shape, near)
    return aten._weight_norm_interface_backward(weighed, rows, given, lengths, 0)[0].view(x.shape)


def _scaled(grad: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """grad scale, rounded once to another's dtype."""
    return torch.mul(grad, scale, out=torch.empty_like(like))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class Normed:
    """h = norm(x) of x (..., d): a Producer. weight: (d,). dtype: of h.

    The inverse of x (one number a row) stays here between the passes: one of these is made for each call.
    """

    def __init__(self, norm: RmsNorm, weight: Tensor, dtype: torch.dtype) -> None:
        self.tensors = (weight,)
        self.norm, self.dtype = norm, dtype
        self.inverse: Tensor | None = None

    def forward(self, x: Tensor, *tensors: Tensor) -> Tensor:
        (weight,) = tensors
        if is_followed():
            return self.norm(x, weight).to(self.dtype)
        if self.inverse is not None:
            return self.norm.again(x, weight, self.inverse, self.dtype)
        h, self.inverse = self.norm.forward(x, weight, self.dtype)
        return h

    def backward(self, x: Tensor, grad: Tensor, *tensors: Tensor) -> Tensor:
        (weight,) = tensors
        if self.inverse is None:
            _, self.inverse = self.norm.forward(x, weight, self.dtype)
        return self.norm.backward(x, grad, weight, self.inverse)


def normed(x: Tensor, weight: Tensor, norm: RmsNorm) -> Tensor:
    """norm(x) for whoever multiplies with it by himself: x and a number a row are kept."""
    if must_be_followed(weight) or not x.requires_grad:
        return norm(x, weight)
    return _Normed.apply(x, weight, norm)


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, norm: RmsNorm) -> Tensor:
        ctx.norm = norm
        y, inverse = norm.forward(x, weight, x.dtype)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        return ctx.norm.backward(x, grads[0], weight, inverse), None, None
