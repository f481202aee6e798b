"""Where frozen weights live: tensors packed into one piece of host memory, which travel to the device as a whole and
are never copied back."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.engines.recompute import Recompute
from weft.engines.transfer import verified_copy
from weft.errors import ConfigError, RunError

RING = 2  # slots: one is computed with while the other is filled
PARCEL = 1 << 28  # bytes at which a network's parcel is closed and the next one begun
ALIGNED = 256  # bytes; each tensor of a parcel begins at a multiple, as in the device's own allocator


@dataclass(frozen=True, kw_only=True)
class Residence:
    """What stays on the device, and what waits in host memory until it is asked for."""

    recompute: Recompute = False
    offload_inputs: bool = False
    offload_activations: bool = False
    stream_blocks: int = 0
    experts: Literal["auto", "together", "one"] = "auto"
    pinned: bool = True
    verified: bool = False


def streamed_blocks(blocks: int, count: int) -> tuple[int, ...]:
    """Numbers of the blocks that are streamed, S of N, evenly spread: floor((2i + 1) N / 2S).

    Raises ConfigError when there are not so many.
    """
    if count > blocks:
        raise ConfigError(
            f"engine.stream_blocks: {count} is too many for a network of {blocks} blocks. Write {blocks} or less."
        )
    return tuple((2 * i + 1) * blocks // (2 * count) for i in range(count))


def together(choice: Literal["auto", "together", "one"], weights: int, memory: int | None) -> bool:
    """Whether all experts stay on a device of so many bytes; auto: when their weights leave half of it to the rest."""
    return choice == "together" or (choice == "auto" and (memory is None or 2 * weights <= memory))


def frozen_by_block(network: nn.Module, blocks: Sequence[nn.Module]) -> dict[int | None, list[Tensor]]:
    """The parameters and buffers that are not trained, each once, by the number of their block; None: outside."""
    found: dict[int | None, list[Tensor]] = {}
    seen: set[int] = set()
    for number, module in [*enumerate(blocks), (None, network)]:
        own = [t for t in tensors_of(module) if not t.requires_grad and t.numel() and id(t) not in seen]
        seen |= set(map(id, own))
        found[number] = own
    return found


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]


class Parcel:
    """Frozen tensors that travel together. Their one lasting copy lies in host memory, where each of them points while
    the parcel is not on the device."""

    def __init__(self, tensors: Sequence[Tensor], pinned: bool) -> None:
        self.tensors = tuple(tensors)
        self.starts: list[int] = []
        self.bytes = 0
        for tensor in self.tensors:
            self.starts.append(self.bytes)
            self.bytes += -(-tensor.nbytes // ALIGNED) * ALIGNED
        self.host = torch.empty(self.bytes, dtype=torch.uint8)
        for tensor, view in zip(self.tensors, self.views(self.host), strict=True):
            view.copy_(tensor.data)
            tensor.data = view
        if pinned:
            lock_pages(self.host)

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors as they lie in a piece of memory (bytes,)."""
        return [
            memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, start in zip(self.tensors, self.starts, strict=True)
        ]

    def point_to(self, memory: Tensor) -> None:
        """Let the tensors lie in a copy of the parcel, or again in its own host memory."""
        for tensor, view in zip(self.tensors, self.views(memory), strict=True):
            tensor.data = view


def parcelled(tensors: Sequence[Tensor], pinned: bool) -> list[Parcel]:
    """Tensors in parcels of moderate size, so that little is held twice while they are packed."""
    parcels, held = [], []
    for tensor in tensors:
        held.append(tensor)
        if sum(t.nbytes for t in held) >= PARCEL:
            parcels.append(Parcel(held, pinned))
            held = []
    return [*parcels, Parcel(held, pinned)] if held else parcels


def memory_of(device: torch.device) -> int | None:
    """Bytes of a GPU's own memory; None where the device computes in the host's, or is not there."""
    there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).total_memory if there else None


def lock_pages(memory: Tensor) -> None:
    """Pin host memory in place, so that copies to a GPU need not wait. Raises RunError when the system refuses.

    torch's own pinned memory comes in powers of two: a block of 670 MB would take a gigabyte.
    """
    runtime: Any = torch.cuda.cudart()
    address = memory.data_ptr()
    failed = int(runtime.cudaHostRegister(address, memory.nbytes, 0))
    if failed:
        raise RunError(
            f"engine.pinned: {memory.nbytes / 2**20:.0f} MiB of host memory could not be pinned (error {failed}). "
            "Raise the limit of locked memory (ulimit -l), or write engine.pinned=false."
        )
    weakref.finalize(memory, unlock_pages, runtime, address).atexit = False


