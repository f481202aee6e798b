"""A checkpoint that DeepSpeed wrote under ZeRO, read tensor by tensor without DeepSpeed.

Facts of its layout (DeepSpeed 0.19, `save_checkpoint`): the fp32 masters of trained parameters lie flat in
`*_optim_states.pt`, one file of each rank. ZeRO-1 and 2: the ranks' vectors of a parameter group, one after the other,
are the group's parameters in the order of `param_shapes`, with the padding that is named there. ZeRO-3: each rank has
ceil(n / ranks) numbers of every parameter, at one place in all ranks' vectors. Buffers and frozen parameters are in
`*_model_states.pt`; under ZeRO-3 frozen ones are cut in the same way.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from weft.errors import ModelError

RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
Reader = Callable[[], Tensor]
OF_ENUMS = "builtins.getattr"  # by which Python before 3.11.4 pickles members of an enum


class Inert:
    """Stands for an object of DeepSpeed's in its files (a loss scaler, the number of the stage), and does nothing."""

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __setstate__(self, state: Any) -> None:
        self.state = (state,)


@dataclass(frozen=True)
class Flat:
    """Vectors that are one, one after the other."""

    pieces: Sequence[Tensor]

    def cut(self, start: int, length: int) -> Tensor:
        """Numbers start to start + length, fewer where the vectors end."""
        found = []
        for piece in self.pieces:
            low, high = max(0, start), min(len(piece), start + length)
            if low < high:
                found.append(piece[low:high])
            start -= len(piece)
        return torch.cat(found) if found else torch.empty(0)


class ZeroFolder:
    """Tensors of a ZeRO checkpoint by name: fp32 masters of what was trained, and what was frozen as it is."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError for files that are missing, that could run code, or that are cut by tensor parallelism."""
        self.folder = folder
        files = {path: found for path in folder.iterdir() if (found := RANK.search(path.name))}
        if any(int(found[2]) for found in files.values()):
            raise ModelError(f"{folder}: it is cut by tensor parallelism (mp_rank_01), which is not read.")
        ranks = sorted(files, key=lambda path: int(files[path][1]))
        self.optimizers = [loaded(path)["optimizer_state_dict"] for path in ranks]
        first = self.optimizers[0]
        count = first["partition_count"]
        count = max(count) if isinstance(count, list) else count
        if count != len(ranks) or [int(files[path][1]) for path in ranks] != list(range(count)):
            raise ModelError(
                f"{folder}: it was written by {count} processes, and the files of {len(ranks)} are there "
                f"({ranks[0].name}, ...). Copy the others too."
            )
        self.whole = "single_partition_of_fp32_groups" in first  # ZeRO-1 and 2: parameters are not cut
        pattern = "mp_rank_00_model_states.pt" if self.whole else "zero_pp_rank_{}_mp_rank_00_model_states.pt"
        self.models = [loaded(folder / pattern.format(rank)) for rank in range(1 if self.whole else count)]
        readers = {name: (shape, dtype, read) for name, shape, dtype, read in self._entries()}
        for alias, name in self.models[0]["shared_params"].items():
            if name in readers:
                readers[alias] = readers[name]
        self.shapes = {name: (shape, dtype) for name, (shape, dtype, _) in readers.items()}
        self.readers = {name: read for name, (_, _, read) in readers.items()}
        self.left_out: list[str] = []

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        shape, _ = self.shapes[name]
        numbers = self.readers[name]()
        if numbers.numel() != prod(shape):
            raise ModelError(f"{self.folder}: of {name} {shape} only {numbers.numel()} numbers are there.")
        return numbers.view(shape)

    def _entries(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, Reader]]:
        """(name, shape, dtype, how it is read) of every tensor."""
        first = self.models[0]
        for name in first["buffer_names"]:
            buffer = first["module"][name]
            yield name, tuple(buffer.shape), buffer.dtype, partial(torch.clone, buffer)
        for name, shape in (first.get("frozen_param_shapes") or {}).items():
            pieces = Flat([model["frozen_param_fragments"][name].flatten() for model in self.models])
            dtype = pieces.pieces[0].dtype
            yield name, tuple(shape), dtype, partial(pieces.cut, 0, prod(shape))
        yield from self._trained_whole() if self.whole else self._trained_in_slices()

    def _trained_whole(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, Reader]]:
        first = self.optimizers[0]
        key = "single_partition_of_fp32_groups"
        for number, shapes in enumerate(self.models[0]["param_shapes"]):
            vector = Flat([rank[key][number] for rank in self.optimizers])
            # Earlier versions had no padding between parameters.
            paddings = (first.get("param_alignment_paddings") or {number: [0] * len(shapes)})[number]
            start = 0
            for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
                length = prod(shape)
                yield name, tuple(shape), torch.float32, partial(vector.cut, start, length)
                start += length + padding

    def _trained_in_slices(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, Reader]]:
        vectors = [Flat(rank["fp32_flat_groups"]) for rank in self.optimizers]
        start = 0
        for name, shape in ((n, s) for shapes in self.models[0]["param_shapes"] for n, s in shapes.items()):
            length = prod(shape)
            own = -(-length // len(vectors))
            yield name, tuple(shape), torch.float32, partial(joined, vectors, start, own, length)
            start += own


def joined(vectors: Sequence[Flat], start: int, each: int, length: int) -> Tensor:
    """A tensor of which each vector has `each` numbers from start on; the last ones are padding."""
    return torch.cat([vector.cut(start, each) for vector in vectors])[:length]


def loaded(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's, its tensors mapped, not read. Raises ModelError when it is missing or could run code."""
    if not path.is_file():
        raise ModelError(f"{path} is missing.")
    foreign = get_unsafe_globals_in_checkpoint(path)
    odd = [name for name in foreign if not name.startswith("deepspeed.") and name != OF_ENUMS]
    if odd:
        raise ModelError(f"{path} holds objects of {', '.join(sorted(odd))}; it is not read, for they could run code.")
    # Not DeepSpeed's classes themselves, which need not be installed, nor getattr: nothing of them is used.
    with safe_globals([(Inert, name) for name in foreign]):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
