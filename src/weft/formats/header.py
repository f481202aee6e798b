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
    start: int = 0  # byte of the file at which its numbers begin

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
        metadata = dict(sorted(entries.pop("__metadata__", {}).items()))  # the library writes them in no order
        first = 8 + length
        tensors = {
            name: TensorEntry(e["dtype"], tuple(e["shape"]), first + e["data_offsets"][0])
            for name, e in entries.items()
        }
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a safetensors file, or its header is damaged ({size} bytes).") from error
    if size < 8 + length + end:
        raise ModelError(f"{path} is cut short: {8 + length + end - size} of {8 + length + end} bytes are missing.")
    return Header(tensors, metadata, size)


def read_numbers(path: Path, entries: Mapping[str, TensorEntry]) -> dict[str, float]:
    """The values of tensors of one number, such as alphas, from their few bytes. Those of other dtypes are left out."""
    found = {}
    with path.open("rb") as file:
        for name, entry in entries.items():
            if entry.numbers == 1 and entry.dtype in _CODES:
                code, width = _CODES[entry.dtype]
                file.seek(entry.start)
                raw = file.read(width)
                # A bf16 is the first half of an fp32, which is the second one in the file's order of bytes.
                found[name] = float(struct.unpack(code, b"\0\0" + raw if entry.dtype == "BF16" else raw)[0])
    return found


_CODES = {"F64": ("<d", 8), "F32": ("<f", 4), "F16": ("<e", 2), "BF16": ("<f", 2), "I64": ("<q", 8), "I32": ("<i", 4)}
