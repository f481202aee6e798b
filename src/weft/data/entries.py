"""Cache entries as files: one checked tensor in each, written whole or not at all, named by what it was made of."""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from weft.durable import write_whole
from weft.errors import DataError

HEADER_LIMIT = 1 << 20  # bytes; ours have some hundred, so more is damage
UNFIT = (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError)  # all that a damaged entry can raise


def entry_path(folder: Path, kind: str, *parts: str) -> Path:
    """KIND/ab/abcdef....safetensors, where the name is the SHA-256 of the parts."""
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return folder / kind / name[:2] / f"{name}.safetensors"


def write_entry(path: Path, kind: str, tensor: Tensor, about: str) -> None:
    """Write one tensor. about: what it is of, for people who look into the file."""
    write_whole(path, safetensors.torch.save({kind: tensor}, metadata={"about": about, "sha256": digest(tensor)}))


def read_entry(path: Path, kind: str) -> Tensor | None:
    """The tensor of an entry; None when the file is not there, torn, or not what was written.

    The bytes are copied, not mapped: a mapped file that another process truncates ends this one by a bus error.
    """
    try:
        payload = path.read_bytes()
        tensor = safetensors.torch.load(payload)[kind]
        written = header_of(io.BytesIO(payload))["__metadata__"]["sha256"]
    except UNFIT:
        return None
    return tensor if written == digest(tensor) else None


def is_sound(path: Path, kind: str, shape: Sequence[int] | None = None) -> bool:
    """Whether an entry is whole by its header, and of the shape. Its data is checked when it is read."""
    try:
        with path.open("rb") as file:
            entry = header_of(file)[kind]
            whole = file.tell() + entry["data_offsets"][1] == os.fstat(file.fileno()).st_size
    except UNFIT:
        return False
    return whole and (shape is None or entry["shape"] == list(shape))


def header_of(file: BinaryIO) -> dict[str, Any]:
    """The JSON at the beginning of a safetensors file: names, shapes, places and metadata."""
    size = int.from_bytes(file.read(8), "little")
    if not 0 < size < HEADER_LIMIT:
        raise ValueError(f"a header of {size} bytes")
    return json.loads(file.read(size))


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes: safetensors itself would not see a flipped bit."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


class ContentHashes:
    """SHA-256 of files, remembered by path, size and modification time, so that large clips are read once."""

    def __init__(self, memo: Path) -> None:
        self._memo = memo
        self._changed = False
        try:
            known = json.loads(memo.read_text())
        except (OSError, ValueError):  # without the memo the files are read again
            known = {}
        self._known: dict[str, list[int | str]] = known if isinstance(known, dict) else {}

    def of(self, path: Path) -> str:
        """The hash of a file's content. Raises DataError when it has gone."""
        try:
            stat = path.stat()
            stamp, name = [stat.st_size, stat.st_mtime_ns], os.path.abspath(path)
            known = self._known.get(name)
            if known is None or known[:2] != stamp:
                with path.open("rb") as file:
                    known = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
                self._known[name], self._changed = known, True
        except OSError as error:
            raise DataError(f"{path} was there for the survey and cannot be read now: {error.strerror}.") from error
        return str(known[2])

    def save(self) -> None:
        """Write the memo if it has grown. Of two processes the later wins; the loser's files are read once more."""
        if self._changed:
            write_whole(self._memo, json.dumps(self._known))
            self._changed = False
