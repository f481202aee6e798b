"""The largest questions that a run asks its network: clips of a bucket, or rows of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.contracts import Denoise, Model, Tokens, as_video
from weft.data.buckets import Bucket
from weft.run.config import RunConfig


@dataclass(frozen=True, order=True)
class Row:
    """A row of text, the shape in which a language model is asked."""

    tokens: int

    def __str__(self) -> str:
        return f"rows of {self.tokens:,} tokens"


Shape = Bucket | Row


def shapes_of(config: RunConfig, survey: Any) -> dict[Shape, int]:
    """Items of an epoch by their shape, the largest first. Of text there is one: rows that are not packed to a length
    are as long as the longest text in a batch, which in a stream may be data.length."""
    if config.family.medium == "video":
        return survey.buckets()
    longest = config.data.length if survey.streamed else survey.longest
    length = survey.capacity or longest
    return {Row(length): survey.rows} if length else {}


def shape_at(config: RunConfig, shape: Sequence[int]) -> Shape:
    """The shape whose tensor is at hand: latents (B, C, f, h, w), or ids (B, L)."""
    if config.family.medium == "text":
        return Row(shape[1])
    geometry, (_, _, f, h, w) = as_video(config.family).geometry(), shape
    frames, height, width = (f - 1) * geometry.time_stride + 1, h * geometry.space_stride, w * geometry.space_stride
    return Bucket(frames, height, width, geometry.tokens(frames, height, width))


def question(config: RunConfig, shape: Shape) -> Denoise | Tokens:
    """One micro-batch of a shape, in all that a family may be told; of text with every token learned."""
    items = config.data.batch_size
    if isinstance(shape, Row):
        ids = torch.zeros(items, shape.tokens, dtype=torch.long)
        return Tokens(ids, torch.arange(shape.tokens).repeat(items, 1), ids.clone())
    family = as_video(config.family)
    latents = family.geometry().latent_shape(shape.frames, shape.height, shape.width)
    given = torch.zeros(items, latents[1], dtype=torch.bool) if family.image == "frames" else None
    conditions, expert = family.conditions(items, *latents[1:]), family.experts[0].name
    return Denoise(torch.randn(items, *latents), torch.rand(items), conditions, given, expert)


def answered(model: Model, asked: Denoise | Tokens) -> Tensor:
    """A number that a backward pass can begin with."""
    if isinstance(asked, Tokens):
        return model.losses(asked).sum()
    return model.velocity(asked).float().square().sum()
