"""From what a user writes under `adapter.targets` to module paths: sets, layer names, regexes, foreign names."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from weft.errors import ConfigError, nearest

# Path of a layer -> (out, in), of a convolution (out, in, *kernel), of a bias (out,); in the network's own order.
Shapes = Mapping[str, tuple[int, ...]]
Aliases = Mapping[str, str | tuple[str, ...]]  # another program's name of layers -> ours, which may be several

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
    biases: Shapes = field(default_factory=dict)  # of these, where biases are trained too

    @property
    def convolutions(self) -> Shapes:
        """Those of the adapted layers that are convolutions."""
        return {path: shape for path, shape in self.shapes.items() if len(shape) > 2}

    def total(self, parameters: Callable[[int, int], int]) -> int:
        """The sum of parameters(out, in) over the linear layers."""
        return sum(parameters(shape[0], shape[1]) for shape in self.shapes.values() if len(shape) == 2)

    def parameters(self, rank: int, dora: bool = False, conv_rank: int = 0) -> int:
        """Trainable parameters of one LoRA: rank (in + out) for each layer, and out more with DoRA.

        Of a convolution `in` counts each place of the kernel.
        """
        linear = self.total(lambda out, fan_in: rank * (fan_in + out) + (out if dora else 0))
        return linear + sum(conv_rank * (prod(shape[1:]) + shape[0]) for shape in self.convolutions.values())

    def rows(self) -> list[tuple[str, str, int, str]]:
        """For a table: the pattern, how it was read, how many layers, the first of them."""
        rows = [(m.pattern, m.read_as, len(m.paths), m.paths[0]) for m in self.matched]
        return rows + [(f"not {m.pattern}", m.read_as, len(m.paths), m.paths[0]) for m in self.excluded]


def match_targets(
    patterns: Sequence[str],
    exclude: Sequence[str],
    layers: Shapes,
    presets: Mapping[str, str],
    aliases: Aliases,
) -> TargetReport:
    """Find the layers that patterns name, less those that exclude names. A set holds linear layers alone.

    presets: set name -> regex. aliases: another program's layer suffix -> ours, or the start of its paths -> ours.
    Raises: ConfigError with all patterns that match nothing, each with the nearest names.
    """
    linears = tuple(path for path, shape in layers.items() if len(shape) == 2)
    language = _Language(tuple(layers), linears, presets, aliases)
    problems: list[str] = []
    matched = language.all(patterns, "adapter.targets", problems)
    excluded = language.all(exclude, "adapter.exclude", problems)
    if problems:
        raise ConfigError(*problems)
    dropped = {path for m in excluded for path in m.paths}
    chosen = {path for m in matched for path in m.paths} - dropped
    if not chosen:
        raise ConfigError("adapter.exclude: it takes away every layer that adapter.targets names; nothing is trained.")
    shapes = {path: shape for path, shape in layers.items() if path in chosen}
    return TargetReport(matched, excluded, tuple(shapes), shapes)


@dataclass(frozen=True)
class _Language:
    """The names that a pattern can use on one network."""

    paths: tuple[str, ...]
    linears: tuple[str, ...]  # those paths that are no convolutions
    presets: Mapping[str, str]
    aliases: Aliases

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
            return Matched(pattern, "set", _whole(self.presets[pattern], self.linears))
        if pattern == "all-linear":
            return Matched(pattern, "set", _whole(ALL_LINEAR, self.linears))
        if not re.fullmatch(r"[\w.\-]+", pattern):
            return Matched(pattern, "regex", _whole(pattern, self.paths))
        if paths := self.ending_with({pattern}):
            return Matched(pattern, "name", paths)
        return Matched(pattern, "alias", self.ending_with(self.translations(pattern)))

    def ending_with(self, suffixes: set[str]) -> tuple[str, ...]:
        # Dot boundaries on both sides: a substring test would find "k" in "blocks".
        return tuple(path for path in self.paths if any(_ends(path, suffix) for suffix in suffixes))

    def translations(self, pattern: str) -> set[str]:
        """Our endings for another program's: 'q' is each alias ending in it, 'blocks.3.self_attn.q' keeps its head.

        A head has aliases too: with 'double_blocks' -> 'transformer_blocks', 'double_blocks.3.img_attn_proj' is a path
        of ours.
        """
        shorter = {ours for theirs, ours in self.pairs() if _ends(theirs, pattern)}
        longer = {
            pattern.removesuffix(theirs) + ours
            for theirs, ours in self.pairs()
            if _ends(pattern, theirs) and pattern != theirs
        }
        headed = {
            ours + name.removeprefix(theirs)
            for name in {pattern, *longer}
            for theirs, ours in self.pairs()
            if name.startswith(f"{theirs}.")
        }
        return shorter | longer | headed

    def pairs(self) -> list[tuple[str, str]]:
        """(their name, one of ours) of every alias."""
        several = {theirs: (ours,) if isinstance(ours, str) else ours for theirs, ours in self.aliases.items()}
        return [(theirs, one) for theirs, ours in several.items() for one in ours]

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


def _whole(regex: str, paths: Sequence[str]) -> tuple[str, ...]:
    compiled = re.compile(regex)
    return tuple(path for path in paths if compiled.fullmatch(path))


def _ends(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith(f".{suffix}")
