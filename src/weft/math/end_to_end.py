"""Tensors that lie end to end in one, so that what is done to each number is done to all of them at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNED = 64  # numbers: every tensor begins where kernels with wide loads can begin, as it would by itself
ROW = 256  # numbers: the whole is cut into rows of so many when its length is measured


@dataclass(frozen=True)
class Run:
    """Tensors that lie beside one another from `begin` on, `length` numbers with their padding. numbers: which of all
    they are. rest: their shape behind the first dimension, which is alike, so that they are one tensor of many rows;
    None for those that need padding."""

    begin: int
    length: int
    numbers: tuple[int, ...]
    rest: tuple[int, ...] | None


class EndToEnd:
    """Where tensors of certain shapes lie in a flat one (length,). Those of a group lie together, and of these the ones
    of equal rows, for they are gathered in one go; whatever needs padding comes last. Padding is zeros, which stay
    zeros under anything that treats each number for itself.

    bounds: begin and end of each group's numbers, padding included.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        self.shapes = [tensor.shape for group in groups for tensor in group]
        self.begins = [0] * len(self.shapes)
        self.runs: list[Run] = []
        self.bounds: list[tuple[int, int]] = []
        self.length = first = 0
        for group in groups:
            begin, kinds = self.length, self._kinds(range(first, first + len(group)))
            for rest in sorted(kinds, key=lambda rest: rest is None):
                self._append(kinds[rest], rest)
            first += len(group)
            self.bounds.append((begin, self.length))
        self.tail = -self.length % ROW
        self.length += self.tail
        self.bounds[-1] = (self.bounds[-1][0], self.length)
        self._zeros: Tensor | None = None

    def _kinds(self, numbers: Iterable[int]) -> dict[tuple[int, ...] | None, list[int]]:
        kinds: dict[tuple[int, ...] | None, list[int]] = {}
        for number in numbers:
            shape = self.shapes[number]
            even = len(shape) > 0 and shape.numel() > 0 and shape.numel() % ALIGNED == 0
            kinds.setdefault(tuple(shape[1:]) if even else None, []).append(number)
        return kinds

    def _append(self, numbers: Sequence[int], rest: tuple[int, ...] | None) -> None:
        begin = self.length
        for number in numbers:
            self.begins[number] = self.length
            self.length += -(-self.shapes[number].numel() // ALIGNED) * ALIGNED
        self.runs.append(Run(begin, self.length - begin, tuple(numbers), rest))

    def laid(self, tensors: Sequence[Tensor], behind: Tensor | None = None, room: Tensor | None = None) -> Tensor:
        """A flat tensor with their numbers, and with those of what comes behind (any,); all of one dtype. room: one of
        that length to write them into; None: new memory."""
        first = tensors[0]
        extra = 0 if behind is None else behind.numel()
        flat = torch.empty(self.length + extra, dtype=first.dtype, device=first.device) if room is None else room
        for run in self.runs:
            own, room = [tensors[number] for number in run.numbers], flat.narrow(0, run.begin, run.length)
            if run.rest is None:
                torch.cat(self._padded(own), out=room)
            else:
                torch.cat(own, out=room.view(-1, *run.rest))
        if self.tail:
            flat.narrow(0, self.length - self.tail, self.tail).zero_()
        if behind is not None:
            flat.narrow(0, self.length, extra).copy_(behind)
        return flat

    def _padded(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self._zeros is None or self._zeros.dtype != tensors[0].dtype:
            self._zeros = torch.zeros(ALIGNED, dtype=tensors[0].dtype, device=tensors[0].device)
        parts = []
        for tensor in tensors:
            parts += [tensor.reshape(-1), self._zeros.narrow(0, 0, -tensor.numel() % ALIGNED)]
        return parts

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each tensor's part of a flat one, in its shape."""
        places = zip(self.begins, self.shapes, strict=True)
        return [flat.narrow(0, begin, shape.numel()).view(shape) for begin, shape in places]


def length_of(flat: Tensor) -> Tensor:
    """The Euclidean length () of a flat tensor whose numbers fill rows: of each row, then of these. A single fp32 sum
    over millions of numbers would be wrong in the fifth digit on a CPU."""
    return torch.linalg.vector_norm(torch.linalg.vector_norm(flat.view(-1, ROW), dim=1))


def home_of(tensor: Tensor) -> int:
    """Which memory a tensor is a view of, as a number to compare while that memory is there."""
    return tensor.untyped_storage()._cdata


def stretch_of(tensors: Sequence[Tensor]) -> Tensor | None:
    """The stretch of memory (numbers,) in which tensors lie end to end, all of it; None where they do not, or where
    as much lies between them again."""
    first = tensors[0]
    where = home_of(first)
    if any(home_of(t) != where or t.dtype != first.dtype or not t.is_contiguous() for t in tensors):
        return None
    begin = min(t.storage_offset() for t in tensors)
    length = max(t.storage_offset() + t.numel() for t in tensors) - begin
    if length > 2 * sum(t.numel() for t in tensors):
        return None
    return first.detach().as_strided((length,), (1,), begin)
