"""What training on text would see: the texts that conversations give, those held out, what is lost, and the rows."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy

from weft.data.packing import RowSampler
from weft.data.survey import named
from weft.data.templates import Template
from weft.data.tokens import Corpus, Text, Unreadable
from weft.errors import DataError


@dataclass(frozen=True)
class Texts:
    """Some texts of some corpora. Arrays are (n,): place of the text in its corpus, tokens that are used of it, how
    many of these are learned, and how often an epoch shows it."""

    corpora: tuple[Corpus, ...]
    corpus: numpy.ndarray
    place: numpy.ndarray
    lengths: numpy.ndarray
    learned: numpy.ndarray
    repeats: numpy.ndarray

    def __len__(self) -> int:
        return len(self.place)

    def text(self, number: int) -> Text:
        """A text, cut to what is used of it."""
        whole = self.corpora[self.corpus[number]].text(int(self.place[number]))
        used = slice(0, int(self.lengths[number]))
        return Text(whole.key, whole.digest, whole.ids[used], whole.learned[used])

    def digest(self, number: int) -> str:
        return self.corpora[self.corpus[number]].digests[int(self.place[number])]

    def digests(self) -> list[str]:
        return [self.digest(i) for i in range(len(self))]

    def chosen(self, which: numpy.ndarray) -> "Texts":
        """Those for which (n,) bool is True."""
        arrays = (self.corpus, self.place, self.lengths, self.learned, self.repeats)
        return Texts(self.corpora, *(array[which] for array in arrays))

    @cached_property
    def shown(self) -> list[int]:
        """The number of every text as often as an epoch shows it."""
        return numpy.repeat(numpy.arange(len(self)), self.repeats).tolist()


def texts_of(corpora: Sequence[Corpus], repeats: Sequence[int], length: int) -> Texts:
    """All texts of corpora, of which at most so many tokens are used."""
    numbers = [numpy.full(len(corpus), number) for number, corpus in enumerate(corpora)]
    places = [numpy.arange(len(corpus)) for corpus in corpora]
    often = [numpy.full(len(corpus), times) for corpus, times in zip(corpora, repeats, strict=True)]
    lengths = [numpy.minimum(corpus.lengths, length) for corpus in corpora]
    return Texts(
        tuple(corpora), joined(numbers), joined(places), joined(lengths),
        joined([targets(corpus, length) for corpus in corpora]), joined(often),
    )  # fmt: skip


def joined(arrays: Sequence[numpy.ndarray]) -> numpy.ndarray:
    return numpy.concatenate([numpy.zeros(0, numpy.int64), *(array.astype(numpy.int64) for array in arrays)])


def targets(corpus: Corpus, length: int) -> numpy.ndarray:
    """Learned tokens of each text's first `length`; its first token is nobody's target."""
    if not len(corpus):
        return numpy.zeros(0, numpy.int64)
    starts = corpus.starts[:-1]
    found = numpy.add.reduceat(corpus.learned, starts, dtype=numpy.int64) - corpus.learned[starts]
    for number in numpy.flatnonzero(corpus.lengths > length):
        found[number] = corpus.learned[starts[number] + 1 : starts[number] + length].sum()
    return found


@dataclass(frozen=True)
class ChatSurvey:
    """The texts of the sources. capacity: tokens of a packed row, None where each text is a row.

    streamed: what is known is of the first rows of each source alone. cut: texts that are used in part. dropped: texts
    that are left out, by the reason. problems: what the config refuses, each a sentence.
    """

    template: Template
    train: Texts
    validation: Texts
    capacity: int | None
    streamed: bool = False
    unreadable: tuple[Unreadable, ...] = ()
    cut: int = 0
    dropped: tuple[tuple[str, int], ...] = ()
    notices: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    streams: str = ""  # what the streams are, for the digest

    def digest(self) -> str:
        """Hash over what every training item is: its conversation, its length, how often it is shown. Of streams over
        their names and first rows: what comes later is not known."""
        found = hashlib.sha256(self.streams.encode())
        for array in (self.train.lengths, self.train.learned, self.train.repeats):
            found.update(array.tobytes())
        found.update("".join(self.train.digests()).encode())
        return found.hexdigest()

    def sampler(self, batch_size: int, seed: int = 0, shuffle: bool = True) -> RowSampler:
        """How the training texts become batches."""
        lengths = self.train.lengths[self.train.shown].tolist() if len(self.train) else []
        return RowSampler(lengths, self.capacity, batch_size, seed, shuffle)

    @cached_property
    def rows(self) -> int:
        """Rows of an epoch; of streams, of what was looked into."""
        return self.sampler(1).rows_per_epoch

    def epoch_draws(self, batch_size: int) -> int | None:
        """Micro-batches until every text was drawn; None where that is not known."""
        return None if self.streamed else ceil(self.rows / batch_size)

    def steps_per_epoch(self, batch_size: int, accumulate: int = 1) -> int | None:
        """Optimizer steps until every text was drawn. accumulate: micro-batches per step, over all ranks."""
        draws = self.epoch_draws(batch_size)
        return None if draws is None else ceil(draws / accumulate)

    @cached_property
    def tokens(self) -> int:
        """Of an epoch, repeats counted."""
        return int((self.train.lengths * self.train.repeats).sum())

    @cached_property
    def learned(self) -> int:
        """Tokens of an epoch that are learned."""
        return int((self.train.learned * self.train.repeats).sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(self.train.lengths.max()) if len(self.train) else 0

    @property
    def efficiency(self) -> float:
        """Share of packed rows that is no padding."""
        return self.tokens / (self.rows * self.capacity) if self.capacity and self.rows else 1.0

    def conversations(self) -> int:
        """Different conversations that are trained on."""
        return len(set(self.train.digests()))

    def lines(self) -> list[str]:
        """The survey in words, for a plan."""
        left_out = (*self.dropped, ("unreadable", len(self.unreadable)), ("cut", self.cut))
        lost = "".join(f", {count:,} {why}" for why, count in left_out if count)
        first = "The first rows of each stream hold " if self.streamed else ""
        texts = f" in {len(self.train):,} texts" if len(self.train) != self.conversations() else ""
        share = self.learned / self.tokens if self.tokens else 0.0
        rows = f"{self.rows:,} rows, one for each text, the longest of {self.longest:,} tokens"
        if self.capacity is not None:
            rows = f"{self.rows:,} rows of {self.capacity:,} tokens, {self.efficiency:.1%} full; longest text " \
                   f"{self.longest:,} tokens"  # fmt: skip
        held = f"{len(self.validation):,} texts are only measured on" if len(self.validation) else "none is held out"
        return [
            f"{first}{self.conversations():,} conversations{texts}{lost}; {held}",
            f"{self.tokens:,} tokens an epoch, of which {share:.1%} are learned",
            rows,
            *(f"note: {notice}" for notice in self.notices),
        ]

    def without(self, failures: dict[str, str]) -> "ChatSurvey":
        """The same survey: what cannot be tokenised is known by now."""
        assert not failures, failures
        return self

    def refuse_when_unusable(self, budget: int) -> None:
        """Raise DataError when nothing is kept, the config refuses a text, or more than the budget are unreadable."""
        broken = len(self.unreadable)
        if broken > budget:
            of = self.conversations() + broken
            raise DataError(
                f"{broken} of about {of} rows give no conversation, more than data.unreadable ({budget}). Mend or "
                f"remove them, or raise the limit:\n{named([each.reason for each in self.unreadable])}"
            )
        if self.problems:
            raise DataError("\n".join(self.problems))
        if not len(self.train):
            lost = ", ".join(f"{count} are {why}" for why, count in self.dropped if count)
            why = f" Of the texts {lost}." if lost else " All are held out, or the sources are empty."
            raise DataError(f"No conversation of data.sources is left to train on.{why}")
