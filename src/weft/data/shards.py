"""Many cache entries in few large files, so that a network disk sees long reads and few names.

A shard is a safetensors file: tensors NAME/latents, where NAME is that of the single entry, and in its metadata the sum
of each. It is written once, whole, and never changed; an entry that turns out to be damaged is named in a file beside
it, and is made anew as a single one.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from weft.data.entries import UNFIT, about, read_entry
from weft.data.filed import NAMES, Part, header_of, parts_of
from weft.data.sums import bytes_of, sum_of_tensor
from weft.durable import HALF_WRITTEN, whole_file, write_whole

LEAST = 16  # entries; fewer stay single files, so that a clip added now and then makes no shard of its own
LIMIT = 1 << 30  # bytes of one shard: as much room as packing needs on the disk beside the entries
HEADER_LIMIT = 1 << 28  # bytes; each tensor takes some 250
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Place:
    """Where an entry lies: in which shard, and its tensors there."""

    path: Path
    parts: Mapping[str, Part]


class Shards:
    """The shards of a cache's folder, as this process knows them. torn: entries that a shard names and has no more,
    since it was cut off. problems: a sentence for each shard that is of no use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.torn: set[str] = set()
        self.problems: list[str] = []
        self._places: dict[str, Place] = {}
        self._known: dict[Path, int] = {}  # shard -> its size when it was read: one that is being copied grows
        self._seen = -1  # when the folder had last been changed

    def find(self, name: str) -> Place | None:
        """Where the entry of this name lies, when a shard has it."""
        return self._places.get(name)

    def __len__(self) -> int:
        return len({place.path for place in self._places.values()})

    def look(self, surely: bool = False) -> None:
        """Learn of shards that have come and gone; surely: whatever the folder's time says, which a network's disk may
        tell late."""
        try:
            changed = self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            changed = 0
        if changed == self._seen and not surely:
            return
        self._seen = changed
        whole = (path for path in self.folder.glob("*.safetensors") if not path.name.startswith(HALF_WRITTEN))
        there = {path: path.stat().st_size for path in sorted(whole)}
        gone = self._known.keys() - there.keys()
        if gone:
            self._places = {name: place for name, place in self._places.items() if place.path not in gone}
        for path, size in there.items():
            if self._known.get(path) != size:
                self._read(path, size)
        self._known = there

    def remove(self, name: str) -> None:
        """Forget an entry that is damaged, for all processes and for good; a shard without entries is deleted."""
        place = self._places.pop(name)
        write_whole(_removed(place.path), "\n".join(sorted({*removed_from(place.path), name})) + "\n")
        if not any(other.path == place.path for other in self._places.values()):
            place.path.unlink(missing_ok=True)
            _removed(place.path).unlink(missing_ok=True)

    def _read(self, path: Path, size: int) -> None:
        try:
            with path.open("rb") as file:
                header = header_of(file, HEADER_LIMIT)
                parts = parts_of(header, file.tell(), json.loads(header["__metadata__"]["sums"]))
        except UNFIT:
            self.problems.append(f"{path} is cut off or damaged and is not used; copy it again, or delete it.")
            return
        out = removed_from(path)
        entries: dict[str, dict[str, Part]] = {}
        for full, part in parts.items():
            name, _, tensor = full.partition("/")
            entries.setdefault(name, {})[tensor] = part
        for name, own in entries.items():
            if name in out:
                continue
            if max(part.end for part in own.values()) <= size:
                self._places[name] = Place(path, own)
                self.torn.discard(name)
            else:
                self.torn.add(name)


def removed_from(shard: Path) -> set[str]:
    """Names of the entries that a shard holds and that were damaged."""
    try:
        return set(_removed(shard).read_text().split())
    except FileNotFoundError:
        return set()


def _removed(shard: Path) -> Path:
    return shard.with_suffix(".removed")


def is_full(error: OSError) -> bool:
    """Whether a disk, or someone's share of it, has no more room."""
    return error.errno in FULL


def portions(entries: Sequence[Path], limit: int = LIMIT) -> Iterator[list[Path]]:
    """The entries in groups of at most so many bytes, in their order."""
    group, size = [], 0
    for path in entries:
        own = path.stat().st_size
        if group and size + own > limit:
            yield group
            group, size = [], 0
        group.append(path)
        size += own
    if group:
        yield group


def write_shard(folder: Path, group: str, entries: Sequence[Path]) -> list[Path]:
    """Copy sound entries into one shard that is whole or not there, and return those that are in it. The entries stay.
    Damaged ones are left out: whoever reads them finds out, and says so. group: begins the shard's name.

    Raises OSError, also when an entry changes meanwhile.
    """
    header: dict[str, object] = {}
    sums, told, chosen, at = {}, {}, [], 0
    for path in entries:
        tensors = read_entry(path)
        if tensors is None:
            continue
        chosen.append(path)
        told[path.stem] = about(path)
        for name in sorted(tensors):
            full, size = f"{path.stem}/{name}", tensors[name].nbytes
            sums[full] = sum_of_tensor(tensors[name])
            header[full] = _described(tensors[name], at)
            at += size
    if not chosen:
        return []
    header["__metadata__"] = {"format": "pt", "sums": json.dumps(sums), "about": json.dumps(told)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    name = hashlib.sha256("".join(sorted(sums.values())).encode() + text).hexdigest()[:16]
    with whole_file(folder / f"{group}-{name}.safetensors") as draft, draft.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for path in chosen:
            tensors = read_entry(path)
            if tensors is None:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            for name in sorted(tensors):
                file.write(bytes_of(tensors[name]).data)
    return chosen


def _described(tensor: Tensor, at: int) -> dict[str, object]:
    return {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
