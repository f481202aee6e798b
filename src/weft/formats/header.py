"""Read the header of a safetensors file by hand: 8 bytes of length, then JSON. No tensors, no torch."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from weft.errors import ModelError

LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header names it: dtype such as F32 or BF16."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds, without the numbers. size: bytes of the whole file."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    size: int


def read_header(path: Path) -> Header:
    """Names, shapes and metadata of a safetensors file. Raises ModelError when it is missing, cut short or another."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            raw = file.read(length) if 2 <= length <= min(size, LARGEST_HEADER) else b""
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", {})
        tensors = {name: TensorEntry(e["dtype"], tuple(e["shape"])) for name, e in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a safetensors file, or its header is damaged ({size} bytes).") from error
    if size < 8 + length + end:
        raise ModelError(f"{path} is cut short: {8 + length + end - size} of {8 + length + end} bytes are missing.")
    return Header(tensors, metadata, size)
