"""What a replay memory holds after so many documents: a pure function of a seed, found from their numbers alone."""

from bisect import insort
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Protocol

import numpy

WHOLE = 2.0**53  # fractions are multiples of its inverse


def raw(count: int, *parts: int) -> numpy.ndarray:
    """(count,) uint64 that depend on the parts alone. PCG64's own bits are the same in every version of numpy."""
    return numpy.random.PCG64(numpy.random.SeedSequence(parts)).random_raw(count)


def fractions(count: int, *parts: int) -> numpy.ndarray:
    """(count,) fp64 in [0, 1) that depend on the parts alone."""
    return (raw(count, *parts) >> numpy.uint64(11)) / WHOLE


def permutation(count: int, *parts: int) -> numpy.ndarray:
    """A shuffle of 0 .. count - 1 that depends on the parts alone."""
    return numpy.argsort(raw(count, *parts), kind="stable")


def sample(held: numpy.ndarray, count: int, *parts: int, replacement: bool = False) -> numpy.ndarray:
    """At most `count` of what is held, each as likely as any other; drawn without replacement unless told otherwise."""
    if replacement and len(held):
        return held[(fractions(count, *parts) * len(held)).astype(numpy.int64)]
    keys = raw(len(held), *parts)
    if count < len(held):
        smallest = numpy.argpartition(keys, count)[:count]
        return held[smallest[numpy.argsort(keys[smallest])]]
    return held[numpy.argsort(keys, kind="stable")]


class Memory(Protocol):
    """A memory of documents, which have the numbers 0, 1, ... in the order in which they enter."""

    def held(self, entered: int) -> numpy.ndarray:
        """Numbers of those that it holds once so many have entered. Going on costs what has entered since; going back,
        all of it."""
        ...


class Reservoir:
    """A uniform sample of all that has entered. Vitter 1985, algorithm R: the document of age a takes a place that is
    drawn from a, where there is such a place; so each is held with probability size / a.

    off_by_one: the place is drawn from a + 1, as in the code published with La-MAML (arXiv:2007.13904).
    """

    def __init__(self, size: int, most: int, *parts: int, off_by_one: bool = False) -> None:
        """most: documents that can ever enter. parts: what its chance depends on."""
        ages = numpy.arange(1, most + 1)
        drawn = (fractions(most, *parts) * (ages + off_by_one)).astype(numpy.int64)
        self._places = numpy.where(ages <= size, ages - 1, numpy.where(drawn < size, drawn, -1))
        self._held = numpy.zeros(size, numpy.int64)
        self._entered = 0

    def held(self, entered: int) -> numpy.ndarray:
        if entered < self._entered:
            self._entered = 0
        places = self._places[self._entered : entered]
        coming = numpy.flatnonzero(places >= 0)[::-1]  # the last one first: of those that take one place it stays
        taken, last = numpy.unique(places[coming], return_index=True)
        self._held[taken] = coming[last] + self._entered
        self._entered = entered
        return self._held[: min(entered, len(self._held))].copy()


class BalancedReservoir:
    """A memory whose room is shared evenly by strata (labels, tasks), and within each a uniform sample of it.

    Each document has a random key, and a stratum holds those with its smallest keys: a uniform sample of any number.
    When the memory is full, the largest stratum gives up its largest key; of strata that are as large, the one that
    came last. So the room of a full stratum never grows again, and what it gave up is never missed.
    """

    def __init__(self, size: int, strata: Sequence[int], *parts: int) -> None:
        """strata: of each document that can enter; numbers that count from 0 in the order of their coming."""
        self._size, self._strata = size, list(strata)
        self._keys: list[int] = raw(len(self._strata), *parts).tolist()
        self._restart()

    def _restart(self) -> None:
        self._heaps: list[list[tuple[int, int]]] = [[] for _ in range(max(self._strata, default=-1) + 1)]
        self._entered = self._total = self._level = 0
        self._largest: list[int] = []  # strata that hold _level documents, sorted; once the memory is full

    def held(self, entered: int) -> numpy.ndarray:
        if entered < self._entered:
            self._restart()
        for number in range(self._entered, entered):
            self._enter(number, self._strata[number])
        self._entered = entered
        return numpy.array(sorted(number for heap in self._heaps for _, number in heap), numpy.int64)

    def _enter(self, number: int, stratum: int) -> None:
        own = self._heaps[stratum]
        heappush(own, (-self._keys[number], number))
        if self._total < self._size:
            self._total += 1
            return
        if not self._largest:
            self._find_largest()
        if len(own) > self._level:
            heappop(own)
            return
        if len(own) == self._level and stratum not in self._largest:
            insort(self._largest, stratum)
        heappop(self._heaps[self._largest.pop()])

    def _find_largest(self) -> None:
        self._level = max(map(len, self._heaps))
        self._largest = [stratum for stratum, heap in enumerate(self._heaps) if len(heap) == self._level]
