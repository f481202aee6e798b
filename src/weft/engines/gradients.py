"""Gradients as several processes hold them: summed, measured and cut to a length."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s, so that every engine cuts alike


def clip(gradients: Sequence[Tensor], max_norm: float, total: Tensor) -> None:
    """Scale gradients in place from the length total (fp32) to max_norm."""
    factor = (max_norm / (total + EPSILON)).clamp(max=1.0)
    torch._foreach_mul_(list(gradients), factor)  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def sum_over_processes(parameters: Sequence[nn.Parameter]) -> int:
    """Replace every gradient by its sum over all processes, in fp32 and in one collective. Returns its bytes.

    One that this process lacks counts as zeros; one that no process has stays None. Which those are travels along.
    """
    sizes = [p.numel() for p in parameters]
    device = parameters[0].device
    flat = torch.zeros(sum(sizes) + len(sizes), device=device)
    parts, there = flat[: sum(sizes)].split(sizes), flat[sum(sizes) :]
    mine = [(part, p.grad) for part, p in zip(parts, parameters, strict=True) if p.grad is not None]
    if mine:
        views, own = zip(*[(part.view_as(gradient), gradient) for part, gradient in mine], strict=True)
        torch._foreach_copy_(views, own)  # pyright: ignore[reportPrivateImportUsage]
    there.copy_(torch.tensor([float(p.grad is not None) for p in parameters]))
    dist.all_reduce(flat)
    for p, part, processes in zip(parameters, parts, there.tolist(), strict=True):
        p.grad = part.view_as(p).to(p.dtype) if processes else None
    return flat.nbytes


def norm_over_shards(gradients: Sequence[Tensor], group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """The length (fp32) of a gradient of which each process of a group holds a part.

    Squares are gathered and added in the order of ranks, in fp64: every process gets the same bits.
    """
    norms = torch._foreach_norm(list(gradients)) if gradients else []  # pyright: ignore[reportPrivateImportUsage]
    own = torch.stack(list(norms)).double().square().sum() if norms else torch.zeros((), dtype=torch.double)
    every = [torch.zeros((), dtype=torch.double, device=device) for _ in range(group.size())]
    dist.all_gather(every, own.to(device), group=group)
    return torch.stack(every).sum().sqrt().float()
