"""Gradients as several processes hold them: summed, measured and cut to a length; and the step that they make."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.engines.flat_adamw import FlatAdamW, clear
from weft.math.end_to_end import EndToEnd

EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s, so that every engine cuts alike


def divisor(norm: Tensor, max_norm: float, scale: Tensor | None) -> Tensor | None:
    """What a gradient of that norm () fp32 is to be divided by: the loss scale that is in it, and as much as brings it
    down to max_norm (0: no limit), which is exactly 1 for one that is no longer. None: by nothing."""
    if not max_norm:
        return scale
    excess = torch.where(norm > max_norm, (norm + EPSILON) / max_norm, 1.0)
    return excess if scale is None else excess * scale


def decides_on_device(optimizer: Optimizer) -> bool:
    """Whether an optimizer's kernels look at `found_inf` and `grad_scale` themselves, as torch's fused ones do."""
    return bool(vars(optimizer).get("_step_supports_amp_scaling", False))


def move(optimizer: Optimizer, gradient: Sequence[Tensor], by: Tensor | None, moved: Tensor) -> None:
    """Let an optimizer step by a gradient that is divided `by` something, unless moved () is False. The host reads
    that only for optimizers that cannot."""
    if decides_on_device(optimizer):
        flags = {"grad_scale": by, "found_inf": torch.where(moved, 0.0, 1.0)}
        vars(optimizer).update(flags)
        optimizer.step()
        for name in flags:
            delattr(optimizer, name)
    elif bool(moved):
        if by is not None and gradient:
            torch._foreach_div_(list(gradient), by)  # pyright: ignore[reportPrivateImportUsage]
        optimizer.step()


# ---- Over processes ------------------------------------------------------------------------------------------------


@torch.no_grad()
def sum_over_processes(optimizer: Optimizer) -> int:
    """Replace every gradient by its sum over all processes, in fp32 and in one collective. Returns its bytes.

    One that this process lacks counts as zeros; one that no process has stays None. Which those are travels along.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, FlatAdamW):
        optimizer.gather_from(lambda where: _summed(where, parameters))
        return 4 * (EndToEnd([parameters]).length + len(parameters))
    where = EndToEnd([parameters])
    flat, there = _summed(where, parameters)
    for p, part, has in zip(parameters, where.views(flat), there, strict=True):
        p.grad = part.to(p.dtype) if has else None
    return 4 * (where.length + len(parameters))


def _summed(where: EndToEnd, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, list[bool]]:
    """The gradients' sum over all processes, end to end, and which parameters have one in any; here they are dropped.
    The host waits for the sum only where this process lacks one."""
    device = parameters[0].device
    here = [p.grad is not None for p in parameters]
    processes = torch.ones(len(here), device=device) if all(here) else torch.tensor(here, device=device).float()
    gradients = [torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.float() for p in parameters]
    flat = where.laid(gradients, processes)
    del gradients
    clear(parameters)
    dist.all_reduce(flat)
    there = here if all(here) else [count > 0 for count in flat[where.length :].tolist()]
    return flat[: where.length], there


def norm_over_shards(gradients: Sequence[Tensor], group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """The length (fp32) of a gradient of which each process of a group holds a part.

    Squares are gathered and added in the order of ranks, in fp64: every process gets the same bits.
    """
    norms = torch._foreach_norm(list(gradients)) if gradients else []  # pyright: ignore[reportPrivateImportUsage]
    own = torch.stack(list(norms)).double().square().sum() if norms else torch.zeros((), dtype=torch.double)
    every = [torch.zeros((), dtype=torch.double, device=device) for _ in range(group.size())]
    dist.all_gather(every, own.to(device), group=group)
    return torch.stack(every).sum().sqrt().float()
