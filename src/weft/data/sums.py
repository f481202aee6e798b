"""A checksum as fast as memory, so that every tensor can be checked when it is first read."""

from collections.abc import Iterable

import numpy
import torch
from torch import Tensor

# Small enough to stay in a processor's own cache between being read and being summed.
BLOCK = 1 << 19  # bytes
FACTOR = 0x9E3779B97F4A7C15  # odd, so that a changed block changes the sum whatever its place
MASK = (1 << 64) - 1


class Sum:
    """The sum of bytes that come in blocks of BLOCK, the last one shorter: of each block the wrapping sum of its 64-bit
    words, and of these a polynomial, so that blocks in another order have another sum.

    Any flipped bit, zeroed page, moved block and cut-off end is seen. It is no protection against ill will, as little
    as the CRC of an archive.
    """

    def __init__(self) -> None:
        self._total, self._size = 0, 0

    def add(self, block: numpy.ndarray) -> None:
        """block: (n,) uint8."""
        words = len(block) // 8 * 8
        found = int(block[:words].view(numpy.uint64).sum(dtype=numpy.uint64))
        found += int.from_bytes(block[words:].tobytes(), "little")
        self._total = (self._total * FACTOR + found) & MASK
        self._size += len(block)

    def __str__(self) -> str:
        """As a file has it: the size is part of it, since zeros add nothing."""
        return f"{self._total:016x}-{self._size:x}"


def sum_of(blocks: Iterable[numpy.ndarray]) -> str:
    """The checksum of blocks."""
    found = Sum()
    for block in blocks:
        found.add(block)
    return str(found)


def sum_of_tensor(tensor: Tensor) -> str:
    """The checksum of a tensor's bytes."""
    whole = bytes_of(tensor)
    return sum_of(whole[i : i + BLOCK] for i in range(0, len(whole), BLOCK))


def bytes_of(tensor: Tensor) -> numpy.ndarray:
    """The bytes of a contiguous tensor, (n,) uint8, of the same memory."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
