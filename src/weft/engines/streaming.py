"""Blocks whose frozen weights wait in host memory and pass through a ring of two slots on the device, and experts of
which one at a time is on the device."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.engines.residency import Parcel, Place, Ring


class Stream:
    """The streamed blocks of one network, in their order; there may be none. What is trained never moves."""

    def __init__(self, parcels: Mapping[int, Parcel], ring: Ring) -> None:
        self.parcels = dict(sorted(parcels.items()))
        self.numbers = tuple(self.parcels)
        self.ring = ring
        self.tensors = {id(t) for parcel in parcels.values() for t in parcel.tensors}
        self.backwards = False
        ring.make_room(tuple(self.parcels.values()))

    def entrance(self, number: int) -> "Entrance | None":
        """What a block does before it runs, first and again; None for blocks that stay on the device."""
        return Entrance(self, number) if number in self.parcels else None

    def enter(self, number: int) -> None:
        """Have a block's weights on the device, and those of the streamed block that comes next on their way."""
        following = self.after(number)
        self.ring.enter(self.parcels[number], None if following is None else self.parcels[following])

    def after(self, number: int) -> int | None:
        """The streamed block that is asked next: the one below in a backward pass, else the one above; after the last
        its backward begins with itself, or without gradients the next question with the first."""
        place = self.numbers.index(number)
        if self.backwards:
            return self.numbers[place - 1] if place else None
        if place + 1 < len(self.numbers):
            return self.numbers[place + 1]
        return None if torch.is_grad_enabled() else self.numbers[0]

    def back(self, number: int, place: Place) -> Tensor:
        """A weight of a block where it lies now, for a backward pass."""
        with self.recomputing():
            self.enter(number)
        return self.ring.found(self.parcels[number], place)

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Inside, blocks are entered because a backward pass asks for them."""
        self.backwards = True
        try:
            yield
        finally:
            self.backwards = False


@dataclass(frozen=True)
class Entrance:
    """The way into one streamed block."""

    stream: Stream
    number: int

    def __call__(self) -> None:
        self.stream.enter(self.number)

    def again(self) -> AbstractContextManager[None]:
        """Around the block's second run, in the backward pass."""
        return self.stream.recomputing()

    def kept(self, tensor: Tensor) -> "Streamed | None":
        """What autograd holds in place of a weight that lies in the ring; None for any other tensor."""
        place = self.stream.ring.place_of(self.stream.parcels[self.number], tensor)
        return None if place is None else Streamed(self.stream, self.number, place)

    def expect(self, output: object) -> None:
        """Have the weights there when the block's backward pass begins, for those who keep them past autograd."""
        tensors = output if isinstance(output, Sequence) else (output,)
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(self._turn)

    def _turn(self, gradients: tuple[Any, ...]) -> None:
        with self.stream.recomputing():
            self.stream.enter(self.number)


@dataclass(frozen=True, slots=True)
class Streamed:
    """What autograd holds in place of a weight that passes through the ring: whose it is, and where in its parcel."""

    stream: Stream
    number: int
    place: Place

    def back(self) -> Tensor:
        return self.stream.back(self.number, self.place)


class Turns:
    """Networks that take turns on the device: of each the same parcels in the same order, one slot for each place."""

    def __init__(self, parcels: Mapping[str, Sequence[Parcel]], device: torch.device, verified: bool) -> None:
        self.parcels = dict(parcels)
        self.rings = []
        for place in range(max(map(len, self.parcels.values()))):
            ring = Ring(device, 1, verified)
            ring.make_room([own[place] for own in self.parcels.values() if place < len(own)])
            self.rings.append(ring)
        self.present: str | None = None

    def __call__(self, name: str) -> None:
        """Make the named network ready; nothing to do when it was the last to be asked."""
        if name == self.present:
            return
        self.present = None
        for ring, parcel in zip(self.rings, self.parcels[name], strict=False):  # one may have fewer parcels
            ring.enter(parcel)
        self.present = name
