"""Tensors in a file, read straight to where they are wanted and checked on the way when they are first read."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy
import torch
from torch import Tensor

from weft.data.slots import Slots
from weft.data.sums import BLOCK, Sum, bytes_of
from weft.errors import DataError

# As safetensors calls them.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Part(NamedTuple):
    """Where one tensor lies. begin, end: bytes of the file. sum: of its bytes; see sums."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    sum: str


class Sound(NamedTuple):
    """Bytes that were found to be those that were written: of a tensor, in a file as it was changed last."""

    path: Path
    begin: int
    sum: str
    changed: int  # ns


class Shown(Protocol):
    """What a store has of one clip or caption, to be written into a batch."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """As they are kept."""
        ...

    def write(self, name: str, target: Tensor) -> None:
        """Fill a contiguous target of that tensor's shape, in the target's dtype. Raises DataError naming the entry."""
        ...


@dataclass(frozen=True)
class Held:
    """Tensors in memory."""

    tensors: Mapping[str, Tensor]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    def write(self, name: str, target: Tensor) -> None:
        target.copy_(self.tensors[name])


@dataclass(frozen=True)
class Filed:
    """Tensors in a file. damaged: removes the entry and gives the error that says so. moved: the same entry elsewhere,
    when the file has gone; raises DataError when there is none. scratch: memory for what is of another dtype. checked:
    tensors whose bytes were found sound in this process, by the file as it was then: what a disk gives is proven by
    the first read, and later ones come from the system's own memory."""

    path: Path
    parts: Mapping[str, Part]
    damaged: Callable[[], DataError]
    moved: Callable[[], Shown]
    scratch: Slots
    checked: set[Sound]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: part.shape for name, part in self.parts.items()}

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {name: part.dtype for name, part in self.parts.items()}

    def write(self, name: str, target: Tensor) -> None:
        part = self.parts[name]
        assert tuple(target.shape) == part.shape, f"{name} {part.shape} is written into {tuple(target.shape)}"
        try:
            sound = self._read(part, target.view(-1))
        except FileNotFoundError:
            self.moved().write(name, target)
            return
        except OSError as error:
            raise DataError(f"{self.path}: the cache cannot be read: {error.strerror}.") from error
        if not sound:
            raise self.damaged()

    def _read(self, part: Part, target: Tensor) -> bool:
        """Whether the bytes are those that were written; of what was checked, whether all are there. target: (n,)."""
        with FileIO(self.path) as file:
            entry = Sound(self.path, part.begin, part.sum, os.fstat(file.fileno()).st_mtime_ns)
            file.seek(part.begin)
            if target.dtype == part.dtype and entry in self.checked:
                return filled(file, bytes_of(target))
            if self._summed(file, part, target) != part.sum:
                return False
        self.checked.add(entry)
        return True

    def _summed(self, file: FileIO, part: Part, target: Tensor) -> str | None:
        """The sum of the bytes, as they go to the target in blocks; None where the file ends before."""
        found, size = Sum(), part.end - part.begin
        as_it_is = target.dtype == part.dtype
        room = bytes_of(target) if as_it_is else self.scratch.take(BLOCK).numpy()
        for at in range(0, size, BLOCK):
            length = min(BLOCK, size - at)
            block = room[at : at + length] if as_it_is else room[:length]
            if not filled(file, block):
                return None
            found.add(block)
            if not as_it_is:
                numbers = torch.from_numpy(block).view(part.dtype)
                first = at // part.dtype.itemsize
                target[first : first + len(numbers)].copy_(numbers)
        return str(found)


def filled(file: FileIO, block: numpy.ndarray) -> bool:
    """Read until the block is full; False when the file ends before. One read may give less than was asked for."""
    at = 0
    while at < len(block):
        read = file.readinto(block[at:].data)
        if not read:
            return False
        at += read
    return True


def header_of(file: BinaryIO, limit: int) -> dict[str, Any]:
    """The JSON at the beginning of a safetensors file: names, shapes, places and metadata. Raises ValueError when it
    is longer than limit bytes, and so no header."""
    size = int.from_bytes(file.read(8), "little")
    if not 0 < size < limit:
        raise ValueError(f"a header of {size} bytes")
    return json.loads(file.read(size))


def parts_of(header: Mapping[str, Any], begin: int, sums: Mapping[str, str]) -> dict[str, Part]:
    """The tensors that a header names. begin: of the data in the file. Raises what a damaged header can raise."""
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (first, last) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if prod(shape) * dtype.itemsize != last - first:
            raise ValueError(f"{name}: {last - first} bytes are no {shape} of {dtype}")
        found[name] = Part(dtype, shape, begin + first, begin + last, sums[name])
    return found
