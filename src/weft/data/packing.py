"""Texts into rows of one length: best fit, the longest first; in an order that the seed fixes anew for each epoch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from typing import TypeVar

from weft.data.sampler import chance

T = TypeVar("T")


def packed(lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Rows of places in lengths, each row of at most capacity: every text, the longest first, goes into the fullest
    row that still has room. Johnson et al. 1974, best fit decreasing: at most 11/9 of the fewest rows, and a few."""
    rows: list[list[int]] = []
    room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room that is left in them
    open_rooms = 0  # bit r is set where room[r] has rows, so that the smallest that fits is found at one stroke
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[place]
        assert 0 < length <= capacity, f"a text of {length} tokens for rows of {capacity}"
        fits = open_rooms >> length
        left = length + (fits & -fits).bit_length() - 1 if fits else capacity
        if fits:
            row = room[left].pop()
            if not room[left]:
                open_rooms ^= 1 << left
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(place)
        if left > length:
            room[left - length].append(row)
            open_rooms |= 1 << (left - length)
    return [tuple(row) for row in rows]


@dataclass(frozen=True)
class RowSampler:
    """Which texts stand in which rows of which batch. capacity: tokens of a row; None: a row is one text.

    Rows are alike in every epoch but for what is as long: texts of one length change places.
    """

    lengths: Sequence[int]  # of all texts of an epoch, a text as often as it is shown
    capacity: int | None
    batch_size: int
    seed: int
    shuffle: bool = True
    _kept: dict[int, list[tuple[tuple[int, ...], ...]]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def _longest_first(self) -> list[int]:
        return sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])

    @cached_property
    def _rows(self) -> list[tuple[int, ...]]:
        """Rows of places in _longest_first."""
        if self.capacity is None:
            return [(place,) for place in range(len(self.lengths))]
        return packed([self.lengths[i] for i in self._longest_first], self.capacity)

    @property
    def rows_per_epoch(self) -> int:
        return len(self._rows)

    @property
    def batches_per_epoch(self) -> int:
        return ceil(len(self._rows) / self.batch_size)

    def epoch(self, number: int) -> list[tuple[tuple[int, ...], ...]]:
        """All batches of an epoch, in order: each some rows of texts. The last that is cut may be smaller."""
        if not self.shuffle:  # as the files have it, as far as packing lets them
            rows = sorted(tuple(sorted(self._longest_first[place] for place in row)) for row in self._rows)
            return self._batches(rows)
        drawn = [chance(self.seed, number, "text", i) for i in range(len(self.lengths))]
        order = sorted(self._longest_first, key=lambda i: (-self.lengths[i], drawn[i]))
        rows = [tuple(order[place] for place in row) for row in self._rows]
        if self.capacity is not None:  # all are as long, so that any of them may share a batch
            return self._batches(self._shuffled(rows, number, "rows"))
        return self._shuffled(self._batches(rows), number, "batches")

    def batch(self, draw: int) -> tuple[tuple[int, ...], ...]:
        """The rows of the draw-th batch since training began, counted over all ranks."""
        number, place = divmod(draw, self.batches_per_epoch)
        if number not in self._kept:
            self._kept.clear()
            self._kept[number] = self.epoch(number)
        return self._kept[number][place]

    def _batches(self, rows: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
        return [tuple(rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]

    def _shuffled(self, items: Sequence[T], epoch: int, what: str) -> list[T]:
        return [items[i] for i in sorted(range(len(items)), key=lambda i: chance(self.seed, epoch, what, i))]
