"""Attention some queries at a time, for devices whose own would keep the scores of all of them: Apple's GPUs."""

from torch import Tensor

from weft.math.attention import partial_attention, partial_gradients
from weft.math.sdpa import Answer, Gradients, Kernel, kernel_for


class Tiled:
    """Exact, in plain products: forward and backward hold the scores of one tile (`attention.TILE` numbers)."""

    name = "tiled"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Answer:
        out, logsumexp = partial_attention(q, k, v, None, scale)
        return out.to(q.dtype), logsumexp, ()

    def backward(
        self, grad: Tensor, asked: Gradients, out: Tensor, logsumexp: Tensor, scale: float,
        extras: tuple[Tensor, ...] = (),
    ) -> Gradients:  # fmt: skip
        found = partial_gradients(grad, out, logsumexp, *asked, None, scale)
        dq, dk, dv = (part.to(each.dtype) for part, each in zip(found, asked, strict=True))
        return dq, dk, dv


TILED = Tiled()


def kernel_here(q: Tensor, k: Tensor, v: Tensor) -> Kernel | None:
    """The fused kernel that torch itself would run, or tiles where it would keep all scores; None: torch's own way."""
    return TILED if q.device.type == "mps" else kernel_for(q, k, v)
