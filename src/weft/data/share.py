"""One of several equal shares of the data: what an independent process trains on."""

import hashlib
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, NonNegativeInt, PositiveInt


def _is_a_share(share: tuple[int, int]) -> tuple[int, int]:
    if share[0] >= share[1]:
        raise ValueError(f"[i, n] counts from 0, so that i is below n; got {list(share)}")
    return share


Share = Annotated[tuple[NonNegativeInt, PositiveInt], AfterValidator(_is_a_share)]  # the i-th of n, counted from 0


def of_others(keys: Iterable[str], share: tuple[int, int] | None) -> set[str]:
    """The keys that fall to other shares.

    Counted in a shuffled order: in their own, the first windows of all clips could fall to one process.
    """
    if share is None:
        return set()
    own, of = share
    return {key for place, key in enumerate(shuffled(keys)) if place % of != own}


def shuffled(keys: Iterable[str]) -> list[str]:
    """Keys in the order of their hashes: without a pattern, and always the same."""
    return sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())
