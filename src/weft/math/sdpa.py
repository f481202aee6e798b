"""torch's fused attention kernels by name, forward and backward, and which of them torch runs for given tensors.

Shapes: q (B, H, M, D), k and v (B, H, N, D); a kernel knows no mask and no dropout. A causal one, where queries see the
keys before them alone, takes keys of fewer heads too. Whoever keeps
(q, k, v, out, logsumexp, extras) of a forward call can call its backward without autograd having seen either.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
CHOICES = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "overrideable"}  # torch's SDPBackend

Answer = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # out (B, H, M, D), logsumexp (B, H, M) fp32, extras
Gradients = tuple[Tensor, Tensor, Tensor]  # of q, k and v


class Kernel(Protocol):
    """A fused kernel. extras: what it wants back beside the rest; (): of a forward that was another's, as in a ring,
    where out and logsumexp are those of attention over all keys."""

    name: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Answer: ...
    def backward(
        self, grad: Tensor, asked: Gradients, out: Tensor, logsumexp: Tensor, scale: float,
        extras: tuple[Tensor, ...] = (),
    ) -> Gradients: ...  # fmt: skip


class CpuFlash:
    """torch's flash attention for a CPU."""

    name = "cpu-flash"

    def __init__(self, causal: bool = False) -> None:
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Answer:
        out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, self.causal, scale=scale)
        return out, logsumexp, ()

    def backward(
        self, grad: Tensor, asked: Gradients, out: Tensor, logsumexp: Tensor, scale: float,
        extras: tuple[Tensor, ...] = (),
    ) -> Gradients:  # fmt: skip
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, *asked, out, logsumexp, 0.0, self.causal, scale=scale)


class Flash:
    """The flash attention that torch has on a GPU: its own second version, or the third or fourth once activated."""

    name = "flash"

    def __init__(self, causal: bool = False) -> None:
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Answer:
        answer = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, self.causal, scale=scale)
        out, logsumexp, _, _, _, _, state, unused, _ = answer
        return out, logsumexp, (state, unused)

    def backward(
        self, grad: Tensor, asked: Gradients, out: Tensor, logsumexp: Tensor, scale: float,
        extras: tuple[Tensor, ...] = (),
    ) -> Gradients:  # fmt: skip
        q, k, _ = asked
        # Only dropout would read the state of chance; the lengths of ragged batches are nothing for dense ones.
        state, unused = extras or _no_chance(q, torch.uint64, (0,))
        dense = (None, None, q.shape[2], k.shape[2])
        backward = aten._scaled_dot_product_flash_attention_backward
        return backward(grad, *asked, out, logsumexp, *dense, 0.0, self.causal, state, unused, scale=scale)


class Cudnn:
    """cuDNN's: the fastest of torch's own on Hopper and Blackwell. It plans once for each (B, M, N)."""

    name = "cudnn"

    def __init__(self, causal: bool = False) -> None:
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Answer:
        answer = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, self.causal, scale=scale)
        out, logsumexp, _, _, _, _, seed, offset, _ = answer
        return out, logsumexp.view(q.shape[:3]), (seed, offset)

    def backward(
        self, grad: Tensor, asked: Gradients, out: Tensor, logsumexp: Tensor, scale: float,
        extras: tuple[Tensor, ...] = (),
    ) -> Gradients:  # fmt: skip
        q, k, _ = asked
        seed, offset = extras or _no_chance(q, torch.int64, ())
        dense = (None, None, None, q.shape[2], k.shape[2])  # no bias, no ragged lengths
        backward = aten._scaled_dot_product_cudnn_attention_backward
        statistics = logsumexp.unsqueeze(-1)  # (B, H, M, 1), as cuDNN gives it
        return backward(grad, *asked, out, statistics, seed, offset, *dense, 0.0, self.causal, scale=scale)


