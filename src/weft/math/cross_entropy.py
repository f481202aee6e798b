"""The loss of each token from its hidden state, some tokens at a time: the logits of all tokens never exist at once.

Letters: N tokens, D width of a hidden state, V words of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

LOGITS = 1 << 27  # that exist at once: 512 MiB in fp32
FP16_SCALE = 1024.0  # of a gradient that waits in fp16, where a word's share of 1 / V would be lost


@dataclass(frozen=True)
class Logits:
    """What a model does to its head's output h: z = scale h, and with a cap c z = c tanh(scale h / c). Gemma 2,
    arXiv:2408.00118, section 2."""

    scale: float = 1.0
    cap: float | None = None

    def of(self, output: Tensor) -> Tensor:
        """The logits, in fp32; the output itself where they are no others."""
        z = output.float() if self.scale == 1 else output.float() * self.scale
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)

    def slope_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """From dL/dz to dL/dh, written over dL/dz: dz/dh = scale (1 - (z / c)^2)."""
        if self.cap is not None:
            gradient.mul_(1 - (logits / self.cap).square_())
        return gradient if self.scale == 1 else gradient.mul_(self.scale)


PLAIN = Logits()

# (output of the head (n, V), which may be overwritten, labels (n,), logits, whether a gradient is wanted) ->
# losses (n,) fp32, and dL/dh (n, V).
Kernel = Callable[[Tensor, Tensor, Logits, bool], tuple[Tensor, Tensor | None]]


def softmax_losses(output: Tensor, labels: Tensor, logits: Logits, graded: bool) -> tuple[Tensor, Tensor | None]:
    """-log p of labels (n,) under the head's output (n, V), in fp32, and its gradient p - onehot in closed form: all in
    the memory of the logits."""
    z, places = logits.of(output), labels[:, None]
    capped = z.clone() if graded and logits.cap is not None else z
    z.sub_(z.amax(1, keepdim=True))
    own = z.gather(1, places)
    total = z.exp_().sum(1, keepdim=True)
    losses = (total.log() - own).squeeze(1)
    if not graded:
        return losses, None
    gradient = z.div_(total).scatter_add_(1, places, z.new_full((len(labels), 1), -1.0))
    return losses, logits.slope_(gradient, capped)


@dataclass(frozen=True)
class Head:
    """A frozen head h = W x + b, and what is made of its output. weight: (V, D). bias: (V,)."""

    weight: Tensor
    bias: Tensor | None = None
    logits: Logits = PLAIN
    kernel: Kernel = softmax_losses


def head_losses(x: Tensor, labels: Tensor, head: Head, rows: int | None = None) -> Tensor:
    """Losses (N,) fp32 of hidden states x (N, D). The gradient to x is computed on the way forward, so that neither
    logits nor the head's weight wait for the backward pass. rows: tokens at once."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    graded = torch.is_grad_enabled() and x.requires_grad
    with torch.autocast(kind, enabled=False):
        return _HeadLosses.apply(x, labels, head, dtype, rows or rows_of(len(head.weight)), graded)


def rows_of(words: int) -> int:
    """Tokens whose logits may exist at once."""
    return max(1, LOGITS // words)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, head: Head, dtype: torch.dtype, rows: int, graded: bool) -> Tensor:
        weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
        factor = FP16_SCALE if dtype == torch.float16 else 1.0
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        waiting = torch.empty_like(x, dtype=dtype) if graded else None  # dL_n/dx_n
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            output = functional.linear(x[part].to(dtype), weight, bias)
            losses[part], gradient = head.kernel(output, labels[part], head.logits, graded)
            del output
            if waiting is not None:
                assert gradient is not None
                waiting[part] = (gradient if factor == 1 else gradient.mul_(factor)).to(dtype) @ weight
            del gradient  # before the next part's logits are made
        if waiting is not None:
            ctx.save_for_backward(waiting)
            ctx.factor, ctx.dtype = factor, x.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (waiting,) = ctx.saved_tensors
        share = gradients[0][:, None] / ctx.factor
        return (waiting * share).to(ctx.dtype), None, None, None, None, None


def losses_through(
    head: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, logits: Logits, words: int, rows: int | None = None
) -> Tensor:
    """Losses (N,) fp32 through a head that is itself trained, an adapted one say: some tokens at a time, each part
    computed again in the backward pass."""

    def some(x: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits.of(head(x)), labels, reduction="none")

    size = max(1, rows or rows_of(words))
    count = max(1, -(-len(x) // size))  # none of no tokens too: every rank must ask a sharded head
    parts = zip(x.tensor_split(count), labels.tensor_split(count), strict=True)
    return torch.cat([checkpoint(some, *part, use_reentrant=False) for part in parts])
