"""Liger's Triton kernels under our own signatures; the one file that knows the package."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from weft.contracts import UNLEARNED
from weft.errors import ConfigError
from weft.math.cross_entropy import Kernel, Logits


@dataclass(frozen=True)
class Liger:
    """norm: x, weight, eps, offset, casting mode, in place. gated: by activation. turned: q, k, cos, sin."""

    norm: Callable[[Tensor, Tensor, float, float, str, bool], Tensor]
    gated: dict[str, Callable[[Tensor, Tensor], Tensor]]
    turned: Callable[..., tuple[Tensor, Tensor]]
    losses: Kernel


def liger(kernel: str) -> Liger:
    """Raises ConfigError, naming the kernel that was asked for, where the package or a GPU is not there."""
    if find_spec("liger_kernel") is None:
        raise ConfigError(
            f"family.kernels.{kernel}: 'liger' needs the package liger-kernel, which is not installed. Install it with "
            f"pip install 'weft[liger]', or write family.kernels.{kernel}=auto."
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            f"family.kernels.{kernel}: 'liger' runs on a GPU, and torch sees none. Write family.kernels.{kernel}=auto."
        )
    return opened()


@cache
def opened() -> Liger:
    """The package's functions."""
    norm, swiglu, geglu, rope, head = (
        import_module(f"liger_kernel.ops.{name}") for name in ("rms_norm", "swiglu", "geglu", "rope", "cross_entropy")
    )

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        return rope.LigerRopeFunction.apply(q, k, cos, sin, None, unsqueeze_dim)

    def losses(output: Tensor, labels: Tensor, logits: Logits, graded: bool) -> tuple[Tensor, Tensor | None]:
        # The kernel writes dL/dz over z, rounded as z is: so z is in fp32. A scale it does not know; a cap it does.
        z = output.float() if logits.scale == 1 else output.float().mul_(logits.scale)
        z = z.contiguous().requires_grad_(graded)  # by which the kernel is told whether to write
        found, *_, gradient = head.cross_entropy_forward(
            z, labels, None, UNLEARNED, 0.0, 0.0, "none", logits.cap, False
        )
        gradient = gradient.detach()
        if not graded:
            return found.float(), None
        return found.float(), gradient if logits.scale == 1 else gradient.mul_(logits.scale)

    return Liger(
        norm=norm.LigerRMSNormFunction.apply,
        gated={"silu": swiglu.LigerSiLUMulFunction.apply, "gelu": geglu.LigerGELUMulFunction.apply},
        turned=turned,
        losses=losses,
    )
