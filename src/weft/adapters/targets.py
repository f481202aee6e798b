"""From what a user writes under `adapter.targets` to module paths: sets, layer names, regexes, foreign names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weft.errors import ConfigError, nearest

Shapes = Mapping[str, tuple[int, int]]  # path of a linear layer -> (out, in), in the network's own order

# Every layer below a numbered block, for families that name no such set themselves.
ALL_LINEAR = r"(?:\w+\.)*?\w*(?:blocks|layers|layer)\.\d+\..+"


@dataclass(frozen=True)
class Matched:
    """One pattern as it was written, how it was read, and the paths that it matched in network order."""

    pattern: str
    read_as: str  # "set", "name", "alias" or "regex"
    paths: tuple[str, ...]


@dataclass(frozen=True)
class TargetReport:
    """What every pattern matched, and the layers that are adapted in the end."""

    matched: tuple[Matched, ...]
    excluded: tuple[Matched, ...]
    paths: tuple[str, ...]  # in network order, each once
    shapes: Shapes  # of these paths

    def parameters(self, rank: int, dora: bool = False) -> int:
        """Trainable parameters of one adapter: rank (in + out) for each layer, and out more with DoRA."""
        return sum(rank * (fan_in + out) + (out if dora else 0) for out, fan_in in self.shapes.values())

    def rows(self) -> list[tuple[str, str, int, str]]:
        """For a table: the pattern, how it was read, how many layers, the first of them."""
        rows = [(m.pattern, m.read_as, len(m.paths), m.paths[0]) for m in self.matched]
        return rows + [(f"not {m.pattern}", m.read_as, len(m.paths), m.paths[0]) for m in self.excluded]


def match_targets(
    patterns: Sequence[str],
    exclude: Sequence[str],
    linears: Shapes,
    presets: Mapping[str, str],
    aliases: Mapping[str, str],
) -> TargetReport:
    """Find the layers that patterns name, less those that exclude names.

    presets: set name -> regex. aliases: another program's layer suffix -> ours.
    Raises: ConfigError with all patterns that match nothing, each with the nearest names.
    """
    language = _Language(tuple(linears), presets, aliases)
    problems: list[str] = []
    matched = language.all(patterns, "adapter.targets", problems)
    excluded = language.all(exclude, "adapter.exclude", problems)
    if problems:
        raise ConfigError(*problems)
    dropped = {path for m in excluded for path in m.paths}
    chosen = {path for m in matched for path in m.paths} - dropped
    if not chosen:
        raise ConfigError("adapter.exclude: it takes away every layer that adapter.targets names; nothing is trained.")
    shapes = {path: shape for path, shape in linears.items() if path in chosen}
    return TargetReport(matched, excluded, tuple(shapes), shapes)


@dataclass(frozen=True)
class _Language:
    """The names that a pattern can use on one network."""

    paths: tuple[str, ...]
    presets: Mapping[str, str]
    aliases: Mapping[str, str]

    def all(self, patterns: Sequence[str], place: str, problems: list[str]) -> tuple[Matched, ...]:
        found = []
        for pattern in patterns:
            try:
                match = self.match(pattern)
            except re.error as error:
                problems.append(f"{place}: '{pattern}' is not a valid regular expression: {error}.")
                continue
            if match.paths:
                found.append(match)
            else:
                problems.append(f"{place}: '{pattern}' matches no linear layer of this network. {self.advice(pattern)}")
        return tuple(found)

    def match(self, pattern: str) -> Matched:
        if pattern in self.presets:
            return Matched(pattern, "set", self.whole(self.presets[pattern]))
        if pattern == "all-linear":
            return Matched(pattern, "set", self.whole(ALL_LINEAR))
        if not re.fullmatch(r"[\w.\-]+", pattern):
            return Matched(pattern, "regex", self.whole(pattern))
        if paths := self.ending_with({pattern}):
            return Matched(pattern, "name", paths)
        return Matched(pattern, "alias", self.ending_with(self.translations(pattern)))

    def whole(self, regex: str) -> tuple[str, ...]:
        compiled = re.compile(regex)
        return tuple(path for path in self.paths if compiled.fullmatch(path))

    def ending_with(self, suffixes: set[str]) -> tuple[str, ...]:
        # Dot boundaries on both sides: a substring test would find "k" in "blocks".
        return tuple(path for path in self.paths if any(_ends(path, suffix) for suffix in suffixes))

    def translations(self, pattern: str) -> set[str]:
        """Our endings for another program's: 'q' is each alias ending in it, 'blocks.3.self_attn.q' keeps its head."""
        shorter = {ours for theirs, ours in self.aliases.items() if _ends(theirs, pattern)}
        longer = {
            pattern.removesuffix(theirs) + ours
            for theirs, ours in self.aliases.items()
            if _ends(pattern, theirs) and pattern != theirs
        }
        return shorter | longer

    def advice(self, pattern: str) -> str:
        if "," in pattern:
            return f"For several names write a list: [{', '.join(part.strip() for part in pattern.split(','))}]."
        names = [*self.presets, "all-linear", *self.aliases, *self.suffixes()]
        plain = re.sub(r"\\d\+|[\\()?*+^$\[\]{}|]", "", pattern)
        near = nearest(plain, dict.fromkeys(names), 3) or list(dict.fromkeys(names))[:3]
        return f"Nearest: {', '.join(near)}."

    def suffixes(self) -> list[str]:
        """Every ending of one to three parts, each once."""
        split = [path.split(".") for path in self.paths]
        return list(dict.fromkeys(".".join(parts[-n:]) for parts in split for n in (1, 2, 3) if n <= len(parts)))


def _ends(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith(f".{suffix}")