class Efficient:
    """The memory-efficient kernel, which runs on every NVIDIA GPU since Maxwell: Volta and Turing have no other."""

    name = "efficient"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Answer:
        out, logsumexp, seed, offset = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
        return out, logsumexp[..., : q.shape[2]], (seed, offset, logsumexp)

    def backward(
        self, grad: Tensor, asked: Gradients, out: Tensor, logsumexp: Tensor, scale: float,
        extras: tuple[Tensor, ...] = (),
    ) -> Gradients:  # fmt: skip
        seed, offset, padded = extras or (*_no_chance(asked[0], torch.int64, ()), _padded(logsumexp))
        wanted = (True, True, True, False)
        backward = aten._scaled_dot_product_efficient_attention_backward
        found = backward(grad, *asked, None, out, padded, seed, offset, 0.0, wanted, False, scale=scale)
        return found[0], found[1], found[2]


KERNELS: Mapping[str, Kernel] = {each.name: each for each in (CpuFlash(), Flash(), Cudnn(), Efficient())}
CAUSAL: Mapping[str, Kernel] = {each.name: each for each in (CpuFlash(True), Flash(True), Cudnn(True))}
ROWS_OF_EFFICIENT = 32  # its log-sum-exps are kept for so many queries at a time


def _no_chance(q: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What stands for the state of chance where there is no dropout."""
    nothing = torch.empty(shape, dtype=dtype, device=q.device)
    return nothing, nothing


def _padded(logsumexp: Tensor) -> Tensor:
    """(B, H, M) with M filled up as the memory-efficient kernel reads it: infinity takes weights to zero."""
    if torch.version.hip is not None:  # AMD's is not padded
        return logsumexp
    short = -logsumexp.shape[-1] % ROWS_OF_EFFICIENT
    return torch.nn.functional.pad(logsumexp, (0, short), value=float("inf"))


def kernel_for(q: Tensor, k: Tensor, v: Tensor) -> Kernel | None:
    """The fused kernel that torch itself would run for these dense tensors; None where there is none.

    On a GPU it follows torch's own order of preference, and so the policy that a run sets (`math/sdpa_policy.py`).
    """
    if q.shape[-1] != v.shape[-1] or q.shape[1] != k.shape[1]:
        return None
    kind = q.device.type
    if kind == "cpu":  # torch says nothing of fake tensors, which must go the way of real ones
        known = q.dtype in (*HALF, torch.float32, torch.float64) and torch.backends.cuda.flash_sdp_enabled()
        return KERNELS["cpu-flash"] if known else None
    if kind != "cuda" or q.shape[-1] % 8:
        return None  # heads of other widths are padded outside of the kernels
    return KERNELS.get(CHOICES[torch._fused_sdp_choice(q, k, v)])


def causal_kernel_for(q: Tensor, k: Tensor, v: Tensor) -> Kernel | None:
    """The same of causal attention, for keys of as many heads or fewer."""
    kind, grouped = q.device.type, q.shape[1] != k.shape[1]
    if q.shape[-1] != v.shape[-1]:
        return None
    if kind == "cpu":
        known = q.dtype in (*HALF, torch.float32, torch.float64) and torch.backends.cuda.flash_sdp_enabled()
        return CAUSAL["cpu-flash"] if known else None
    if kind != "cuda" or q.shape[-1] % 8:
        return None
    return CAUSAL.get(CHOICES[torch._fused_sdp_choice(q, k, v, None, 0.0, True, enable_gqa=grouped)])


def backend_of(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> str:
    """The name of what torch's scaled_dot_product_attention runs for such tensors: cudnn, flash, efficient, math."""
    kind = q.device.type
    if kind == "mps":
        return "mps"  # torch asks Metal, and there is no choice
    grouped = q.shape[1] != k.shape[1]
    choice = CHOICES[torch._fused_sdp_choice(q, k, v, mask, 0.0, causal, enable_gqa=grouped)]
    if kind == "cpu" and choice == "flash":
        return KERNELS["cpu-flash"].name
    version = torch.nn.attention.current_flash_attention_impl() if choice == "flash" else None
    return choice if version is None else f"{choice} ({version})"
