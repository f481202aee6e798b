"""How strongly adapters count in each block of a network, as --blocks says it: 0-9=0.5,20-=0."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from weft.errors import ConfigError
from weft.formats.adapter_file import SavedAdapter
from weft.formats.canonical import STRENGTH

# Canonical paths of layers in blocks, and the word before the number where a network has two lists of blocks.
BLOCKS = (
    (re.compile(r"single_transformer_blocks\.(\d+)\."), "single"),
    (re.compile(r"transformer_blocks\.(\d+)\."), "double"),
    (re.compile(r"blocks\.(\d+)\."), ""),
    (re.compile(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d+)\."), ""),
)
ENTRY = re.compile(r"(?:(single|double):)?(?:(\d+)(-)?(\d+)?|-(\d+))=(\d+(?:\.\d*)?|\.\d+)")
EXPECTED = (
    "expected block numbers and strengths such as 0-9=0.5,20-=0 (a block, from-to, from on), and for HunyuanVideo "
    "double:0-9=0.5,single:20-=0"
)


@dataclass(frozen=True)
class BlockRange:
    """Blocks from first to last, which count. last: None goes to the end. blocks: single, double, or '' of a network
    with one list."""

    first: int
    last: int | None
    strength: float
    blocks: str = ""

    def holds(self, block: tuple[str, int]) -> bool:
        return block[0] == self.blocks and self.first <= block[1] and (self.last is None or block[1] <= self.last)

    def __str__(self) -> str:
        which = f"{self.blocks}:" if self.blocks else ""
        last = "" if self.last is None else str(self.last)
        return f"{which}{self.first if last == str(self.first) else f'{self.first}-{last}'}={self.strength:g}"


@dataclass(frozen=True)
class BlockStrengths:
    """Strengths by block; 1 in the blocks that no range names, and outside of blocks."""

    ranges: tuple[BlockRange, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "BlockStrengths":
        """Raises ConfigError for what cannot be read, and for a block that two ranges name."""
        ranges = tuple(_range(entry.strip()) for entry in text.split(","))
        for i, one in enumerate(ranges):
            for other in ranges[:i]:
                if one.holds((other.blocks, other.first)) or other.holds((one.blocks, one.first)):
                    raise ConfigError(f"--blocks: {other} and {one} name the same block. Give each one strength.")
        return cls(ranges)

    def of(self, path: str) -> float:
        """The strength in the block that a layer is in."""
        block = block_of(path)
        return next((one.strength for one in self.ranges if block is not None and one.holds(block)), 1.0)

    def check(self, paths: Iterable[str]) -> None:
        """Raises ConfigError for a range in which no adapted layer is."""
        found = {block for path in paths if (block := block_of(path)) is not None}
        for one in self.ranges:
            if not any(one.holds(block) for block in found):
                there = ", ".join(_told(kind, found) for kind in sorted({kind for kind, _ in found})) or "none"
                raise ConfigError(f"--blocks: {one} names no block that is adapted; those are {there}.")

    def __str__(self) -> str:
        return ",".join(map(str, self.ranges))


def block_of(path: str) -> tuple[str, int] | None:
    """Kind and number of the block that a layer is in; None outside of blocks."""
    for pattern, kind in BLOCKS:
        if match := pattern.match(path):
            return kind, int(match[1])
    return None


def at_blocks(adapter: SavedAdapter, strengths: BlockStrengths) -> SavedAdapter:
    """A LoRA whose change is multiplied by block; layers that come to nothing are left out. Raises ConfigError where
    nothing is left."""
    if not strengths.ranges:
        return adapter
    kept = tuple(path for path in adapter.paths if strengths.of(path))
    if not kept:
        raise ConfigError(f"--blocks: {strengths} leaves nothing of the adapter.")
    gone = tuple(f"{path}." for path in set(adapter.paths) - set(kept))
    tensors = {key: tensor for key, tensor in adapter.tensors.items() if not key.startswith(gone)}
    for path in kept:
        key = next(path + end for end in STRENGTH if path + end in tensors)
        tensors[key] = tensors[key] * strengths.of(path)
    return replace(adapter, tensors=tensors, targets=kept)


def _range(entry: str) -> BlockRange:
    match = ENTRY.fullmatch(entry)
    if match is None:
        raise ConfigError(f"--blocks: '{entry}' cannot be read; {EXPECTED}.")
    kind, first, dash, last, until, strength = match.groups()
    start = int(first or 0)
    end = int(until) if until else int(last) if last else None if dash else start
    if (last and not dash) or (end is not None and end < start):
        raise ConfigError(f"--blocks: '{entry}' ends before it begins; {EXPECTED}.")
    return BlockRange(start, end, float(strength), kind or "")


def _told(kind: str, found: Iterable[tuple[str, int]]) -> str:
    numbers = [number for own, number in found if own == kind]
    return f"{kind + ':' if kind else ''}{min(numbers)}-{max(numbers)}"
