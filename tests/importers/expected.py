"""Values of a run at dotted keys, compared all at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def value(run: Any, key: str) -> Any:
    """What stands at a dotted key; numbers are places in a list."""
    for step in key.split("."):
        run = run[int(step)] if step.isdecimal() else run[step] if isinstance(run, Mapping) else getattr(run, step)
    return run


def check(run: Any, expected: Mapping[str, Any]) -> None:
    """The run has these values."""
    found = {key: value(run, key) for key in expected}
    assert {key: one.as_posix() if isinstance(one, Path) else one for key, one in found.items()} == dict(expected)
