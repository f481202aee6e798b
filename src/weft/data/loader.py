"""Batches of latents and texts: drawn in an order that the seed fixes, padded, prepared one thread ahead."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from weft.contracts import Batch, Encoders
from weft.data.cache import Store
from weft.data.encoding import EMPTY_CAPTION
from weft.data.sampler import BucketSampler, chance, global_draw
from weft.data.survey import Clip, Survey, bucket_of
from weft.errors import DataError
from weft.events import Listener

BATCHES_AHEAD = 3
OFFER_SECONDS = 0.1
CLOSE_SECONDS = 5.0  # patience with a batch in the making; the thread is a daemon and ends after it


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How items are drawn. caption_dropout: the share that trains on the empty caption."""

    batch_size: int
    seed: int
    caption_dropout: float


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

    def batches(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        """Micro-batches of one rank from the start-th on; the next few are loaded in the background.

        Each holds latents (B, C, F, H, W), text (B, L, D) padded with zeros, and text_mask (B, L), True where text is.
        Raises DataError that names a clip which can no longer be loaded.
        """
        sampler = BucketSampler(grouped(self.clips), self.draws.batch_size, self.draws.seed)
        draws = (global_draw(micro_batch, rank, world) for micro_batch in count(start))
        return ahead((self.batch(sampler, draw) for draw in draws), BATCHES_AHEAD)

    def batch(self, sampler: BucketSampler, draw: int) -> Batch:
        """The draw-th batch of the run, counted over all ranks."""
        clips = [self.clips[i] for i in sampler.batch_indices(draw)]
        captions = [self._caption(clip, draw, i) for i, clip in enumerate(clips)]
        return collated(clips, [self.store.latents(c) for c in clips], [self.store.text(c) for c in captions])

    def _caption(self, clip: Clip, draw: int, place: int) -> str:
        """The clip's caption, or the empty one where the dice of (seed, draw, place) say so."""
        dropped = chance(self.draws.seed, "caption", draw, place) < self.draws.caption_dropout
        return EMPTY_CAPTION if dropped else clip.caption


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
        loaded: list[tuple[Clip, Tensor]] = []
        for clip in clips:
            try:
                loaded.append((clip, self.store.latents(clip)))
            except DataError as error:
                failed.append(FailedItem(clip.key, str(error)))
        batches = []
        for group in grouped([clip for clip, _ in loaded]):
            for first in range(0, len(group), size):
                chosen = [loaded[i] for i in group[first : first + size]]
                texts = [self.store.text(clip.caption) for clip, _ in chosen]
                batches.append(collated([clip for clip, _ in chosen], [latents for _, latents in chosen], texts))
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


def collated(clips: Sequence[Clip], latents: Sequence[Tensor], texts: Sequence[Tensor]) -> Batch:
    """One batch of clips of one bucket with the latents (C, F, H, W) and the text (L_i, D) of each."""
    text, mask = padded(texts)
    tensors = {"latents": torch.stack(list(latents)), "text": text, "text_mask": mask}
    return Batch(tensors, tuple(clip.key for clip in clips))


def padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts (L_i, D) as fp32 (B, L, D) with zeros behind the shorter ones, and the mask (B, L) of what is text."""
    longest = max(len(text) for text in texts)
    padded = torch.zeros(len(texts), longest, texts[0].shape[1])
    mask = torch.zeros(len(texts), longest, dtype=torch.bool)
    for i, text in enumerate(texts):
        padded[i, : len(text)] = text.float()
        mask[i, : len(text)] = True
    return padded, mask


def ahead(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """The same batches, up to `depth` of them made in advance by one thread, whose errors are raised here."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
    closed = threading.Event()

    def offer(item: Batch | BaseException | None) -> bool:
        while not closed.is_set():  # never waits for ever on a consumer that has gone
            try:
                ready.put(item, timeout=OFFER_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not offer(batch):
                    return
            offer(None)
        except BaseException as error:
            offer(error)

    thread = threading.Thread(target=work, name="weft-loader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join(CLOSE_SECONDS)
