"""Which folders below a root are runs, and under which ids they are known."""

import os
from collections.abc import Iterator
from pathlib import Path

DEPTH = 3  # folders below the root
MOST = 20_000  # folders that are looked at: a root may be somebody's whole home
MARKS = ("events.rank0.jsonl", "process.rank0.json")
RESOLVED = {"config.yaml", "environment.json"}  # a config alone may be anybody's; both are written by a run
PASSED_OVER = {"node_modules", "__pycache__", "checkpoints", "samples", "incidents"}


def find_runs(root: Path) -> dict[str, Path]:
    """Id -> folder, newest first. An id is the path below the root with '/'; a root that is a run has its own name."""
    if is_run(root):
        return {root.absolute().name or "run": root}
    found = {path.relative_to(root).as_posix(): path for path in _below(root)}
    return dict(sorted(found.items(), key=lambda item: began(item[1]), reverse=True))


def is_run(folder: Path) -> bool:
    """Whether a trainer has worked in a folder."""
    try:
        return _marked({entry.name for entry in os.scandir(folder)})
    except OSError:
        return False


def _marked(names: set[str]) -> bool:
    return any(mark in names for mark in MARKS) or names >= RESOLVED


def began(folder: Path) -> float:
    """When a run last began, as far as its files tell: its config is written at each start. s since 1970."""
    for path in (folder / "config.yaml", folder / MARKS[0], folder):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return 0.0


def _below(root: Path) -> Iterator[Path]:
    """Runs below the root, whose own folders are not looked into; each once, whatever links lead to it."""
    seen: set[tuple[int, int]] = set()
    rows, looked = [root], 0
    for depth in range(DEPTH + 1):
        row, rows = rows, []
        for folder in row:
            looked += 1
            try:
                facts, entries = folder.stat(), list(os.scandir(folder))
            except OSError:  # removed in this moment, or another user's
                continue
            if looked > MOST or (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            if depth and _marked({entry.name for entry in entries}):
                yield folder
            elif depth < DEPTH:
                rows += [folder / entry.name for entry in entries if _may_lead(entry)]


def _may_lead(entry: os.DirEntry) -> bool:
    try:
        return not entry.name.startswith(".") and entry.name not in PASSED_OVER and entry.is_dir()
    except OSError:
        return False
