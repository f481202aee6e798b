"""What adapters make of a weight of the base, some rows at a time, so that no layer is ever whole in memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm

import torch
from torch import Tensor

from weft.errors import ModelError
from weft.families.storage import scaled
from weft.families.stored import WeightFiles
from weft.families.weights import Source
from weft.formats.adapter_file import MAGNITUDE, A, B, SavedAdapter
from weft.run.changes import Change, change_of

CHUNK = 1 << 22  # numbers that are worked on at once


@dataclass(frozen=True)
class Share:
    """What an adapter changes of one layer, and how strongly."""

    adapter: SavedAdapter
    path: str
    strength: float

    @property
    def row_step(self) -> int:
        """Rows of a Kronecker product's right half, which LoKr's change is made of; 1 in other kinds."""
        own = [f"{self.path}.lokr_w2{end}" for end in ("", "_a")]
        return next((len(self.adapter.tensors[key]) for key in own if key in self.adapter.tensors), 1)

    def on_rows(self, begin: int, end: int) -> Change:
        """The change of rows [begin, end) of the layer, its factors in fp32."""
        change = change_of(_rows_of(self.adapter, self.path, begin, end, self.row_step), self.path)
        if change.factors is not None:
            change = replace(change, factors=(change.factors[0].float(), change.factors[1].float()))
        return change


@dataclass(frozen=True)
class Rows:
    """Rows [begin, end) of a tensor in a file, which are rows of a layer from `first` on, and what changes them."""

    begin: int
    end: int
    first: int
    shares: tuple[Share, ...]

    @property
    def step(self) -> int:
        """Changes are made for whole multiples of so many rows."""
        return lcm(*(share.row_step for share in self.shares))

    def pieces(self, numbers: int) -> Iterator[tuple[int, int]]:
        """Ranges of the tensor's rows, of `numbers` numbers each, that are worked on one after another."""
        rows = max(CHUNK // numbers // self.step, 1) * self.step
        for begin in range(self.begin, self.end, rows):
            yield begin, min(begin + rows, self.end)

    def applied(self, weight: Tensor, begin: int, end: int) -> Tensor:
        """Rows [begin, end) of the tensor in fp32 with every change on them, from those of the base."""
        start = begin - self.begin + self.first
        for share in self.shares:
            weight = share.on_rows(start, start + end - begin).applied(weight, share.strength)
        return weight


Edits = Mapping[str, tuple[Rows, ...]]  # name of a tensor in the files -> its changed rows, one after another


def edits_of(source: Source, shares: Sequence[Share]) -> Edits:
    """Where in the files the weights of changed layers lie. Fused layers are changed in the rows of their parts."""
    by_layer: dict[str, list[Share]] = {}
    for share in shares:
        by_layer.setdefault(share.path, []).append(share)
    found: dict[str, list[Rows]] = {}
    for path, own in by_layer.items():
        piece = source.names[f"{path}.weight"]
        first = 0
        for begin, end in piece.rows or ((0, source.weights.entries[piece.source].shape[0]),):
            found.setdefault(piece.source, []).append(Rows(begin, end, first, tuple(own)))
            first += end - begin
    return {name: tuple(sorted(rows, key=lambda each: each.begin)) for name, rows in found.items()}


def check_sizes(source: Source, share: Share, where: str) -> None:
    """Raises ModelError for an adapter of a layer of another size."""
    shape = source.shape(f"{share.path}.weight")
    wanted = layer_shape(share.adapter, share.path, shape)
    if wanted != shape:
        raise ModelError(
            f"{where}: the adapter's change of '{share.path}' is {_told(wanted)}, and the base's layer is "
            f"{_told(shape)} (out x in). The adapter was trained on a model of another size."
        )


def layer_shape(adapter: SavedAdapter, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the weight that an adapter's tensors fit, told beside that of a base's; a rotation fits any number
    of outputs."""

    def sizes(*ends: str) -> tuple[int, ...]:
        return tuple(next(adapter.tensors[path + end] for end in ends if path + end in adapter.tensors).shape)

    if adapter.kind == "lora":
        return (sizes(B)[0], *sizes(A)[1:])
    if adapter.kind == "loha":
        return sizes(".hada_w1_a")[0], sizes(".hada_w1_b")[1]
    if adapter.kind == "lokr":
        rows = [sizes(f".lokr_{each}", f".lokr_{each}_a")[0] for each in ("w1", "w2")]
        columns = [sizes(f".lokr_{each}", f".lokr_{each}_b")[1] for each in ("w1", "w2")]
        return rows[0] * rows[1], columns[0] * columns[1]
    blocks, size = sizes(".oft_R.weight")[0], int(adapter.options["oft_block_size"])
    shared = blocks == 1 and len(shape) == 2 and shape[1] % size == 0
    return shape if shared else (shape[0], blocks * size)


def wide_rows(source: Source, name: str, begin: int, end: int) -> Tensor:
    """Rows of a tensor in the files in fp32, decoded where it is kept in 8 bits."""
    stored = source.weights.read(name, ((begin, end),))
    if name not in source.scales:
        return stored.float()
    scale = source.weights.read(source.scales[name]).float()
    if scale.numel() == 1:
        scale = scale.view(1, 1)
    else:  # one for each row, or for each block of a row
        scale = scale.reshape(source.weights.entries[name].shape[0], -1)[begin:end]
    return scaled(stored.flatten(1), scale, torch.float32).view(stored.shape)


def stored_rows(weights: WeightFiles, name: str) -> Iterator[Tensor]:
    """A tensor in the files as it lies there, some rows after another."""
    shape = weights.entries[name].shape
    if len(shape) < 2:
        yield weights.read(name)
        return
    for begin, end in plain_pieces(shape):
        yield weights.read(name, ((begin, end),))


def plain_pieces(shape: tuple[int, ...], begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of a tensor's rows from begin to end that are read one after another."""
    rows = max(1, CHUNK // row_numbers(shape))
    last = shape[0] if end is None else end
    for start in range(begin, last, rows):
        yield start, min(start + rows, last)


def row_numbers(shape: tuple[int, ...]) -> int:
    """Numbers in a row."""
    return max(1, torch.Size(shape[1:]).numel())


def _rows_of(adapter: SavedAdapter, path: str, begin: int, end: int, step: int) -> SavedAdapter:
    """An adapter of some rows of one layer's outputs alone."""
    own = {key: tensor for key, tensor in adapter.tensors.items() if key.startswith(f"{path}.")}
    for ending in (B, ".hada_w1_a", ".hada_w2_a"):
        if path + ending in own:
            own[path + ending] = own[path + ending][begin:end]
    if path + MAGNITUDE in own:
        own[path + MAGNITUDE] = own[path + MAGNITUDE].flatten()[begin:end]
    if adapter.kind == "lokr":
        left = path + (".lokr_w1" if path + ".lokr_w1" in own else ".lokr_w1_a")
        own[left] = own[left][begin // step : end // step]
    return replace(adapter, tensors=own, targets=(path,))


def _told(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