def unlock_pages(runtime: Any, address: int) -> None:
    """Let go of pinned memory, once nothing that was asked of the device reads it any more."""
    torch.cuda.synchronize()
    runtime.cudaHostUnregister(address)


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a parcel a weight lies, or a view of one."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # numbers of that dtype

    def of(self, memory: Tensor) -> Tensor:
        """The weight in a copy of the parcel (bytes,)."""
        return memory.view(self.dtype).as_strided(self.shape, self.strides, self.offset)


@dataclass
class Slot:
    """A piece of device memory that holds one parcel at a time."""

    memory: Tensor  # (bytes,)
    parcel: Parcel | None = None
    arrived: torch.cuda.Event | None = None
    entered: int = 0  # when it was last asked for


@dataclass
class Ring:
    """Slots on the device through which parcels pass, the next one while the present one is computed with.

    A slot is filled again only after all work that was asked of the device before. That is enough, for at that time
    nothing that will still be asked needs its old content: in a forward pass the block before has returned; in a
    backward pass autograd goes through a graph in the reverse order of its making, so the block after is done.
    """

    device: torch.device
    size: int  # slots
    verified: bool = False
    slots: list[Slot] = field(default_factory=list)
    copied: int = 0  # bytes so far
    _clock: int = 0
    _side: torch.cuda.Stream | None = None

    def make_room(self, parcels: Sequence[Parcel]) -> None:
        """Have slots that are large enough for each of the parcels."""
        largest = max((parcel.bytes for parcel in parcels), default=0)
        if not largest or (self.slots and len(self.slots[0].memory) >= largest):
            return
        for slot in self.slots:
            self._empty(slot)
        if self._side is not None:  # a copy into the old slots may still be under way
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        if self.device.type == "cuda" and self._side is None:
            self._side = torch.cuda.Stream(self.device)
        self.slots = [Slot(torch.empty(largest, dtype=torch.uint8, device=self.device)) for _ in range(self.size)]
        for slot in self.slots:
            if self._side is not None:  # the memory may be let go while a copy into it is under way
                slot.memory.record_stream(self._side)

    def enter(self, parcel: Parcel, following: Parcel | None = None) -> None:
        """Let a parcel's tensors be on the device, and begin to copy the one that will be asked for next."""
        slot = self._slot_of(parcel) or self._fill(parcel, None)
        self._clock += 1
        slot.entered = self._clock
        if slot.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
        parcel.point_to(slot.memory)
        if following is not None and self.size > 1 and self._slot_of(following) is None:
            self._fill(following, slot)

    def place_of(self, parcel: Parcel, tensor: Tensor) -> Place | None:
        """Where in a parcel a tensor lies; None when it does not lie in the parcel's slot."""
        slot = self._slot_of(parcel)
        if slot is None or tensor.untyped_storage()._cdata != slot.memory.untyped_storage()._cdata:
            return None
        return Place(tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def found(self, parcel: Parcel, place: Place) -> Tensor:
        """What lies there now, of a parcel that has been entered."""
        slot = self._slot_of(parcel)
        assert slot is not None, "a parcel is entered before it is looked into"
        return place.of(slot.memory)

    def _slot_of(self, parcel: Parcel) -> Slot | None:
        return next((slot for slot in self.slots if slot.parcel is parcel), None)

    def _fill(self, parcel: Parcel, busy: Slot | None) -> Slot:
        slot = min((slot for slot in self.slots if slot is not busy), key=lambda slot: slot.entered)
        self._empty(slot)
        target = slot.memory[: parcel.bytes]
        if self.verified:
            target.copy_(verified_copy(parcel.host, self.device))
        elif self._side is None:
            target.copy_(parcel.host)
        else:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._side):
                target.copy_(parcel.host, non_blocking=True)
            slot.arrived = torch.cuda.Event()
            slot.arrived.record(self._side)
        slot.parcel = parcel
        self.copied += parcel.bytes
        return slot

    def _empty(self, slot: Slot) -> None:
        parcel, slot.parcel = slot.parcel, None
        if parcel is not None:
            parcel.point_to(parcel.host)
            # What autograd still keeps of these weights is no longer theirs: let it find out, not compute on.
            torch.autograd.graph.increment_version(parcel.tensors)
