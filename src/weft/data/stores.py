"""Which store a config's `cache` asks for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from weft.data.cache import EXACT, Keeping, LiveStore, MemoryStore, Store
from weft.data.disk import LatentStore
from weft.data.filling import ALONE, Hands
from weft.data.survey import Wanted


def open_store(
    mode: Literal["disk", "memory", "off"],
    folder: Path,
    wanted: Wanted,
    identity: Mapping[str, str],
    hands: Hands = ALONE,
    keeping: Keeping = EXACT,
) -> Store:
    """The store of a survey. folder: of the disk's. identity: fingerprints of the weights, a family's own."""
    if mode == "disk":
        return LatentStore(folder, wanted, identity, hands, keeping)
    return MemoryStore(wanted, hands, keeping) if mode == "memory" else LiveStore(wanted, hands)
