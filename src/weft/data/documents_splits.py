"""Which documents are trained, validated and tested on: whole groups, by a hash, so that none is in two splits."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from weft.data.documents_survey import SPLITS, TEST, TRAIN, VALIDATION

WORDS = {
    "train": TRAIN, "training": TRAIN, "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION,
    "dev": VALIDATION, "eval": VALIDATION, "test": TEST, "testing": TEST,
}  # fmt: skip


@dataclass(frozen=True)
class Shares:
    """How many groups are held out. seed: draws other ones."""

    validation: float
    test: float
    seed: int

    def of(self, unit: bytes) -> int:
        """The split of a group. A hash decides, so that no other group has a part in it."""
        digest = hashlib.sha256(b"%d/" % self.seed + unit).digest()
        drawn = int.from_bytes(digest[:8], "big") / 2**64
        return TEST if drawn < self.test else VALIDATION if drawn < self.test + self.validation else TRAIN


def hashed(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def apart(splits: numpy.ndarray, texts: Sequence[bytes], order: numpy.ndarray) -> numpy.ndarray:
    """Which documents (n,) stand, by their text, in another split already. order: in which the documents come, so that
    a later task leaves out its own and none of an earlier one."""
    first: dict[bytes, int] = {}
    found = numpy.zeros(len(texts), bool)
    for number in order.tolist():
        split = int(splits[number])
        found[number] = first.setdefault(texts[number], split) != split
    return found


def leaking(splits: numpy.ndarray, groups: numpy.ndarray) -> numpy.ndarray:
    """Numbers of the groups that are in several splits."""
    pairs = numpy.unique(groups * len(SPLITS) + splits)
    each, count = numpy.unique(pairs // len(SPLITS), return_counts=True)
    return each[count > 1]
