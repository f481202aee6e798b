"""Weights under ZeRO-3: cut as they are read, gathered by DeepSpeed when a module asks; adapters stay whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.engines.zero_setup import Zero, library


@dataclass
class Cut:
    """This process's parts of tensors that are whole nowhere, each under the address of the stand-in that a network
    holds meanwhile: of its shape and dtype, with the memory of one number."""

    rank: int
    world: int
    device: torch.device
    parts: dict[int, Tensor] = field(default_factory=dict)
    stand_ins: list[Tensor] = field(default_factory=list)  # kept, so that no address is used again

    def take(self, tensor: Tensor, block: int | None, blocks: int) -> Tensor:
        """A Put. Parts are of equal length, as DeepSpeed cuts: the last ones may end in zeros."""
        if not tensor.numel() or not tensor.ndim:
            return tensor.to(self.device)
        length = -(-tensor.numel() // self.world)
        numbers = tensor.reshape(-1)[self.rank * length : (self.rank + 1) * length]
        part = torch.zeros(length, dtype=tensor.dtype, device=tensor.device)
        part[: len(numbers)] = numbers
        stand_in = torch.empty(1, dtype=tensor.dtype, device=self.device).expand(tensor.shape)
        self.parts[stand_in.data_ptr()] = part
        self.stand_ins.append(stand_in)
        return stand_in

    def part_of(self, tensor: Tensor) -> Tensor | None:
        """Handed out once, so that it is not held twice."""
        return self.parts.pop(tensor.data_ptr(), None) if tensor.numel() else None

    def clear(self) -> None:
        self.parts.clear()
        self.stand_ins.clear()


@torch.no_grad()
def spread(network: nn.Module, cut: Cut, zero: Zero) -> None:
    """Make each frozen parameter of a network one of ZeRO-3's, with this process's part of it."""
    deepspeed = library(cut.device)
    frozen: list[Any] = [p for p in network.parameters() if not p.requires_grad]
    # Without its own linear function, which it would put into torch itself for the rest of the process.
    init: Any = deepspeed.zero.Init(
        config_dict_or_path=zero.config([1], cut.device), mem_efficient_linear=False, enabled=True
    )
    for parameter in frozen:
        part = cut.part_of(parameter)
        if part is None:
            parameter.data = parameter.data.to(cut.device)
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()
        if part is not None and part.device == parameter.ds_tensor.device and not parameter.ds_tensor.is_pinned():
            parameter.ds_tensor.data = part  # the memory that it lies in already
        elif part is not None:
            parameter.ds_tensor.copy_(part)
    for module in network.modules():
        for name, buffer in module._buffers.items():
            part = None if buffer is None else cut.part_of(buffer)
            if part is not None and buffer is not None:
                module._buffers[name] = joined(part, buffer.shape, cut)
    cut.clear()


def joined(part: Tensor, shape: Sequence[int], cut: Cut) -> Tensor:
    """The whole of a buffer, which ZeRO does not spread, from all processes."""
    numbers = torch.Size(shape).numel()
    whole = torch.empty(len(part) * cut.world, dtype=part.dtype, device=cut.device)
    dist.all_gather_into_tensor(whole, part.to(cut.device))
    return whole[:numbers].view(*shape)


class Whole:
    """Adapters under ZeRO-3: their moments and gradients are spread, they themselves stay whole in every process, so
    that whoever reads or changes them need not know of ZeRO."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters: list[Any] = list(parameters)
        for parameter in self.parameters:
            # The one keeps them from being given back between modules once DeepSpeed has seen a whole pass, the other
            # before that.
            parameter.ds_persist = parameter.is_external_param = True
        self.gather()

    def gather(self) -> None:
        """Put together what DeepSpeed has taken apart for a step."""
        self.parameters[0].all_gather(self.parameters)

    @torch.no_grad()
    def adopt(self) -> None:
        """Let this process's parts be what the whole tensors now are: they may have been loaded, or shrunk."""
        for parameter in self.parameters:
            length = parameter.ds_tensor.numel()
            begin = length * parameter.ds_zero_partition_rank
            part = parameter.data.reshape(-1)[begin : begin + length]
            parameter.ds_tensor[: len(part)].copy_(part)


def refuse_until_owned(network: nn.Module) -> Callable[[], None]:
    """Let a network with spread weights fail loudly when it is asked before DeepSpeed gathers them; returns the way to
    end that."""

    def refuse(module: nn.Module, inputs: object) -> None:
        raise AssertionError("a network under ZeRO-3 was asked before its engine owned the optimizer")

    return network.register_forward_pre_hook(refuse).remove
