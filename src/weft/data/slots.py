"""Host memory that batches lie in, used again and again: a piece is free as soon as no tensor lies in it any more."""

from collections.abc import Callable
from math import prod
from weakref import finalize

import torch
from torch import Tensor

ALIGNED = 64  # bytes: a cache line, and more than any dtype asks for
KEPT = 6  # pieces that wait for the next batch: those ahead, the one under training, and the one before it

HostMemory = Callable[[int], Tensor]  # gives so many bytes, (n,) uint8


def pageable(size: int) -> Tensor:
    """Memory as the system gives it."""
    return torch.empty(size, dtype=torch.uint8)


class Slots:
    """A pool of pieces of one size, that of the largest batch so far. New memory costs a fault for each of its pages,
    which takes longer than to fill it; locked memory costs far more.

    Nobody gives a piece back, so nobody can give it back too early: it returns when the last tensor in it has gone. A
    loop that keeps a batch on the host, as it does on a CPU and for an incident, keeps its piece; the pool then takes
    new memory. Whoever copies to a device without waiting must hold the batch until its copy is made.
    """

    def __init__(self, memory: HostMemory = pageable) -> None:
        self._memory = memory
        self._free: list[Tensor] = []  # append and pop are one step each: pieces come back from any thread
        self._size = 0

    def take(self, size: int) -> Tensor:
        """(size,) uint8 of any content, which is the caller's alone for as long as a view of it lives."""
        self._size = max(self._size, size)
        piece = self._kept()
        lent = piece.numpy()[:size]  # a new array each time: tensors made of it hold it, and its end is theirs
        finalize(lent, self._back, piece).atexit = False
        return torch.from_numpy(lent)

    def _kept(self) -> Tensor:
        while self._free:
            piece = self._free.pop()
            if len(piece) >= self._size:
                return piece
        return self._memory(self._size)

    def _back(self, piece: Tensor) -> None:
        if len(self._free) < KEPT:
            self._free.append(piece)


def room_for(shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]], slots: Slots) -> dict[str, Tensor]:
    """Tensors of these dtypes and shapes under their names, of any content, that lie side by side in one piece."""
    places, size = {}, 0
    for name, (dtype, shape) in shapes.items():
        places[name] = (size, size + prod(shape) * dtype.itemsize)
        size = -(-places[name][1] // ALIGNED) * ALIGNED
    piece = slots.take(max(size, 1))
    return {name: piece[slice(*places[name])].view(dtype).view(shape) for name, (dtype, shape) in shapes.items()}
