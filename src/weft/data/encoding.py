"""From a clip to its latents and from a caption to its text, one at a time: what a cache keeps."""

from collections.abc import Callable

import torch
from torch import Tensor

from weft.contracts import Encoders
from weft.data.media import Cut, read_image, read_video
from weft.data.survey import Clip, Survey, bucket_of
from weft.errors import DataError

# Raise it whenever the same file would give other pixels or latents: entries of older code are then not found.
CODE_VERSION = 1
EMPTY_CAPTION = ""  # stands in for dropped captions, and is not the same as zeros: T5 gives it an end token


def clip_pixels(clip: Clip, fps: float) -> Tensor:
    """(1, 3, F, H, W) uint8 of a clip in its bucket. Raises DataError naming the file."""
    bucket = bucket_of(clip)
    if clip.media == "image":
        frames = read_image(clip.path, bucket.width, bucket.height)
    else:
        frames = read_video(clip.path, Cut(fps, bucket.frames, bucket.height, bucket.width))
    return torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)[None]


def encoded_pixels(pixels: Tensor, clip: Clip, survey: Survey, encoders: Callable[[], Encoders]) -> Tensor:
    """Latents (C, F, H, W) fp32 of one clip; encoded alone, it depends on no neighbour. Raises DataError on NaN."""
    with torch.no_grad():
        latents = encoders().latents(pixels.float() / 127.5 - 1)[0].float().cpu().contiguous()
    expected = latent_shape(clip, survey)
    assert tuple(latents.shape) == expected, f"the encoder gives {tuple(latents.shape)}, its geometry says {expected}"
    if not latents.isfinite().all():
        raise DataError(
            f"{clip.key}: its latents are not finite. Encode in fp32 or bf16, not fp16, or remove {clip.path}."
        )
    return latents


def encoded_caption(caption: str, encoders: Callable[[], Encoders]) -> Tensor:
    """(L, D) in the encoder's dtype, of one caption encoded alone. Raises DataError on NaN."""
    with torch.no_grad():
        text = encoders().text([caption])[0].cpu().contiguous()
    if not text.isfinite().all():
        raise DataError(f"The text encoding of '{caption[:60]}' is not finite. Encode in fp32 or bf16, not fp16.")
    return text


def latent_shape(clip: Clip, survey: Survey) -> tuple[int, int, int, int]:
    """(C, F, H, W) of a clip's latents, by arithmetic."""
    bucket = bucket_of(clip)
    return survey.geometry.latent_shape(bucket.frames, bucket.height, bucket.width)


def captions_of(survey: Survey) -> list[str]:
    """Every caption that a batch may ask for, once each, the empty one first."""
    return list(dict.fromkeys([EMPTY_CAPTION, *(clip.caption for clip in survey.usable)]))
