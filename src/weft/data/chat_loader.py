"""Batches of tokens: rows of one text or of several that do not see each other, prepared one thread ahead."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy
import torch

from weft.contracts import UNLEARNED, Batch, Experience
from weft.data.ahead import ahead
from weft.data.chat_survey import ChatSurvey, Texts
from weft.data.chat_surveying import making_of
from weft.data.loader import BATCHES_AHEAD, FailedItem
from weft.data.packing import RowSampler
from weft.data.streaming import Filling, Stream, StreamExperience
from weft.data.tokens import Text
from weft.events import Listener

if TYPE_CHECKING:
    from weft.data.chat import ChatData


@dataclass(frozen=True)
class ChatExperience:
    """An endless stream of training batches. Every rank reads its own share of one common order."""

    name: str
    last_step: int
    texts: Texts
    sampler: RowSampler
    padding: int

    @property
    def epoch_draws(self) -> int:
        """Micro-batches of all ranks in one epoch."""
        return self.sampler.batches_per_epoch

    def position(self, drawn: int) -> dict[str, Any]:
        """Nothing: the seed and a draw's number say what it holds."""
        return {}

    def resume_at(self, position: Mapping[str, Any]) -> None:
        assert not position, f"texts are found by the number of a draw, but the checkpoint has {sorted(position)}"

    def batches(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        """Micro-batches of one rank, the draws start + rank, start + rank + world, ... of the run; see `collated`."""
        return ahead(map(self._batch, count(start + rank, world)), BATCHES_AHEAD)

    def _batch(self, draw: int) -> Batch:
        shown = self.texts.shown
        rows = [[self.texts.text(shown[i]) for i in row] for row in self.sampler.batch(draw)]
        return collated(rows, self.sampler.capacity, self.padding)


@dataclass(frozen=True)
class ChatDataset:
    """What a run reads: the experience to train on, and the texts to measure on."""

    survey: ChatSurvey
    train: Experience
    batch_size: int

    @property
    def stream(self) -> list[Experience]:
        """The one stretch that a run goes through."""
        return [self.train]

    def validation(self) -> tuple[list[Batch], list[FailedItem]]:
        """Batches of the held-out texts in a fixed order, one text in each row, so that a batch's keys are its rows';
        and the items that cannot be measured, of which there are none: all are tokenised by now."""
        texts = self.survey.validation
        order = sorted(range(len(texts)), key=lambda i: (texts.lengths[i], texts.text(i).key))
        groups = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return [collated([[texts.text(i)] for i in group], None, self.survey.template.padding) for group in groups], []


def opened(
    data: "ChatData", survey: ChatSurvey, tell: Listener, *, seed: int, last_step: int, name: str
) -> ChatDataset:
    """What training draws from."""
    padding, train = survey.template.padding, None
    if data.streams:
        streams = [
            Stream(source.label, source.tapes, making_of(data, source, survey.template), source.repeats, source.take)
            for source in data.sources
        ]
        filling = Filling(
            capacity=survey.capacity, length=data.length, batch_size=data.batch_size, truncate=data.truncate,
            buffer=data.shuffle_buffer, shuffle=data.shuffle, seed=seed, unreadable=data.unreadable,
        )  # fmt: skip
        train = StreamExperience(
            name, last_step, tuple(streams), filling, lambda rows: collated(rows, survey.capacity, padding), tell
        )
    else:
        sampler = survey.sampler(data.batch_size, seed, data.shuffle)
        train = ChatExperience(name, last_step, survey.train, sampler, padding)
    return ChatDataset(survey, train, data.batch_size)


def collated(rows: Sequence[Sequence[Text]], capacity: int | None, padding: int) -> Batch:
    """ids, positions and labels (B, L) int64 of rows of texts, and learned (n,) int64, the places of all B L that have
    a label. L: the capacity, or the longest row.

    A text's positions begin at 0, and so do those of the padding behind the last. Labels are the tokens that come
    next, UNLEARNED where they are not learned or belong to another text.
    """
    length = capacity or max(sum(len(text.ids) for text in row) for row in rows)
    ids = numpy.full((len(rows), length), padding, numpy.int64)
    labels = numpy.full((len(rows), length), UNLEARNED, numpy.int64)
    positions = numpy.zeros((len(rows), length), numpy.int64)
    for number, row in enumerate(rows):
        at = 0
        for text in row:
            end = at + len(text.ids)
            ids[number, at:end], positions[number, at:end] = text.ids, numpy.arange(end - at)
            labels[number, at : end - 1] = numpy.where(text.learned[1:], text.ids[1:], UNLEARNED)
            at = end
        positions[number, at:] = numpy.arange(length - at)
    learned = numpy.flatnonzero(labels != UNLEARNED).astype(numpy.int64)
    tensors = {"ids": ids, "positions": positions, "labels": labels, "learned": learned}
    keys = tuple(text.key for row in rows for text in row)
    return Batch({name: torch.from_numpy(array) for name, array in tensors.items()}, keys, _lengths(rows, length))


def _lengths(rows: Sequence[Sequence[Text]], length: int) -> tuple[tuple[int, ...], ...]:
    """Tokens of the texts of each row, and of the padding behind them."""
    texts = [[len(text.ids) for text in row if len(text.ids)] for row in rows]
    return tuple((*own, length - sum(own)) if sum(own) < length else tuple(own) for own in texts)
