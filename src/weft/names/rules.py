"""How the tensors of a network are cut from those of a file that names and fuses them otherwise."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Piece:
    """A tensor of the network: rows of a tensor in the file, ranges of them after one another, or all."""

    source: str
    rows: tuple[tuple[int, int], ...] = ()
    shape: tuple[int, ...] | None = None  # where the file's has other axes for the same numbers


Names = dict[str, Piece]  # name in the network -> where it comes from


@dataclass(frozen=True)
class Rule:
    """A pattern of whole names in the file, and the names in the network; of several, equal shares of the rows."""

    pattern: str
    targets: tuple[str, ...]

    def __init__(self, pattern: str, *targets: str) -> None:
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "targets", targets)

    @cached_property
    def regex(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    def pieces(self, name: str, shape: tuple[int, ...]) -> Names | None:
        """What a name in the file gives; None when the rule is not about it."""
        match = self.regex.fullmatch(name)
        if match is None:
            return None
        names = [match.expand(target) for target in self.targets]
        if len(names) == 1:
            return {names[0]: Piece(name)}
        share = shape[0] // len(names)
        return {each: Piece(name, ((i * share, (i + 1) * share),)) for i, each in enumerate(names)}


def translated(shapes: Shapes, rules: Iterable[Rule]) -> Names:
    """The pieces of every name, by the first rule that fits it; a name that none fits keeps itself."""
    rules = list(rules)
    found: Names = {}
    for name, shape in shapes.items():
        pieces = next((p for rule in rules if (p := rule.pieces(name, shape)) is not None), None)
        found |= pieces if pieces is not None else {name: Piece(name)}
    return found


def unchanged(shapes: Shapes) -> Names:
    """For files that already use the network's names."""
    return {name: Piece(name) for name in shapes}
