"""The small files of a run's folder as they are in this moment; one that is missing or half-written is an empty one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from weft.dashboard.regular import opened

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, many times quicker where libyaml is there
LARGEST = 16 << 20  # bytes; ours are far smaller
DEEPEST, MOST = 50, 100_000  # levels and values of a YAML file: a config has some ten, and some hundred
T = TypeVar("T")
Signature = tuple[int, int, int] | None


def signature(path: Path) -> Signature:
    """What changes when a file does: inode, size, time of its last change. None when it is not there."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


class Remembered(Generic[T]):
    """What was read of files, until they change."""

    def __init__(self, read: Callable[[Path], T], most: int = 4096) -> None:
        self._read, self._most = read, most
        self._known: dict[Path, tuple[Signature, T]] = {}

    def __call__(self, path: Path) -> T:
        now = signature(path)
        known = self._known.get(path)
        if known is not None and known[0] == now and now is not None:
            return known[1]
        found = self._read(path)
        if len(self._known) >= self._most:
            self._known.clear()
        self._known[path] = (now, found)
        return found


def text_of(path: Path, limit: int = LARGEST) -> str:
    """A file's text, at most `limit` bytes of it; bytes that are no UTF-8 are marked."""
    try:
        with opened(path) as file:
            return file.read(limit).decode("utf-8", errors="replace")
    except OSError:
        return ""


def json_of(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none to be had."""
    try:
        found = json.loads(text_of(path))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def yaml_of(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; empty where there is none to be had."""
    text = text_of(path)
    try:
        found = yaml.load(text, Loader) if _is_shallow(text) else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and _is_finite(found) else {}


def _is_shallow(text: str) -> bool:
    """Whether it nests as a config does: what nests deeper takes minutes to build."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST or number > 4 * MOST:
            return False
    return True


def _is_finite(tree: Any) -> bool:
    """Whether it can be walked through: aliases of aliases are small in a file and endless to whoever follows them."""
    left, waiting = MOST, [tree]
    while waiting and left > 0:
        node, left = waiting.pop(), left - 1
        within = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        if len(within) > left:
            return False
        waiting.extend(within)
    return left > 0


def rank_of(path: Path) -> int | None:
    """The number in a name such as heartbeat.rank3.json or training_gpu3.json."""
    digits = path.name.partition(".rank")[2].partition(".")[0] or path.stem.removeprefix("training_gpu")
    return int(digits) if digits.isdecimal() else None


def numbered(folder: Path, pattern: str) -> dict[int, Path]:
    """Number -> file, in order."""
    found = {rank_of(path): path for path in folder.glob(pattern)}
    return {number: found[number] for number in sorted(n for n in found if n is not None)}
