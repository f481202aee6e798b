"""The errors that a user can mend, and the helper that finds the nearest name.

WeftError            shown without a traceback, exit code 2
├── ConfigError      a config or a command line; carries every problem found, not only the first
├── DataError        a clip, a caption, a manifest, a cache
├── ModelError       a checkpoint of a base model or an adapter file
└── RunError         a run folder: resume, checkpoints, a stopped run
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class WeftError(Exception):
    """Anything that the user can mend: says where, what was wrong, what was expected, what to do."""


class ConfigError(WeftError):
    """One or more problems of a config, each a full sentence that begins with its place."""

    def __init__(self, *problems: str) -> None:
        self.problems: tuple[str, ...] = problems
        super().__init__("\n".join(problems))


class DataError(WeftError):
    """Training data that cannot be used as told."""


class ModelError(WeftError):
    """A model or adapter file that is missing, damaged, or not what the config says."""


class RunError(WeftError):
    """A run folder that cannot be continued, or a run that stopped itself."""


def nearest(name: str, choices: Iterable[str], count: int = 1) -> list[str]:
    """The choices that look most like the name, best first; empty when none is near."""
    return get_close_matches(name, list(choices), n=count, cutoff=0.55)


def did_you_mean(name: str, choices: Sequence[str]) -> str:
    """A closing clause for an error: the nearest choice, or all of them when none is near and they are few."""
    near = nearest(name, choices)
    if near:
        return f"Did you mean '{near[0]}'?"
    if len(choices) <= 12:
        return f"Choose one of: {', '.join(choices)}."
    return f"There are {len(choices)} choices, such as {', '.join(list(choices)[:3])}."
