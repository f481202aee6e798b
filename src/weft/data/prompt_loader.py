"""Batches of captions alone: drawn in an order that the seed fixes, each in a shape that the seed draws."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor

from weft.contracts import Batch
from weft.data.ahead import ahead
from weft.data.buckets import Bucket
from weft.data.cache import Store
from weft.data.laying import collated
from weft.data.loader import BATCHES_AHEAD, Draws, FailedItem, drawn_caption, told_beside
from weft.data.prompt_files import Prompt
from weft.data.prompt_survey import PromptSurvey
from weft.data.sampler import BucketSampler, chance
from weft.data.slots import HostMemory, Slots, pageable


@dataclass(frozen=True)
class PromptExperience:
    """An endless stream of training batches. Every rank reads its own share of one common order.

    beside: name -> text that every batch tells beside its captions. memory: where the device likes batches to lie.
    """

    name: str
    last_step: int
    survey: PromptSurvey
    store: Store
    draws: Draws
    beside: Mapping[str, str] = field(default_factory=dict)
    memory: HostMemory = pageable

    @property
    def epoch_draws(self) -> int:
        """Micro-batches of all ranks in one epoch."""
        return self.survey.epoch_draws(self.draws.batch_size)

    def position(self, drawn: int) -> dict[str, Any]:
        """Nothing: the seed and a draw's number say what it holds."""
        return {}

    def resume_at(self, position: Mapping[str, Any]) -> None:
        assert not position, f"captions are found by the number of a draw, but the checkpoint has {sorted(position)}"

    def batches(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        """Micro-batches of one rank, the draws start + rank, start + rank + world, ... of the run; the next few are
        read in the background.

        Each holds blank (B, C, F, H, W), zeros in the shape of the latents that are to be made; text (B, L, D) padded
        with zeros, text_mask (B, L), True where text is, or (B, 1) where the texts are of one length, and what the
        encoders give beside them; and of each text beside the captions the same under NAME/, (1, ...). Raises
            DataError.
        """
        return ahead(self._drawn(count(start + rank, world)), BATCHES_AHEAD)

    def shape(self, draw: int) -> Bucket:
        """The shape of the draw-th batch of the run: any, with equal chances."""
        shapes = self.survey.shapes
        return shapes[int(chance(self.draws.seed, "shape", draw) * len(shapes))]

    def _drawn(self, draws: Iterator[int]) -> Iterator[Batch]:
        prompts = self.survey.train
        sampler = BucketSampler([range(len(prompts))], self.draws.batch_size, self.draws.seed)
        beside, slots = told_beside(self.store, self.beside), Slots(self.memory)
        for draw in draws:
            yield self._batch(draw, [prompts[i] for i in sampler.batch_indices(draw)], beside, slots)

    def _batch(self, draw: int, prompts: Sequence[Prompt], beside: Mapping[str, Tensor], slots: Slots) -> Batch:
        """The draw-th batch of the run, counted over all ranks."""
        captions = [drawn_caption((prompt.text,), self.draws, draw, i) for i, prompt in enumerate(prompts)]
        shape = self.shape(draw)
        latents = self.survey.geometry.latent_shape(shape.frames, shape.height, shape.width)
        blank = torch.zeros(len(prompts), *latents)
        texts = [self.store.shown(caption) for caption in captions]
        return collated(tuple(prompt.key for prompt in prompts), [], texts, {"blank": blank, **beside}, slots)


@dataclass(frozen=True)
class PromptDataset:
    """What a run reads: the experience to train on, and nothing to measure on."""

    survey: PromptSurvey
    train: PromptExperience
    store: Store

    @property
    def stream(self) -> list[PromptExperience]:
        """The one stretch that a run goes through."""
        return [self.train]

    def validation(self) -> tuple[list[Batch], list[FailedItem]]:
        return [], []
