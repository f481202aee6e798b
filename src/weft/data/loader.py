"""Batches of latents and texts: drawn in an order that the seed fixes, padded, prepared one thread ahead."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from weft.contracts import Batch, Encoders
from weft.data.ahead import ahead
from weft.data.cache import Store
from weft.data.encoding import EMPTY_CAPTION
from weft.data.sampler import BucketSampler, chance
from weft.data.survey import Clip, Survey, bucket_of
from weft.errors import DataError
from weft.events import Listener

BATCHES_AHEAD = 3
FRAMEWISE = ("latents", "image")  # tensors of a clip that are (C, F, H, W)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How items are drawn. caption_dropout: the share that trains on the empty caption.

    random_frames: the share of batches that are cut to a shorter length, drawn from latent_frames.
    """

    batch_size: int
    seed: int
    caption_dropout: float
    random_frames: float = 0.0
    latent_frames: tuple[int, ...] = ()


@dataclass(frozen=True)
class FailedItem:
    """A validation item that could not be loaded: to be reported, never averaged."""

    key: str
    reason: str


@dataclass(frozen=True)
class VideoExperience:
    """An endless stream of training batches. Every rank reads its own share of one common order."""

    name: str
    last_step: int
    clips: tuple[Clip, ...]
    store: Store
    draws: Draws

    @property
    def epoch_draws(self) -> int:
        """Micro-batches of all ranks in one epoch."""
        return self._sampler().batches_per_epoch

    def position(self, drawn: int) -> dict[str, Any]:
        """Nothing: the seed and a draw's number say what it holds."""
        return {}

    def resume_at(self, position: Mapping[str, Any]) -> None:
        assert not position, f"clips are found by the number of a draw, but the checkpoint has {sorted(position)}"

    def batches(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        """Micro-batches of one rank, the draws start + rank, start + rank + world, ... of the run; the next few are
        loaded in the background.

        Each holds latents (B, C, F, H, W), text (B, L, D) padded with zeros, text_mask (B, L), True where text is, and
        what the encoders give beside them.
        Raises DataError that names a clip which can no longer be loaded.
        """
        return ahead(self._drawn(self._sampler(), count(start + rank, world)), BATCHES_AHEAD)

    def _sampler(self) -> BucketSampler:
        return BucketSampler(grouped(self.clips), self.draws.batch_size, self.draws.seed)

    def _drawn(self, sampler: BucketSampler, draws: Iterator[int]) -> Iterator[Batch]:
        """The batches of the draws; the store hears of the clips of the next ones."""
        coming: deque[tuple[int, list[Clip]]] = deque()
        while True:
            for draw in islice(draws, BATCHES_AHEAD - len(coming)):
                clips = [self.clips[i] for i in sampler.batch_indices(draw)]
                self.store.expect(clips)
                coming.append((draw, clips))
            draw, clips = coming.popleft()
            yield self._batch(draw, clips)

    def _batch(self, draw: int, clips: Sequence[Clip]) -> Batch:
        """The draw-th batch of the run, counted over all ranks."""
        captions = [self._caption(clip, draw, i) for i, clip in enumerate(clips)]
        shown = [self.store.clip(clip) for clip in clips]
        length = self._length(draw, shown[0]["latents"].shape[1])
        return collated(clips, [cut(tensors, length) for tensors in shown], [self.store.text(c) for c in captions])

    def _caption(self, clip: Clip, draw: int, place: int) -> str:
        """One of the clip's captions, or the empty one where the dice of (seed, draw, place) say so."""
        seed = self.draws.seed
        if chance(seed, "caption", draw, place) < self.draws.caption_dropout:
            return EMPTY_CAPTION
        return clip.captions[int(chance(seed, "which caption", draw, place) * len(clip.captions))]

    def _length(self, draw: int, frames: int) -> int:
        """Latent frames that are kept of a batch that has so many."""
        seed, shorter = self.draws.seed, [length for length in self.draws.latent_frames if length < frames]
        if not shorter or chance(seed, "cut", draw) >= self.draws.random_frames:
            return frames
        return shorter[int(chance(seed, "length", draw) * len(shorter))]


@dataclass(frozen=True)
class VideoDataset:
    """What a run reads: the experience to train on, and the clips to measure on. survey: without what failed."""

    survey: Survey
    train: VideoExperience
    store: Store

    def validation(self) -> tuple[list[Batch], list[FailedItem]]:
        """Batches of the held-out clips, one bucket in each, in a fixed order and with their own captions.

        Beside them the items that cannot be measured, which belong to no batch.
        """
        failed = [FailedItem(clip.key, clip.reason) for clip in self.survey.unreadable if clip.split == "validation"]
        size = self.train.draws.batch_size
        clips = sorted(self.survey.validation, key=lambda clip: (bucket_of(clip), clip.key))
        loaded: list[tuple[Clip, Mapping[str, Tensor]]] = []
        for clip in clips:
            try:
                loaded.append((clip, self.store.clip(clip)))
            except DataError as error:
                failed.append(FailedItem(clip.key, str(error)))
        batches = []
        for group in grouped([clip for clip, _ in loaded]):
            for first in range(0, len(group), size):
                chosen = [loaded[i] for i in group[first : first + size]]
                texts = [self.store.text(clip.caption) for clip, _ in chosen]
                batches.append(collated([clip for clip, _ in chosen], [tensors for _, tensors in chosen], texts))
        return batches, failed


def filled_survey(
    survey: Survey, store: Store, encoders: Callable[[], Encoders], tell: Listener, budget: int
) -> Survey:
    """The survey without the clips that could not be encoded. Raises DataError beyond the error budget."""
    survey.refuse_when_unusable(budget)
    filled = store.fill(encoders, tell)
    usable = survey.without(filled.failed)
    usable.refuse_when_unusable(budget)
    return usable


def grouped(clips: Sequence[Clip]) -> list[list[int]]:
    """Places of the clips in each bucket, a place as often as its clip repeats unless it is a validation clip."""
    groups: dict[object, list[int]] = {}
    for place, clip in enumerate(clips):
        times = clip.repeats if clip.split == "train" else 1
        groups.setdefault(bucket_of(clip), []).extend([place] * times)
    return list(groups.values())


def collated(
    clips: Sequence[Clip], shown: Sequence[Mapping[str, Tensor]], told: Sequence[Mapping[str, Tensor]]
) -> Batch:
    """One batch of clips of one bucket. shown: of each clip the latents (C, F, H, W) and what stands beside them; told:
    of each caption the text (L_i, D) and what stands beside it."""
    text, mask = padded([tensors["text"] for tensors in told])
    beside = [{name: tensor for name, tensor in tensors.items() if name != "text"} for tensors in told]
    tensors = {**stacked(shown), **stacked(beside), "text": text, "text_mask": mask}
    return Batch(tensors, tuple(clip.key for clip in clips))


def cut(tensors: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """The first latent frames of a clip: what a causal autoencoder gives for the shorter clip."""
    return {name: tensor[:, :length] if name in FRAMEWISE else tensor for name, tensor in tensors.items()}


def stacked(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of one shape under each name, as fp32 (B, ...)."""
    return {name: torch.stack([tensors[name].float() for tensors in items]) for name in items[0]}


def padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts (L_i, D) as fp32 (B, L, D) with zeros behind the shorter ones, and the mask (B, L) of what is text."""
    longest = max(len(text) for text in texts)
    padded = torch.zeros(len(texts), longest, texts[0].shape[1])
    mask = torch.zeros(len(texts), longest, dtype=torch.bool)
    for i, text in enumerate(texts):
        padded[i, : len(text)] = text.float()
        mask[i, : len(text)] = True
    return padded, mask
