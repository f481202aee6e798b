"""One device of one process: placement, autocast, loss scaling, recomputation, clipping, and the guard of each step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Optimizer

from weft.contracts import Batch, Berth, Stepped
from weft.engines.activations import Activations
from weft.engines.compiling import Compiler, Region
from weft.engines.flat_adamw import FlatAdamW
from weft.engines.gradients import divisor, move
from weft.engines.offload import Inputs
from weft.engines.prefetch import carried, host_memory, widened
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
from weft.engines.saved import keep_elsewhere
from weft.engines.streaming import Stream, Turns
from weft.engines.transfer import through_clone, verified_copy
from weft.errors import ConfigError
from weft.math.end_to_end import length_of

T = TypeVar("T")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class SingleEngine:
    """One device. `can` names what objectives may need: 'functional' goes when blocks are recomputed, because
    recomputation inside fast weights gives wrong gradients without an error, and when autograd keeps things elsewhere.

    The engines of several processes are made from it: each of them has a device of its own.
    """

    def __init__(
        self,
        device: torch.device,
        precision: str,
        residence: Residence | None = None,
        processes: Alone | Together | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        self.processes = processes = processes or Alone()
        self.rank, self.world = processes.rank, processes.layout.world
        self.data_rank, self.data_world = processes.data_rank, processes.layout.data_world
        self.sequence = processes.sequence
        self.device = device
        self.precision = precision
        self.residence = residence = residence or Residence()
        away = residence.recompute or residence.stream_blocks or residence.offload_activations
        self.can = frozenset({"roles"} | (set() if away else {"functional"}))
        self.compiler: Compiler | None = None  # of the networks that are placed; None: their blocks run as they are
        self.compile_with(compiler)
        self.scaler = GradScaler(device.type, enabled=precision == "fp16")
        self.ring = Ring(device, min(RING, residence.stream_blocks), residence.verified)
        self.inputs = Inputs(device, residence.pinned) if residence.offload_inputs else None
        self.activations = Activations(device, residence.pinned) if residence.offload_activations else None
        self.regions: list[Region] = []  # of each network that was placed, where blocks are compiled
        self.streams: WeakSet[Stream] = WeakSet()  # one of each network; it lives as long
        self._parked: set[int] = set()  # addresses of weights that were left in host memory for another expert's turn

    @classmethod
    def open(cls, device: str, precision: str, residence: Residence | None = None) -> "SingleEngine":
        """Raises ConfigError when the device is not there."""
        chosen = device_here(device)
        return cls(chosen, best_precision(chosen) if precision == "auto" else precision, residence)

    def compile_with(self, compiler: Compiler | None) -> None:
        """How the blocks of networks that are placed from now on are compiled. Fast weights go with none."""
        self.compiler = compiler
        if compiler is not None:
            self.can -= {"functional"}

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
        """Bring to the device what is not there yet and does not wait in host memory; make blocks stream, recompute
        and compile where that was asked for. Raises ConfigError when more blocks are to be streamed than can be."""
        frozen = frozen_by_block(network, blocks)
        numbers = streamed_blocks(len(blocks), self.residence.stream_blocks)
        stream = Stream({i: Parcel(frozen[i], self._pins) for i in numbers}, self.ring)
        self.streams.add(stream)
        for tensor in tensors_of(network):
            parked = bool(self._parked) and not tensor.requires_grad and tensor.data_ptr() in self._parked
            if not parked and id(tensor) not in stream.tensors:
                tensor.data = self._moved(tensor.data)
        self.ready(blocks, stream)
        return network

    def ready(self, blocks: Sequence[nn.Module], stream: Stream | None = None) -> None:
        """Have blocks compiled and recomputed, where that was asked for. What is compiled is the forward that a block
        has now; recomputation stands around it."""
        if self.compiler is not None:
            region = Region(self.compiler)
            self.regions.append(region)
            for block in blocks:
                region.compile(block)
        for number, block in enumerate(blocks):
            entrance = None if stream is None else stream.entrance(number)
            if self.residence.recompute:
                recompute(block, entrance, self.inputs, self.residence.recompute)
            elif entrance is not None or self.activations is not None:
                keep_elsewhere(block, entrance, self.activations)

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
            copies = {name: widened(verified_copy(t, self.device)) for name, t in batch.tensors.items()}
            return replace(batch, tensors=copies)
        # Only pinned memory may be copied without waiting: from pageable memory mps returns garbage.
        quick = self.device.type == "cuda"
        sent = {name: t.to(self.device, non_blocking=quick) for name, t in batch.tensors.items()}
        return replace(batch, tensors={name: widened(t) for name, t in sent.items()})

    def feeding(self, feed: Iterator[Batch], count: Callable[[Batch], int]) -> Iterator[tuple[Batch, int]]:
        return carried(feed, count, self.put, self.device)

    def host_memory(self, size: int) -> Tensor:
        return host_memory(size, self.device, self.residence.pinned)

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
        """Measure the norm, unscale and clip, move, and clear. A gradient that is not finite moves nothing.

        The host reads no number, unless the optimizer is one that cannot decide for itself whether to move.
        """
        gradient, length = self.gradient(optimizer)
        scale = self.scaler.scale(torch.ones((), device=self.device)) if self.scaler.is_enabled() else None
        norm = length if scale is None else length / scale
        moved = norm < float("inf")  # False for nan too
        move(optimizer, gradient, divisor(norm, max_norm, scale), moved)
        self.note(moved)
        optimizer.zero_grad(set_to_none=True)
        return Stepped(norm, moved, self.scaler.is_enabled())

    def gradient(self, optimizer: Optimizer) -> tuple[list[Tensor], Tensor]:
        """What this process holds of the gradient that an optimizer moves by, and the length () fp32 of the whole."""
        if isinstance(optimizer, FlatAdamW) and (flat := optimizer.gather()) is not None:
            return [flat], length_of(flat)
        found = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
        return found, nn.utils.get_total_norm(found) if found else torch.zeros((), device=self.device)

    def note(self, moved: Tensor) -> None:
        """Tell the loss scaler whether the gradient was finite, on the device."""
        if self.scaler.is_enabled():
            # It looks at gradients; the length of the real ones has said all that it wants to know.
            witness = nn.Parameter(torch.zeros(1, device=self.device))
            witness.grad = torch.where(moved, 0.0, float("inf")).view(1)
            self.scaler.unscale_(SGD([witness], lr=0.0))
            self.scaler.update()

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
