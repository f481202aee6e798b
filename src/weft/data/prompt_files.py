"""From a file to the captions that stand in it: plain text, JSONL, CSV and JSON."""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from weft.data.manifest import CAPTION_KEYS, MANIFEST_ENDINGS, Findings, is_one_text, rows_of, utf8_text
from weft.errors import DataError, nearest

ENDINGS = (".txt", *MANIFEST_ENDINGS)
COMMENT = "#"


@dataclass(frozen=True)
class Prompt:
    """A caption without a clip. place: where a user would look for it."""

    text: str
    place: str

    @property
    def key(self) -> str:
        """What its text alone names it, wherever it stands."""
        return sha256(self.text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Listed:
    """The captions of a file, and what the user should know of it."""

    prompts: list[Prompt]
    notices: tuple[str, ...] = ()


def read_prompts(path: Path) -> Listed:
    """All captions of a file in its order. Raises DataError for a file that is lost, empty or not UTF-8, and with every
    line of it that has no caption."""
    _refuse_what_is_no_file(path)
    listed = text_prompts(path) if path.suffix.lower() == ".txt" else manifest_prompts(path)
    if not listed.prompts:
        raise DataError(f"data.files: '{path}' holds no caption. Write some into it, or leave it out.")
    return listed


def text_prompts(path: Path) -> Listed:
    """One caption a line; blank lines and comments are left out."""
    lines = [(number, line.strip()) for number, line in enumerate(utf8_text(path).splitlines(), start=1)]
    return Listed(
        [Prompt(line, f"{path}, line {number}") for number, line in lines if line and not line.startswith(COMMENT)]
    )


def manifest_prompts(path: Path) -> Listed:
    """The captions of a manifest's rows, several where a row lists them; clips beside them are not looked at."""
    found = Findings(path, path.parent)
    prompts = [Prompt(text, found.place(line)) for line, row in rows_of(found) for text in _captions(found, line, row)]
    found.raise_problems()
    unused = ", ".join(f"'{key}'" for key in found.unused)
    return Listed(prompts, (f"{path}: the captions alone are used, not {unused}.",) if unused else ())


def _captions(found: Findings, line: int, row: Any) -> list[str]:
    """The captions of a row; none when there is something wrong with it, which the findings then say."""
    row = {CAPTION_KEYS[0]: row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        found.refuse(line, f"expected a caption, or an object with '{CAPTION_KEYS[0]}', found {json.dumps(row)[:40]}.")
        return []
    for key in row:
        if key not in CAPTION_KEYS:
            found.unused.setdefault(key, []).append(line)
    told = [(key, row[key]) for key in CAPTION_KEYS if row.get(key) is not None]
    if len(told) == 1 and isinstance(told[0][1], list):
        told = [(told[0][0], text) for text in told[0][1]]
        sound = all(is_one_text(found, line, [text], "a caption", CAPTION_KEYS, least=1) for text in told)
    else:
        sound = is_one_text(found, line, told, "a caption", CAPTION_KEYS, least=1)
    if not sound:
        return []
    texts = [text.strip() for _, text in told]
    if not all(texts) or not texts:
        found.refuse(line, "the caption is empty.")
        return []
    return texts


def _refuse_what_is_no_file(path: Path) -> None:
    """Raise DataError, with the nearest name where a file is not there."""
    ending = f"one of {', '.join(ENDINGS)}"
    if path.is_dir():
        raise DataError(f"data.files: '{path}' is a folder. Name the files in it that hold captions, {ending}.")
    if not path.is_file():
        there = path.parent.iterdir() if path.parent.is_dir() else ()
        near = nearest(path.name, sorted(other.name for other in there if other.suffix.lower() in ENDINGS))
        advice = f"Did you mean '{path.with_name(near[0])}'? " if near else ""
        raise DataError(
            f"data.files: there is no '{path}'. {advice}Paths count from the working directory, {Path.cwd()}."
        )
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"data.files: '{path}' has another ending than captions are read from. Expected {ending}.")
