"""Cache entries as files: tensors under their names, checked, written whole or not at all, named by what made them."""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from weft.data.filed import Part, header_of, parts_of
from weft.data.sums import bytes_of, sum_of_tensor
from weft.durable import write_whole
from weft.errors import DataError

HEADER_LIMIT = 1 << 20  # bytes; ours have some hundred, so more is damage
UNFIT = (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError)  # all that a damaged entry can raise


def entry_path(folder: Path, kind: str, *parts: str) -> Path:
    """KIND/ab/abcdef....safetensors, where the name is the SHA-256 of the parts."""
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return folder / kind / name[:2] / f"{name}.safetensors"


def write_entry(path: Path, tensors: Mapping[str, Tensor], about: str) -> None:
    """Write named tensors. about: what they are of, for people who look into the file."""
    sums = json.dumps({name: sum_of_tensor(tensor) for name, tensor in tensors.items()})
    # The SHA-256 is what entries had before they had sums, and what an older Weft looks for.
    metadata = {"about": about, "sha256": digest(tensors), "sums": sums}
    write_whole(path, safetensors.torch.save(dict(tensors), metadata=metadata))


def read_entry(path: Path) -> dict[str, Tensor] | None:
    """The tensors of an entry; None when the file is not there, torn, or not what was written.

    The bytes are copied, not mapped: a mapped file that another process truncates ends this one by a bus error.
    """
    try:
        payload = path.read_bytes()
        tensors = safetensors.torch.load(payload)
        written = header_of(io.BytesIO(payload), HEADER_LIMIT)["__metadata__"]["sha256"]
    except UNFIT:
        return None
    return tensors if written == digest(tensors) else None


def is_sound(path: Path, name: str, shape: Sequence[int] | None = None) -> bool:
    """Whether an entry is whole by its header, with a tensor of this name and shape. Its data is checked when read."""
    try:
        with path.open("rb") as file:
            header = header_of(file, HEADER_LIMIT)
            tensors = {key: value for key, value in header.items() if key != "__metadata__"}
            end = max(entry["data_offsets"][1] for entry in tensors.values())
            whole = file.tell() + end == os.fstat(file.fileno()).st_size
            found = tensors[name]["shape"]
    except UNFIT:
        return False
    return whole and (shape is None or found == list(shape))


def parts_in(path: Path) -> dict[str, Part] | None:
    """Where the tensors of an entry lie, and their sums; None when it is not there, torn, or from before there were
    sums."""
    try:
        with path.open("rb") as file:
            header = header_of(file, HEADER_LIMIT)
            return parts_of(header, file.tell(), json.loads(header["__metadata__"]["sums"]))
    except UNFIT:
        return None


def about(path: Path) -> str:
    """What an entry is of, for people; nothing where it does not say."""
    try:
        with path.open("rb") as file:
            return str(header_of(file, HEADER_LIMIT)["__metadata__"]["about"])
    except UNFIT:
        return ""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' bytes in the order of their names: safetensors itself would not see a flipped bit."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(bytes_of(tensors[name]).data)
    return found.hexdigest()


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

    def learn(self, paths: Iterable[Path], workers: int) -> None:
        """Hash files at once that are not known yet. Raises DataError when one has gone."""
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(self.of, paths))

    def save(self) -> None:
        """Write the memo if it has grown. Of two processes the later wins; the loser's files are read once more."""
        if self._changed:
            write_whole(self._memo, json.dumps(self._known))
            self._changed = False
