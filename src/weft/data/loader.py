"""Batches of latents and texts: drawn in an order that the seed fixes, padded, prepared one thread ahead."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from weft.contracts import Batch, Encoders
from weft.data.ahead import ahead
from weft.data.cache import Store
from weft.data.encoding import EMPTY_CAPTION
from weft.data.filed import Held
from weft.data.laying import collated, mask_width
from weft.data.sampler import BucketSampler, chance
from weft.data.slots import HostMemory, Slots, pageable
from weft.data.survey import Clip, Survey, bucket_of
from weft.errors import DataError
from weft.events import Listener

BATCHES_AHEAD = 3


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
    """An endless stream of training batches. Every rank reads its own share of one common order.

    beside: name -> text that every batch tells beside its captions. memory: where the device likes batches to lie.
    """

    name: str
    last_step: int
    clips: tuple[Clip, ...]
    store: Store
    draws: Draws
    beside: Mapping[str, str] = field(default_factory=dict)
    memory: HostMemory = pageable

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

        Each holds latents (B, C, F, H, W), text (B, L, D) padded with zeros, text_mask (B, L), True where text is, or
        (B, 1) where the texts are of one length, and what the encoders give beside them; and of each text beside the
        captions the same under NAME/, (1, ...). What is kept in half precision still is: an engine widens it. They lie
        in memory that is used again when the batch's last tensor has gone: see Slots.
        Raises DataError that names a clip which can no longer be loaded.
        """
        return ahead(self._drawn(self._sampler(), count(start + rank, world)), BATCHES_AHEAD)

    def _sampler(self) -> BucketSampler:
        return BucketSampler(grouped(self.clips), self.draws.batch_size, self.draws.seed)

    def _drawn(self, sampler: BucketSampler, draws: Iterator[int]) -> Iterator[Batch]:
        """The batches of the draws; the store hears of the clips of the next ones."""
        coming: deque[tuple[int, list[Clip]]] = deque()
        beside, slots = told_beside(self.store, self.beside), Slots(self.memory)
        while True:
            for draw in islice(draws, BATCHES_AHEAD - len(coming)):
                clips = [self.clips[i] for i in sampler.batch_indices(draw)]
                self.store.expect(clips)
                coming.append((draw, clips))
            draw, clips = coming.popleft()
            yield self._batch(draw, clips, beside, slots)

    def _batch(self, draw: int, clips: Sequence[Clip], beside: Mapping[str, Tensor], slots: Slots) -> Batch:
        """The draw-th batch of the run, counted over all ranks."""
        captions = [drawn_caption(clip.captions, self.draws, draw, i) for i, clip in enumerate(clips)]
        shown = [self.store.shown(clip) for clip in clips]
        length = self._length(draw, shown[0].shapes["latents"][1])
        texts = [self.store.shown(caption) for caption in captions]
        return collated(tuple(clip.key for clip in clips), shown, texts, beside, slots, length)

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

    @property
    def stream(self) -> list[VideoExperience]:
        """The one stretch that a run goes through."""
        return [self.train]

    def validation(self) -> tuple[list[Batch], list[FailedItem]]:
        """Batches of the held-out clips, one bucket in each, in a fixed order and with their own captions.

        Beside them the items that cannot be measured, which belong to no batch.
        """
        failed = [FailedItem(clip.key, clip.reason) for clip in self.survey.unreadable if clip.split == "validation"]
        size = self.train.draws.batch_size
        clips = sorted(self.survey.validation, key=lambda clip: (bucket_of(clip), clip.key))
        loaded: list[tuple[Clip, Held]] = []
        for clip in clips:
            try:
                loaded.append((clip, Held(self.store.clip(clip))))
            except DataError as error:
                failed.append(FailedItem(clip.key, str(error)))
        beside = told_beside(self.store, self.train.beside) if loaded else {}
        batches = []
        for group in grouped([clip for clip, _ in loaded]):
            for first in range(0, len(group), size):
                chosen = [loaded[i] for i in group[first : first + size]]
                shown = [tensors for _, tensors in chosen]
                texts = [self.store.shown(clip.caption) for clip, _ in chosen]
                # A piece for each: they are kept for the whole run.
                batches.append(collated(tuple(clip.key for clip, _ in chosen), shown, texts, beside, Slots()))
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


def drawn_caption(captions: Sequence[str], draws: Draws, draw: int, place: int) -> str:
    """One of an item's captions, or the empty one where the dice of (seed, draw, place) say so."""
    if draws.caption_dropout and chance(draws.seed, "caption", draw, place) < draws.caption_dropout:
        return EMPTY_CAPTION
    if len(captions) == 1:
        return captions[0]
    return captions[int(chance(draws.seed, "which caption", draw, place) * len(captions))]


def told(texts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The text (B, L, D), its mask (B, L), and what the encoders give beside them, of B texts (L_i, D)."""
    text, mask = padded([tensors["text"] for tensors in texts])
    further = [{name: tensor for name, tensor in tensors.items() if name != "text"} for tensors in texts]
    return {**stacked(further), "text": text, "text_mask": mask}


def told_beside(store: Store, beside: Mapping[str, str]) -> dict[str, Tensor]:
    """NAME/text (1, L, D), NAME/text_mask (1, L), ... of the texts that every batch tells beside its captions."""
    return {
        f"{name}/{part}": tensor for name, text in beside.items() for part, tensor in told([store.text(text)]).items()
    }


def stacked(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of one shape under each name, as fp32 (B, ...)."""
    return {name: torch.stack([tensors[name].float() for tensors in items]) for name in items[0]}


def padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts (L_i, D) as fp32 (B, L, D) with zeros behind the shorter ones, and the mask of what is text: (B, L), or
    (B, 1) where all are of one length, so that whoever is asked knows by its shape that nothing is masked."""
    longest = max(len(text) for text in texts)
    padded = torch.zeros(len(texts), longest, texts[0].shape[1])
    mask = torch.zeros(len(texts), mask_width([len(text) for text in texts]), dtype=torch.bool)
    for i, text in enumerate(texts):
        padded[i, : len(text)] = text.float()
        mask[i, : len(text)] = True
    return padded, mask
