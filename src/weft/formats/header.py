"""Read the header of a safetensors file by hand: 8 bytes of length, then JSON. No tensors, no torch."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

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
        metadata = dict(sorted((entries.pop("__metadata__", None) or {}).items()))  # the library has no order for them
        tensors = {name: _entry(fields, 8 + length) for name, fields in entries.items()}
        end = max((fields["data_offsets"][1] for fields in entries.values()), default=0)
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that are no words")
    # A header of brackets alone comes to the limit of recursion.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is not a safetensors file, or its header is damaged ({size} bytes).") from error
    if size < 8 + length + end:
        raise ModelError(f"{path} is cut short: {8 + length + end - size} of {8 + length + end} bytes are missing.")
    return Header(tensors, metadata, size)


def _entry(fields: Mapping[str, Any], first: int) -> TensorEntry:
    """Raises ValueError or TypeError for what no tensor can be. first: byte of the file at which tensors begin."""
    start, end = fields["data_offsets"]
    entry = TensorEntry(fields["dtype"], tuple(fields["shape"]), first + start)
    counts = (*entry.shape, start, end)
    if not all(isinstance(count, int) and count >= 0 for count in counts) or 4 * entry.numbers > 8 * (end - start):
        raise ValueError("a shape that does not fit its bytes")  # the narrowest numbers have 4 bits
    return entry


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
