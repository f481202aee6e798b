"""Tensors that may lie in parts on several processes: the whole of one, and one's own part of a whole.

Ordinary tensors are their own whole. Of DTensors those are meant that FSDP2 makes: cut along dimensions, or copied.
ZeRO-3 spreads frozen weights alone: adapters stay whole under it, so that `fill` and `like` meet ordinary tensors.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@runtime_checkable
class Spread(Protocol):
    """What DeepSpeed's ZeRO-3 makes of a parameter: empty until it is gathered."""

    ds_id: int

    def all_gather(self, param_list: Sequence[Any]) -> Any: ...
    def partition(self, param_list: Sequence[Any]) -> Any: ...


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor: of one that is sharded put together from all processes, every one of which must ask; else
    itself."""
    if not tensor.numel() and isinstance(tensor, Spread):
        tensor.all_gather([tensor])
        found = tensor.detach().clone()
        tensor.partition([tensor])
        return found
    return put_together(tensor) if isinstance(tensor, DTensor) else tensor


def put_together(tensor: DTensor) -> Tensor:
    """All of a DTensor. One that FSDP2 has cut along a dimension is gathered by one plain collective: `full_tensor`
    goes through torch's registry of pending works, in which a process was twice seen to end by a segmentation fault
    (torch 2.13, gloo). Others, and what a gradient is taken of, are torch's to put together."""
    placed = [(number, placement) for number, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    cut = [(n, placement) for n, placement in placed if isinstance(placement, Shard) and type(placement) is Shard]
    if len(placed) != 1 or len(cut) != 1 or (tensor.requires_grad and torch.is_grad_enabled()):
        return tensor.full_tensor()
    ((number, placement),) = cut
    group, dim = tensor.device_mesh.get_group(number), placement.dim % tensor.ndim
    size = tensor.shape[dim]
    rows = -(-size // group.size())  # as torch.chunk cuts: the last ones may have fewer
    own = tensor.to_local().detach().movedim(dim, 0)
    part = own.new_zeros((rows, *own.shape[1:]))
    part[: len(own)] = own
    gathered = part.new_empty((rows * group.size(), *own.shape[1:]))
    if gathered.numel():
        # As bytes: not every backend gathers numbers of eight bits.
        dist.all_gather_into_tensor(gathered.view(torch.uint8), part.view(torch.uint8), group=group)
    return gathered[:size].movedim(0, dim).contiguous()


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory: of a DTensor its part, which may be empty."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a target of its shape; of a sharded one into the part that is here, in silence."""
    assert target.shape == value.shape, f"{tuple(value.shape)} into {tuple(target.shape)}"
    held(target).copy_(_part(target, value))


@torch.no_grad()
def like(target: Tensor, value: Tensor) -> Tensor:
    """A new tensor with a whole tensor's numbers and dtype, on the target's device and sharded as that is."""
    assert target.shape == value.shape, f"{tuple(value.shape)} like {tuple(target.shape)}"
    part = torch.empty_like(held(target), dtype=value.dtype, requires_grad=False).copy_(_part(target, value))
    if not isinstance(target, DTensor):
        return part
    return DTensor.from_local(
        part, target.device_mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
    )


def whole_rows(tensor: Tensor, own: Tensor) -> Tensor:
    """One number for each row (rows,) of a tensor that is cut along its rows, of what each process made of its own."""
    assert isinstance(tensor, DTensor)
    parts = DTensor.from_local(
        own, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape[:1], stride=(1,)
    )
    return put_together(parts)


def _part(target: Tensor, value: Tensor) -> Tensor:
    """A view of what this process holds of the target, in a whole tensor."""
    if not isinstance(target, DTensor):
        return value
    sizes, begins = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    return value[tuple(slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True))]
