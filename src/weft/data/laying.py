"""A batch laid out in one piece of host memory: every tensor goes straight to its place, padding is written once."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from weft.contracts import Batch
from weft.data.filed import Shown
from weft.data.slots import Slots, room_for

FRAMEWISE = ("latents", "image")  # tensors of a clip that are (C, F, H, W)
HALVES = {torch.bfloat16, torch.float16}


def collated(
    keys: tuple[str, ...],
    shown: Sequence[Shown],
    texts: Sequence[Shown],
    beside: Mapping[str, Tensor],
    slots: Slots,
    length: int | None = None,
) -> Batch:
    """One batch of B clips of one bucket, in the dtypes of `laid`. shown: of each clip the latents (C, F, H, W) and
    what stands beside them, of which the first `length` latent frames are kept: what a causal autoencoder gives for the
    shorter clip. texts: of each caption what a store has. beside: what all batches are told, and no part of the
    slot."""
    stacked = {name: _cut(name, shape, length) for name, shape in shown[0].shapes.items()} if shown else {}
    further = {name: shape for name, shape in texts[0].shapes.items() if name != "text"}
    lengths = [text.shapes["text"][0] for text in texts]
    width, columns = texts[0].shapes["text"][1], mask_width(lengths)
    room = room_for(
        {
            **{name: (laid(name, shown), (len(shown), *shape)) for name, shape in stacked.items()},
            **{name: (laid(name, texts), (len(texts), *shape)) for name, shape in further.items()},
            "text": (laid("text", texts), (len(texts), max(lengths), width)),
            "text_mask": (torch.bool, (len(texts), columns)),
        },
        slots,
    )
    for i, entry in enumerate(shown):
        for name in stacked:
            _write(entry, name, room[name][i], slots)
    room["text_mask"].fill_(True)
    for i, (entry, own) in enumerate(zip(texts, lengths, strict=True)):
        for name in further:
            entry.write(name, room[name][i])
        entry.write("text", room["text"][i, :own])
        if own < columns:
            room["text"][i, own:] = 0
            room["text_mask"][i, own:] = False
    return Batch({**room, **beside}, keys)


def laid(name: str, shown: Iterable[Shown]) -> torch.dtype:
    """In what a tensor is laid: half precision where all of the batch is kept so, since the engine widens it without
    loss once it is on the device, and half the bytes are read and sent; else fp32."""
    kept = {entry.dtypes[name] for entry in shown}
    return kept.pop() if len(kept) == 1 and kept <= HALVES else torch.float32


def mask_width(lengths: Sequence[int]) -> int:
    """Columns of the mask of texts: 1 where they are of one length, for then all is text, and a shape is known without
    a look at the device."""
    return 1 if min(lengths) == max(lengths) else max(lengths)


def _cut(name: str, shape: tuple[int, ...], length: int | None) -> tuple[int, ...]:
    if name not in FRAMEWISE or length is None:
        return shape
    return (shape[0], min(shape[1], length), *shape[2:])


def _write(entry: Shown, name: str, target: Tensor, slots: Slots) -> None:
    """The tensor, or as many of its first frames as the target has."""
    shape = entry.shapes[name]
    if shape == tuple(target.shape):
        entry.write(name, target)
        return
    whole = room_for({name: (target.dtype, shape)}, slots)[name]
    entry.write(name, whole)
    target.copy_(whole[:, : target.shape[1]])
