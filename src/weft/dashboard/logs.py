"""The last lines of what a run said, with those that tell of trouble marked."""

import re
from pathlib import Path
from typing import Any

from weft.dashboard.regular import opened
from weft.run.run_log import levelled

END = 256 << 10  # bytes that are read of a log's end
LONGEST = 2000  # letters of a line
CONTROL = re.compile(
    r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]"
)  # colours of a terminal, and other unprintables
BAD = re.compile(r"\b(error|errors|fatal|traceback|failed|killed|segmentation fault|aborted|exception)\b|Error:", re.I)
WARN = re.compile(r"\bwarn(ing|ings)?\b|\brefused\b|not finite", re.I)
FILES = ("run.rank0.log", "train.log")  # the second is the output of a run in the background


def log_of(folder: Path, lines: int, others: bool = False) -> list[dict[str, Any]]:
    """At most so many last lines, each with its level: info, warn or bad. others: also what further ranks said before
    they ended badly, for the first one may only know that it lost a peer."""
    found = next((told for name in FILES if (told := _last(folder / name, lines))), [])
    if others:
        for path in sorted(folder.glob("run.rank*.log")):
            said = _last(path, lines) if path.name != FILES[0] else []
            if any(line["level"] == "bad" for line in said):
                rank = path.name.split(".")[1]
                found += [{**line, "text": f"{rank}: {line['text']}"} for line in said]
    return found[-lines:]


def _last(path: Path, lines: int) -> list[dict[str, Any]]:
    try:
        with opened(path) as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - END))
            text = file.read(END).decode("utf-8", errors="replace")
    except OSError:
        return []
    # A progress bar writes over its own line: what stands there last is what a terminal shows.
    found = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    found = found[1:] if size > END else found
    found = [CONTROL.sub("", line)[:LONGEST] for line in found if line.strip()]
    told = levelled(found) if path.name.startswith("run.rank") else [(line, _guessed(line)) for line in found]
    return [{"text": line, "level": level} for line, level in told[-lines:]]


def _guessed(line: str) -> str:
    """The level of a line that another has written."""
    return "bad" if BAD.search(line) else "warn" if WARN.search(line) else "info"
