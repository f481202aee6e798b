"""Tensors in weight files, known by name and shape before they are read, and read one at a time or by rows.

Reads go through ordinary file reads into fresh memory: pages of a mapped file count as the process's own memory, and
copies from them to a device hang or lie on some drivers (see engines/transfer.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from weft.errors import ModelError
from weft.families.drawn import Pool, read_list
from weft.families.loading import SUFFIX, safetensors_header

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WRAPPERS = ("module", "state_dict", "model")  # keys under which official pickles keep the tensors


@dataclass(frozen=True)
class Entry:
    """One tensor: safetensors' word for its dtype, its shape, and where its bytes begin in the file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int = 0


@dataclass
class WeightFiles:
    """The tensors of one network, in one file or several shards. Of pickles the one that was read last stays mapped."""

    files: tuple[Path, ...]
    mapped: tuple[Path, Mapping[str, Tensor]] | None = None

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        found: dict[str, Entry] = {}
        for path in self.files:
            found |= entries_of(path)
        return found

    @cached_property
    def pool(self) -> Pool:
        """What weights that no file holds are cut from; a list has one dtype."""
        return Pool(DTYPES[next(iter(self.entries.values())).dtype])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str, rows: Sequence[tuple[int, int]] = ()) -> Tensor:
        """A tensor in memory of its own, as it was stored; of the ranges of rows alone, where some are named."""
        entry = self.entries[name]
        if entry.file.suffix == SUFFIX:
            whole = self.pool.tensor(name, entry.shape)
            return torch.cat([whole[a:b] for a, b in rows]) if rows else whole
        if entry.file.suffix != ".safetensors":
            if self.mapped is None or self.mapped[0] != entry.file:
                self.mapped = (entry.file, pickled(entry.file))
            whole = self.mapped[1][name]
            return torch.cat([whole[a:b] for a, b in rows]) if rows else whole.clone()
        row_bytes = prod(entry.shape[1:]) * DTYPES[entry.dtype].itemsize
        if not rows:
            return self._bytes(entry, 0, prod(entry.shape) * DTYPES[entry.dtype].itemsize).view(entry.shape)
        parts = [self._bytes(entry, a * row_bytes, b * row_bytes).view(b - a, *entry.shape[1:]) for a, b in rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def close(self) -> None:
        """Let go of what is mapped."""
        self.mapped = None

    def _bytes(self, entry: Entry, begin: int, end: int) -> Tensor:
        raw = torch.empty(end - begin, dtype=torch.uint8)
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start + begin)
            view = memoryview(raw.numpy())  # type: ignore[arg-type]
            filled = 0
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise ModelError(f"{entry.file}: cut off while it was read. Fetch it again.")
                filled += count
        return raw.view(DTYPES[entry.dtype])


def entries_of(path: Path) -> dict[str, Entry]:
    """The tensors in a file, from its header. Raises ModelError for what is no weight file."""
    if path.suffix == ".safetensors":
        header = dict(safetensors_header(path))
        header.pop("__metadata__", None)
        with path.open("rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
        unknown = sorted({entry["dtype"] for entry in header.values()} - set(DTYPES))
        if unknown:
            raise ModelError(f"{path}: weights in {', '.join(unknown)}. Weft reads {', '.join(list(DTYPES)[:6])}.")
        return {
            name: Entry(entry["dtype"], tuple(entry["shape"]), path, begin + entry["data_offsets"][0])
            for name, entry in header.items()
        }
    if path.suffix == SUFFIX:
        return {name: Entry(dtype, shape, path) for name, (dtype, shape) in read_list(path).items()}
    return {name: Entry(DTYPE_NAMES[t.dtype], tuple(t.shape), path) for name, t in pickled(path).items()}


def pickled(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a PyTorch file, mapped and not read; one of the old form, which cannot be mapped, is read. Nothing
    in it can run code. Raises ModelError."""
    try:
        held: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except MemoryError:
        raise
    except Exception as damaged:  # torch raises many kinds for a file that is damaged or would run code
        reason = str(damaged).splitlines()[0] if str(damaged) else type(damaged).__name__
        raise ModelError(
            f"{path} cannot be read as a PyTorch file of tensors alone: {reason}. Fetch it again, "
            "or convert it to safetensors."
        ) from damaged
    for wrapper in WRAPPERS:
        if isinstance(held, dict) and isinstance(held.get(wrapper), dict):
            held = held[wrapper]
    if not isinstance(held, dict):
        raise ModelError(f"{path} holds a {type(held).__name__}; a dictionary of tensors was expected.")
    return {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
