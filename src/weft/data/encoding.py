"""From a clip to its latents and from a caption to its text: what a cache keeps."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from weft.contracts import Encoders
from weft.data.media import Cut, read_cuts, read_image
from weft.data.survey import Clip, Wanted, bucket_of
from weft.errors import DataError

# Raise it whenever the same file would give other pixels or latents: entries of older code are then not found.
CODE_VERSION = 1
EMPTY_CAPTION = ""  # stands in for dropped captions, and is not the same as zeros: T5 gives it an end token


def cut_of(clip: Clip, fps: float) -> Cut:
    """What is read of a clip's file."""
    bucket = bucket_of(clip)
    return Cut(
        fps, bucket.frames, bucket.height, bucket.width, start=clip.start, stride=clip.stride,
        declared_fps=clip.declared_fps,
    )  # fmt: skip


def clip_pixels(clip: Clip, fps: float) -> Tensor:
    """(1, 3, F, H, W) uint8 of a clip in its bucket. Raises DataError naming the file."""
    ((_, pixels),) = pixels_of([clip], fps)
    return pixels


def pixels_of(clips: Sequence[Clip], fps: float) -> Iterator[tuple[Clip, Tensor]]:
    """Each clip with its pixels (1, 3, F, H, W) uint8, of items of one file, which is read once. Raises DataError
    naming the file; what came before it holds."""
    if clips[0].media == "image":
        for clip in clips:
            bucket = bucket_of(clip)
            yield clip, _tensor(read_image(clip.path, bucket.width, bucket.height).copy())  # Pillow's is read-only
        return
    for place, frames in read_cuts(clips[0].path, [cut_of(clip, fps) for clip in clips]):
        yield clips[place], _tensor(frames)


def encoded_pixels(
    pixels: Tensor, clips: Sequence[Clip], wanted: Wanted, encoders: Callable[[], Encoders]
) -> list[dict[str, Tensor]]:
    """For each of the clips, whose pixels are (B, 3, F, H, W) uint8: latents (C, F, H, W) in fp32, and what the model
    is told of its first frame. Raises DataError on NaN."""
    with torch.no_grad():
        known = pixels.float() / 127.5 - 1
        encoded = {"latents": encoders().latents(known).float(), **encoders().given(known)}
    encoded = {name: tensor.cpu() for name, tensor in encoded.items()}
    return [
        _sound({name: tensor[i].clone().contiguous() for name, tensor in encoded.items()}, clip, wanted)
        for i, clip in enumerate(clips)
    ]


def encoded_caption(caption: str, encoders: Callable[[], Encoders]) -> dict[str, Tensor]:
    """Of one caption encoded alone: text (L, D) in the encoder's dtype, and what else the encoders give. Raises
    DataError on NaN."""
    with torch.no_grad():
        encoded: Mapping[str, Tensor] = encoders().text([caption])[0]
    tensors = {name: tensor.cpu().contiguous() for name, tensor in encoded.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise DataError(f"The text encoding of '{caption[:60]}' is not finite. Encode in fp32 or bf16, not fp16.")
    return tensors


def latent_shape(clip: Clip, wanted: Wanted) -> tuple[int, int, int, int]:
    """(C, F, H, W) of a clip's latents, by arithmetic."""
    bucket = bucket_of(clip)
    return wanted.geometry.latent_shape(bucket.frames, bucket.height, bucket.width)


def captions_of(wanted: Wanted) -> list[str]:
    """Every text that a batch may ask for, once each, the empty caption first."""
    return list(dict.fromkeys([EMPTY_CAPTION, *wanted.texts]))


def _sound(tensors: dict[str, Tensor], clip: Clip, wanted: Wanted) -> dict[str, Tensor]:
    """The tensors of a clip, when they are finite and of the right shape."""
    found, expected = tuple(tensors["latents"].shape), latent_shape(clip, wanted)
    assert found == expected, f"the encoder gives {found}, its geometry says {expected}"
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            what = "its latents are" if name == "latents" else f"'{name}' of its first frame is"
            raise DataError(f"{clip.key}: {what} not finite. Encode in fp32 or bf16, not fp16, or remove {clip.path}.")
    return tensors


def _tensor(frames: np.ndarray) -> Tensor:
    """(F, H, W, 3) as (1, 3, F, H, W), of the same memory."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None]
