"""One device of one process: placement, autocast, loss scaling, recomputation, clipping, and the guard of each step."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from weft.contracts import Batch, Berth, Stepped
from weft.engines.gradients import clip
from weft.engines.offload import Inputs
from weft.engines.processes import Alone, Together
from weft.engines.recompute import recompute
from weft.engines.residency import (
    RING,
    Parcel,
    Residence,
    Ring,
    frozen_by_block,
    memory_of,
    parcelled,
    streamed_blocks,
    tensors_of,
    together,
)
from weft.engines.streaming import Stream, Turns
from weft.engines.transfer import through_clone, verified_copy
from weft.errors import ConfigError

T = TypeVar("T")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class SingleEngine:
    """One device. `can` names what objectives may need: 'functional' goes when blocks are recomputed, because
    recomputation inside fast weights gives wrong gradients without an error.

    The engines of several processes are made from it: each of them has a device of its own.
    """

    def __init__(
        self,
        device: torch.device,
        precision: str,
        residence: Residence | None = None,
        processes: Alone | Together | None = None,
    ) -> None:
        self.processes = processes = processes or Alone()
        self.rank, self.world = processes.rank, processes.layout.world
        self.data_rank, self.data_world = processes.data_rank, processes.layout.data_world
        self.sequence = processes.sequence
        self.device = device
        self.precision = precision
        self.residence = residence = residence or Residence()
        self.can = frozenset({"roles"} | (set() if residence.recompute else {"functional"}))
        self.scaler = GradScaler(device.type, enabled=precision == "fp16")
        self.ring = Ring(device, min(RING, residence.stream_blocks), residence.verified)
        self.inputs = Inputs(device, residence.pinned) if residence.offload_inputs else None
        self.streams: WeakSet[Stream] = WeakSet()  # one of each network; it lives as long
        self._parked: set[int] = set()  # addresses of weights that were left in host memory for another expert's turn

    @classmethod
    def open(cls, device: str, precision: str, residence: Residence | None = None) -> "SingleEngine":
        """Raises ConfigError when the device is not there."""
        chosen = device_here(device)
        return cls(chosen, best_precision(chosen) if precision == "auto" else precision, residence)

    def carry(self, module: nn.Module) -> nn.Module:
        if self.residence.verified:
            for tensor in [*module.parameters(), *module.buffers()]:
                tensor.data = verified_copy(tensor.data, self.device)
        return module.to(self.device)

    def berth(self, number: int) -> Berth:
        """On the device; in host memory the weights of streamed blocks and, unless experts are surely together, of all
        networks after the first."""
        residence = self.residence
        undecided = residence.experts == "auto" and memory_of(self.device) is not None
        later = number > 0 and (residence.experts == "one" or undecided)

        def put(tensor: Tensor, block: int | None, blocks: int) -> Tensor:
            if block in streamed_blocks(blocks, residence.stream_blocks):
                return tensor.cpu()
            if later:
                parked = tensor.cpu()
                self._parked.add(parked.data_ptr())
                return parked
            return self._moved(tensor)

        return Berth(put)

    def _moved(self, tensor: Tensor) -> Tensor:
        """The tensor on the device. ROCm never copies straight from a mapped file: there it hangs or lies."""
        if self.residence.verified:
            return verified_copy(tensor, self.device)
        if torch.version.hip and tensor.device.type == "cpu" and self.device.type == "cuda":
            return through_clone(tensor, self.device)
        return tensor.to(self.device)

    def place(self, network: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """Bring to the device what is not there yet and does not wait in host memory; make blocks recompute and
        stream where that was asked for. Raises ConfigError when more blocks are to be streamed than can be."""
        frozen = frozen_by_block(network, blocks)
        numbers = streamed_blocks(len(blocks), self.residence.stream_blocks)
        stream = Stream({i: Parcel(frozen[i], self._pins) for i in numbers}, self.ring)
        self.streams.add(stream)
        for tensor in tensors_of(network):
            parked = bool(self._parked) and not tensor.requires_grad and tensor.data_ptr() in self._parked
            if not parked and id(tensor) not in stream.tensors:
                tensor.data = self._moved(tensor.data)
        if self.residence.recompute:
            for number, block in enumerate(blocks):
                recompute(block, stream.entrance(number), self.inputs)
        return network

    @property
    def _pins(self) -> bool:
        return self.residence.pinned and self.device.type == "cuda"

    def alternate(self, networks: Mapping[str, nn.Module]) -> Callable[[str], None]:
        """Keep all networks on the device, or give each its turn there: see `together`."""
        streaming = {number for stream in self.streams for number in stream.tensors}
        frozen = {name: [t for t in frozen_by_block(network, ())[None] if id(t) not in streaming]
                  for name, network in networks.items()}  # fmt: skip
        weights = sum(t.nbytes for own in frozen.values() for t in own)
        if together(self.residence.experts, weights, memory_of(self.device)):
            for own in frozen.values():
                for tensor in own:
                    tensor.data = self._moved(tensor.data)
            self._parked.clear()
            return lambda name: None
        parcels = {name: parcelled(own, self._pins) for name, own in frozen.items()}
        self._parked.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        turns = Turns(parcels, self.device, self.residence.verified)
        turns(next(iter(networks)))
        return turns

    def put(self, batch: Batch) -> Batch:
        if self.residence.verified:
            return Batch({name: verified_copy(t, self.device) for name, t in batch.tensors.items()}, batch.keys)
        # Only pinned memory may be copied without waiting: from pageable memory mps returns garbage.
        return Batch(
            {n: t.to(self.device, non_blocking=self.device.type == "cuda") for n, t in batch.tensors.items()},
            batch.keys,
        )

    def computing(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision])

    def own(self, network: nn.Module, optimizers: dict[str, Optimizer]) -> dict[str, Optimizer]:
        return optimizers

    def total(self, value: Tensor) -> Tensor:
        return self.processes.total(value)

    def agreed(self, value: T) -> T:
        return self.processes.agreed(value)

    def barrier(self) -> None:
        self.processes.barrier()

    def close(self) -> None:
        self.processes.close()

    def backward(self, loss: Tensor, *, last: bool, optimizers: Sequence[str] = ()) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer, max_norm: float) -> Stepped:
        """Unscale, measure the norm, clip, move, and clear. A gradient that is not finite moves nothing."""
        self.scaler.unscale_(optimizer)
        gradients = self.gradients(optimizer)
        total = self.norm(gradients)
        norm = float(total)
        moved = norm < float("inf")  # False for nan too
        if moved:
            if max_norm and norm > max_norm:
                clip(gradients, max_norm, total)
            self.scaler.step(optimizer)
        overflow = not moved and self.scaler.is_enabled()
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return Stepped(norm=norm, moved=moved, overflow=overflow)

    def gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """What this process holds of the gradients that an optimizer moves by."""
        return [p.grad for p in parameters_of(optimizer) if p.grad is not None]

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The length of the whole gradient, fp32."""
        return nn.utils.get_total_norm(list(gradients))

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read afterwards tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def state_dict(self) -> dict[str, Any]:
        return {"scaler": dict(self.scaler.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["scaler"] or self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(state["scaler"]))


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def device_here(device: str) -> torch.device:
    """A device by its name in a config. Raises ConfigError when it is not there."""
    chosen = torch.device(best_device() if device == "auto" else device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"engine.device: '{device}' was asked for, but torch sees no GPU. Run: weft doctor.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"engine.device: '{device}' is not there; {torch.cuda.device_count()} GPUs are visible.")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("engine.device: 'mps' was asked for, but this is no Mac with Metal. Use auto or cpu.")
    return chosen


def best_device() -> str:
    """cuda (ROCm's GPUs are called so too), else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_precision(device: torch.device) -> str:
    """bf16 where the hardware multiplies it, fp16 on older GPUs, fp32 on a cpu, where half precision is emulated."""
    if device.type == "cpu":
        return "fp32"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return "bf16"
