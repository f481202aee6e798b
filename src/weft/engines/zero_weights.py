"""Weights under ZeRO-3: cut as they are read, gathered by DeepSpeed when a module asks; adapters stay whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.engines.zero_setup import Zero, library

# Numbers of a weight that stays together once it was gathered, as norms and biases do: DeepSpeed's own choice.
KEPT = 100_000


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
    """Make each parameter of a network one of ZeRO-3's: of a frozen one each process keeps its part; the others stay
    whole, so that whoever moves, reads or changes an adapter need not know of ZeRO."""
    deepspeed = library(cut.device)
    # Without its own linear function, which it would put into torch itself for the rest of the process.
    init: Any = deepspeed.zero.Init(
        config_dict_or_path=zero.weights_config(cut.device), mem_efficient_linear=False, enabled=True
    )
    parameters: list[Any] = list(network.parameters())
    for parameter in parameters:
        part = None if parameter.requires_grad else cut.part_of(parameter)
        if part is None:
            parameter.data = parameter.data.to(cut.device)
        init._convert_to_deepspeed_param(parameter)
        if parameter.requires_grad:
            # The one keeps it from being taken apart between modules once DeepSpeed has seen a whole pass, the other
            # before that.
            parameter.ds_persist = parameter.is_external_param = True
            continue
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


class Gathering:
    """DeepSpeed's hooks that put a module's spread weights together before it runs, forward and backward, and take them
    apart afterwards. outside: frozen parameters of no block, there through a whole forward pass."""

    def __init__(self, network: nn.Module, outside: Sequence[nn.Parameter], zero: Zero, device: torch.device) -> None:
        deepspeed = library(device)
        self.modules = list(network.modules())
        self.frozen: list[Any] = [p for p in network.parameters() if not p.requires_grad]
        self._remaining: list[int] | None = None
        # Before its hooks and after them.
        network.register_forward_pre_hook(self._note_remaining)
        offload: Any = import_module("deepspeed.runtime.zero.parameter_offload").DeepSpeedZeRoOffload
        self.offload = offload(
            network, import_module("deepspeed.utils.timer").NoopTimer(), zero.weights_config(device),
            overlap_comm=False, param_persistence_threshold=KEPT,
        )  # fmt: skip
        network.register_forward_hook(self._restore_remaining, always_call=True)
        for parameter in outside:
            # A head's weight may be read without asking the head.
            deepspeed.zero.register_external_parameter(network, parameter)

    def _note_remaining(self, network: nn.Module, inputs: object) -> None:
        """A question without gradients, asked while a graph waits for its backward pass, must not change the counts by
        which that pass knows that a module is done: all weights that it gathers would stay until its end."""
        if not torch.is_grad_enabled():
            self._remaining = [vars(module).get("ds_grads_remaining", 0) for module in self.modules]

    def _restore_remaining(self, network: nn.Module, inputs: object, output: object) -> None:
        if self._remaining is not None:
            for module, count in zip(self.modules, self._remaining, strict=True):
                vars(module)["ds_grads_remaining"] = count
        self._remaining = None

    def after_backward(self) -> None:
        """Take apart the weights of modules that have not noticed that their backward pass is over."""
        self.offload.release_backward_leftovers()

    def after_step(self) -> None:
        """Take apart what was gathered for a pass that went another way than the one before. No graph may wait."""
        for parameter in self.frozen:
            if parameter.ds_status.name == "AVAILABLE" and not parameter.ds_persist:
                parameter.ds_active_sub_modules.clear()
                parameter.partition()

    def end(self) -> None:
        self.offload.destroy()


def refuse_until_owned(network: nn.Module) -> Callable[[], None]:
    """Let a network with spread weights fail loudly when it is asked before DeepSpeed gathers them; returns the way to
    end that."""

    def refuse(module: nn.Module, inputs: object) -> None:
        raise AssertionError("a network under ZeRO-3 was asked before its engine owned the optimizer")

    return network.register_forward_pre_hook(refuse).remove
