"""Which items stand in which batch: a pure function of the seed and the number of the draw. No torch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil


def chance(*parts: int | str) -> float:
    """A number in [0, 1) that depends on the parts alone, equal on every machine and in every version."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


@dataclass
class BucketSampler:
    """Batches whose items share a bucket, in an order that is drawn anew for each epoch.

    buckets: the item numbers in each bucket, a number as often as it is to be shown in an epoch. A bucket's last batch
    may be smaller than batch_size: dropping it would hide rare shapes from training.
    """

    buckets: Sequence[Sequence[int]]
    batch_size: int
    seed: int
    _kept: tuple[int, list[tuple[int, ...]]] | None = field(default=None, init=False, repr=False, compare=False)

    @cached_property
    def batches_per_epoch(self) -> int:
        return sum(ceil(len(bucket) / self.batch_size) for bucket in self.buckets)

    def epoch(self, number: int) -> list[tuple[int, ...]]:
        """All batches of an epoch, in order."""
        batches: list[tuple[int, ...]] = []
        for b, bucket in enumerate(self.buckets):
            items = [bucket[i] for i in self._order(len(bucket), number, f"bucket {b}")]
            batches += [tuple(items[i : i + self.batch_size]) for i in range(0, len(items), self.batch_size)]
        return [batches[i] for i in self._order(len(batches), number, "batches")]

    def batch_indices(self, draw: int) -> tuple[int, ...]:
        """The item numbers of the draw-th batch since training began, counted over all ranks."""
        number, place = divmod(draw, self.batches_per_epoch)
        if self._kept is None or self._kept[0] != number:
            self._kept = (number, self.epoch(number))
        return self._kept[1][place]

    def _order(self, count: int, epoch: int, what: str) -> list[int]:
        """A shuffle of 0 .. count-1."""
        return sorted(range(count), key=lambda i: chance(self.seed, epoch, what, i))
