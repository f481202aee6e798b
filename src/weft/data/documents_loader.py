"""Batches of documents, and of those that are replayed beside them: draws are found by their number alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from weft.contracts import Batch
from weft.data.ahead import ahead
from weft.data.documents_survey import TEST, VALIDATION, DocumentsSurvey
from weft.data.loader import BATCHES_AHEAD
from weft.data.reservoir import BalancedReservoir, Memory, Reservoir, permutation, sample

if TYPE_CHECKING:
    from weft.data.documents import DocumentsData, ReplayMemory

NONE = numpy.zeros(0, numpy.int64)
ORDER, KEPT, REPLAYED = range(3)  # what a seed's chance is for


@dataclass(frozen=True, repr=False)
class Order:
    """In which order an experience shows its documents. number: of the experience in the stream."""

    documents: numpy.ndarray  # (n,) of the survey
    number: int
    batch_size: int
    glances: int
    seed: int
    shuffle: bool

    @property
    def draws(self) -> int:
        """Micro-batches of one epoch."""
        return ceil(len(self.documents) / self.batch_size) * self.glances

    def epoch(self, number: int) -> numpy.ndarray:
        """All documents, as they are shown."""
        if not self.shuffle:
            return self.documents
        return self.documents[permutation(len(self.documents), self.seed, ORDER, self.number, number)]

    def of(self, draw: int, epoch: numpy.ndarray) -> numpy.ndarray:
        """The documents of a draw, which lies in this epoch."""
        first = draw % self.draws // self.glances * self.batch_size
        return epoch[first : first + self.batch_size]

    def entered(self, draws: int) -> int:
        """Documents that so many draws have shown for the first time."""
        return min(len(self.documents), ceil(draws / self.glances) * self.batch_size)


@dataclass(frozen=True, repr=False)
class Replay:
    """What is replayed beside the draws of one experience. entering: (n,) documents in the order in which they enter,
    those of earlier experiences first. strata: (n,) of each, where the memory is balanced."""

    recipe: "ReplayMemory"
    entering: numpy.ndarray
    before: int  # documents of earlier experiences
    strata: numpy.ndarray
    seed: int
    number: int

    def memory(self) -> Memory:
        """The memory, before anything has entered."""
        size, key = self.recipe.size, (self.seed, KEPT)
        if self.recipe.balance == "none":
            return Reservoir(size, len(self.entering), *key, off_by_one=self.recipe.off_by_one)
        return BalancedReservoir(size, self.strata.tolist(), *key)

    def drawn(self, memory: Memory, draw: int, entered: int) -> numpy.ndarray:
        """Documents to replay beside a draw, before which so many of its own experience have entered."""
        known = self.before + (entered if self.recipe.scope == "all" else 0)
        held = memory.held(known)
        key = (self.seed, REPLAYED, self.number, draw)
        return self.entering[sample(held, self.recipe.batch, *key, replacement=self.recipe.with_replacement)]


@dataclass(frozen=True, repr=False)
class DocumentsExperience:
    """An endless stream of training batches. Every rank reads its own share of one common order."""

    name: str
    last_step: int
    survey: DocumentsSurvey
    order: Order
    replay: Replay | None

    @property
    def epoch_draws(self) -> int:
        """Micro-batches of all ranks in one epoch."""
        return self.order.draws

    def position(self, drawn: int) -> dict[str, Any]:
        """Nothing: the seed and a draw's number say what it holds, and what its memory holds."""
        return {}

    def resume_at(self, position: Mapping[str, Any]) -> None:
        assert not position, f"documents are found by the number of a draw, but the checkpoint has {sorted(position)}"

    def batches(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        """Micro-batches of one rank, the draws start + rank, start + rank + world, ...: ids (B, L) int64, mask (B, L)
        bool, labels (B,) int64 or (B, C) fp32, fresh (B,) bool, the first time that a document is shown; and where
        there is something to replay replay/ids, replay/mask and replay/labels of R rows, as long as the others. A
        replayed row is drawn before this batch enters the memory."""
        return ahead(self._made(start + rank, world), BATCHES_AHEAD)

    def _made(self, first: int, world: int) -> Iterator[Batch]:
        memory = self.replay.memory() if self.replay is not None else None
        epoch, shown = -1, self.order.documents
        for draw in count(first, world):
            if draw // self.order.draws != epoch:
                epoch = draw // self.order.draws
                shown = self.order.epoch(epoch)
            own, replayed = self.order.of(draw, shown), NONE
            if self.replay is not None and memory is not None:
                replayed = self.replay.drawn(memory, draw, self.order.entered(draw))
            fresh = torch.full((len(own),), draw < self.order.draws and draw % self.order.glances == 0)
            tensors = padded(self.survey, numpy.concatenate([own, replayed]))
            main = {name: tensor[: len(own)] for name, tensor in tensors.items()} | {"fresh": fresh}
            if len(replayed):
                main |= {f"replay/{name}": tensor[len(own) :] for name, tensor in tensors.items()}
            yield Batch(main, keys_of(self.survey, own))


def padded(survey: DocumentsSurvey, numbers: numpy.ndarray) -> dict[str, Tensor]:
    """ids and mask (B, L) and labels of documents, filled up to the longest of them."""
    own = survey.documents
    lengths = own.lengths[numbers]
    width = int(lengths.max())
    ids = numpy.full((len(numbers), width), survey.padding.token, numpy.int64)
    mask = numpy.zeros((len(numbers), width), bool)
    for row, (number, length) in enumerate(zip(numbers.tolist(), lengths.tolist(), strict=True)):
        part = slice(width - length, width) if survey.padding.left else slice(0, length)
        ids[row, part], mask[row, part] = own.document(number), True
    tensors = {"ids": ids, "mask": mask, "labels": own.labels[numbers]}
    return {name: torch.from_numpy(array) for name, array in tensors.items()}


def keys_of(survey: DocumentsSurvey, numbers: numpy.ndarray) -> tuple[str, ...]:
    """TASK:ROW of each document."""
    own = survey.documents
    return tuple(f"{survey.names[own.task[i]]}:{own.row[i]}" for i in numbers.tolist())


@dataclass(frozen=True, repr=False)
class DocumentsDataset:
    """What a run reads: experiences to train on, and of each task the batches that it is tested and validated on."""

    survey: DocumentsSurvey
    stream: "list[DocumentsExperience]"
    tests: Mapping[str, list[Batch]]
    validations: Mapping[str, list[Batch]]

    def validation(self) -> tuple[list[Batch], list[Any]]:
        """The validation batches of all tasks, and the documents that cannot be measured, of which there are none."""
        return [batch for batches in self.validations.values() for batch in batches], []


def opened(
    data: "DocumentsData", survey: DocumentsSurvey, *, seed: int, last_steps: Mapping[str, int], per_step: int | None
) -> DocumentsDataset:
    """What training draws from. per_step: micro-batches of all ranks in a step."""
    orders = {
        name: Order(rows, number, data.batch_size, data.glances, seed, data.shuffle)
        for number, (name, rows) in enumerate(survey.experiences.items())
    }
    stream, shown, step = list[DocumentsExperience](), list[numpy.ndarray](), 0
    for name, order in orders.items():
        replay = None
        if data.replay is not None:
            replay = replay_of(data.replay, survey, [*shown, order.epoch(0)], order)
        stream.append(DocumentsExperience(name, last_steps[name], survey, order, replay))
        steps, step = last_steps[name] - step, last_steps[name]
        entered = len(order.documents) if per_step is None else order.entered(steps * per_step)
        shown.append(order.epoch(0)[:entered])
    return DocumentsDataset(survey, stream, *(held_out(survey, split, data.batch_size) for split in (TEST, VALIDATION)))


def replay_of(
    recipe: "ReplayMemory", survey: DocumentsSurvey, entering: Sequence[numpy.ndarray], order: Order
) -> Replay:
    """The memory of an experience. entering: documents of each experience up to it, as they were first shown."""
    every = numpy.concatenate(entering)
    own, strata = survey.documents, numpy.zeros(len(every), numpy.int64)
    if recipe.balance in ("task", "label_task"):
        strata += own.task[every] * len(survey.labels)
    if recipe.balance in ("label", "label_task"):
        strata += own.labels[every]
    return Replay(recipe, every, len(every) - len(entering[-1]), by_first_seen(strata), order.seed, order.number)


def by_first_seen(strata: numpy.ndarray) -> numpy.ndarray:
    """The same strata, numbered in the order of their coming."""
    _, first, place = numpy.unique(strata, return_index=True, return_inverse=True)
    rank = numpy.empty(len(first), numpy.int64)
    rank[numpy.argsort(first)] = numpy.arange(len(first))
    return rank[place]


def held_out(survey: DocumentsSurvey, split: int, batch_size: int) -> dict[str, list[Batch]]:
    """Task -> the batches of a split in a fixed order, documents beside others of about their length."""
    found: dict[str, list[Batch]] = {}
    for number, task in enumerate(survey.names):
        own = survey.documents.within(split, number)
        order = own[numpy.lexsort((own, survey.documents.lengths[own]))]
        groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        if groups:
            found[task] = [Batch(measured(survey, group), keys_of(survey, group)) for group in groups]
    return found


def measured(survey: DocumentsSurvey, numbers: numpy.ndarray) -> dict[str, Tensor]:
    """Documents that are measured on, with the number of each one's group where groups are known: intervals count whole
    groups."""
    own = {"group": torch.from_numpy(survey.documents.group[numbers])} if survey.grouped else {}
    return padded(survey, numbers) | own
