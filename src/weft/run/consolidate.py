"""One safetensors file from a checkpoint of many processes, one tensor in memory at a time."""

import json
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from weft.durable import whole_file
from weft.engines.dcp_folder import PICKLED, DcpFolder
from weft.errors import ConfigError, ModelError, did_you_mean
from weft.run.checkpoint import read_checkpoint
from weft.run.checkpoint_folders import damage
from weft.run.checkpoint_tree import Shape, shapes_in
from weft.run.zero_folder import RANK, ZeroFolder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# As safetensors calls them.
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class Source(Protocol):
    """Tensors that are read one by one. left_out: names of what is no tensor."""

    @property
    def shapes(self) -> Mapping[str, Shape]: ...
    @property
    def left_out(self) -> list[str]: ...
    def read(self, name: str) -> Tensor: ...


class OwnCheckpoint:
    """The adapters in a checkpoint of ours, under their canonical names; those of several roles after the role's."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError when it is damaged."""
        if problem := damage(folder):
            raise ModelError(f"{folder} cannot be used: {problem}.")
        tree = read_checkpoint(folder).tree
        found = shapes_in({"adapters": tree["adapters"]})
        several = len(tree["adapters"]) > 1
        self.places = {}
        for place in found:
            role, _, key = place.removeprefix("adapters/").partition("/")
            self.places[f"{role}.{key}" if several else key] = place
        self.shapes = {name: found[place] for name, place in self.places.items()}
        self.left_out: list[str] = []
        self.folder = folder
        self.shards = DcpFolder(folder / "tensors")

    def read(self, name: str) -> Tensor:
        place = self.places[name]
        if place in self.shards.shapes:
            return self.shards.read(place)
        with safe_open(self.folder / "state.safetensors", "pt") as small:
            return small.get_tensor(place)


@dataclass(frozen=True)
class Under:
    """The tensors of a source whose names begin so, without that beginning."""

    source: Source
    prefix: str
    shapes: Mapping[str, Shape] = field(init=False)

    def __post_init__(self) -> None:
        start = len(self.prefix)
        named = {name[start:]: shape for name, shape in self.source.shapes.items() if name.startswith(self.prefix)}
        object.__setattr__(self, "shapes", named)

    @property
    def left_out(self) -> list[str]:
        return self.source.left_out

    def read(self, name: str) -> Tensor:
        return self.source.read(self.prefix + name)


def open_source(folder: Path, allow_pickle: bool = False) -> Source:
    """What a checkpoint folder holds, whoever wrote it. Raises ModelError that says what was looked for."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder. Name that of a checkpoint: runs/NAME/checkpoints/global_step_N.")
    if (folder / "manifest.json").is_file():
        return OwnCheckpoint(folder)
    latest = folder / "latest"  # DeepSpeed's word for its newest tag
    if latest.is_file() and (tagged := folder / latest.read_text().strip()).is_dir():
        folder = tagged
    if any(RANK.search(path.name) for path in folder.iterdir()):
        return ZeroFolder(folder)
    if (folder / PICKLED).is_file() or any(folder.glob("*.safetensors")):
        return DcpFolder(folder, allow_pickle)
    raise ModelError(
        f"{folder} is no checkpoint that is known: it has neither manifest.json (Weft's), nor "
        f"zero_pp_rank_*_optim_states.pt (DeepSpeed's), nor {PICKLED} or *.safetensors (torch's DCP)."
    )


def under(source: Source, prefix: str) -> Source:
    """What lies under a prefix. Raises ConfigError when nothing does."""
    found = Under(source, prefix)
    if not found.shapes:
        raise ConfigError(f"--under: no tensor's name begins with '{prefix}'. {did_you_mean(prefix, heads(source))}")
    return found


def heads(source: Source) -> list[str]:
    """First parts of all names: model., optimizer., ..."""
    return sorted({f"{name.partition('.')[0]}." for name in source.shapes})


def consolidate(source: Source, path: Path, dtype: torch.dtype) -> int:
    """Write every tensor into one safetensors file, floating ones in dtype; its bytes. Raises ConfigError when the disk
    has no room for it."""
    kinds = {n: (shape, dtype if kind.is_floating_point else kind) for n, (shape, kind) in source.shapes.items()}
    # Wide numbers first, so that each tensor lies where its numbers can be mapped.
    names = sorted(kinds, key=lambda name: (-kinds[name][1].itemsize, name))
    header, size = header_of({name: kinds[name] for name in names})
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if len(header) + size > free:
        raise ConfigError(f"--out: {path} needs {(len(header) + size) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.")
    with whole_file(path) as draft, draft.open("wb") as file:
        file.write(header)
        for numbers in (source.read(name).to(kinds[name][1]) for name in names):
            write_numbers(file, numbers)
    return len(header) + size


def header_of(kinds: Mapping[str, Shape]) -> tuple[bytes, int]:
    """The header of a safetensors file with these tensors in this order, and the bytes of what follows it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in kinds.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end


def write_numbers(file: BinaryIO, tensor: Tensor) -> None:
    """A tensor's bytes, as they lie in memory."""
    if tensor.numel():
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
