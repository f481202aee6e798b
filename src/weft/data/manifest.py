"""From a source to its entries: folders with captions beside the clips, and JSONL, CSV and JSON manifests."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from weft.errors import DataError, did_you_mean, nearest

Media = Literal["video", "image"]

VIDEO_ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MANIFEST_ENDINGS = (".jsonl", ".csv", ".json")

PATH_KEYS = ("file_path", "video", "image", "path", "video_path", "image_path")
CAPTION_KEYS = ("text", "caption", "prompt")
# Other trainers write width and height to save a probe. They are measured here, so both are read over.
KNOWN_KEYS = (*PATH_KEYS, *CAPTION_KEYS, "type", "width", "height")
PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Entry:
    """One clip that a source names. key: its path within the source. place: where a user would look for it."""

    key: str
    path: Path
    media: Media
    caption: str | None  # None when there is none
    place: str
    problem: str = ""  # why it can be told already that the clip cannot be read


@dataclass
class Findings:
    """What the rows of one manifest gave: entries, and every problem under its line."""

    manifest: Path
    entries: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seen: dict[Path, str] = field(default_factory=dict)
    unknown: dict[str, list[int]] = field(default_factory=dict)  # key -> lines

    def place(self, line: int) -> str:
        return f"{self.manifest}, line {line}"

    def refuse(self, line: int, problem: str) -> None:
        self.problems.append(f"{self.place(line)}: {problem}")


def read_source(path: Path, caption_extension: str = ".txt") -> list[Entry]:
    """All entries of a folder or a manifest, in a stable order. Raises DataError with every problem of a manifest."""
    if path.is_dir():
        return folder_entries(path, caption_extension)
    if not path.exists():
        raise DataError(f"data.sources: there is no '{path}'. Paths count from the working directory, {Path.cwd()}.")
    if path.suffix.lower() not in MANIFEST_ENDINGS:
        raise DataError(f"data.sources: '{path}' is neither a folder nor a {', '.join(MANIFEST_ENDINGS)} manifest.")
    return manifest_entries(path)


def folder_entries(folder: Path, caption_extension: str) -> list[Entry]:
    """Every video and image below a folder, sorted by path; hidden files are left out."""
    entries = []
    for path in sorted(folder.rglob("*"), key=lambda p: p.relative_to(folder).as_posix()):
        media = media_of(path)
        if media is None or not path.is_file() or path.name.startswith("."):
            continue
        sidecar = path.with_suffix(caption_extension)
        caption = sidecar.read_text("utf-8-sig", errors="replace").strip() if sidecar.is_file() else ""
        entries.append(Entry(path.relative_to(folder).as_posix(), path, media, caption or None, f"{path}"))
    return entries


def media_of(path: Path) -> Media | None:
    """What a file's ending says that it is."""
    ending = path.suffix.lower()
    return "video" if ending in VIDEO_ENDINGS else "image" if ending in IMAGE_ENDINGS else None


def manifest_entries(manifest: Path) -> list[Entry]:
    """The entries of a manifest. Raises DataError with all its problems, each with its line."""
    found = Findings(manifest)
    rows = {".jsonl": jsonl_rows, ".csv": csv_rows, ".json": json_rows}[manifest.suffix.lower()]
    for line, row in rows(found):
        _read_row(found, line, row)
    for key, lines in found.unknown.items():
        also = f" (and {len(lines) - 1} more lines)" if len(lines) > 1 else ""
        near = nearest(key, KNOWN_KEYS)
        advice = f"Did you mean '{near[0]}'?" if near else f"Known keys: {', '.join(KNOWN_KEYS)}."
        found.refuse(lines[0], f"there is no key '{key}'{also}. {advice}")
    if found.problems:
        more = len(found.problems) - PROBLEMS_SHOWN
        rest = [f"... and {more} more problems in {manifest}."] if more > 0 else []
        raise DataError("\n".join(found.problems[:PROBLEMS_SHOWN] + rest))
    return found.entries


def jsonl_rows(found: Findings) -> Iterator[tuple[int, Any]]:
    """(line, value) of every line that is not empty."""
    for line, text in enumerate(_text(found.manifest).splitlines(), start=1):
        if not text.strip():
            continue
        try:
            yield line, json.loads(text)
        except json.JSONDecodeError as error:
            found.refuse(line, f"not JSON, {error.msg.lower()} at column {error.colno}. Expected one object per line.")


def csv_rows(found: Findings) -> Iterator[tuple[int, Any]]:
    """(line, row) of a CSV file whose first line names its columns."""
    reader = csv.DictReader(_text(found.manifest).splitlines(keepends=True))
    for row in reader:
        extra: Any = row.pop(None, None)  # DictReader puts surplus cells under None
        if extra:
            found.refuse(reader.line_num, f"{len(extra)} more cells than columns. Quote texts that hold commas.")
            continue
        yield reader.line_num, {name: cell for name, cell in row.items() if cell not in (None, "")}


def json_rows(found: Findings) -> Iterator[tuple[int, Any]]:
    """(line, value) of the members of a JSON list, read one by one so that each keeps its line."""
    text, decoder = _text(found.manifest), json.JSONDecoder()
    at = _past_space(text, 0)
    if text[at : at + 1] != "[":
        found.refuse(1, "expected a list of objects, [{...}, ...].")
        return
    at, line, counted = _past_space(text, at + 1), 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            found.refuse(error.lineno, f"not JSON, {error.msg.lower()} at column {error.colno}.")
            return
        yield line, value
        at = _past_space(text, at)
        if text[at : at + 1] == ",":
            at = _past_space(text, at + 1)
        elif text[at : at + 1] != "]":
            found.refuse(1 + text.count("\n", 0, at), "expected ',' or ']' after an object of the list.")
            return


def _past_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _text(manifest: Path) -> str:
    try:
        return manifest.read_text("utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{manifest} cannot be read as UTF-8 text: {error}. Save it as UTF-8.") from error


def _read_row(found: Findings, line: int, row: Any) -> None:
    """Add a row's entry to the findings, or what is wrong with it."""
    if not isinstance(row, dict):
        found.refuse(line, f"expected an object with '{PATH_KEYS[0]}' and 'text', found {json.dumps(row)[:40]}.")
        return
    for key in row:
        if key not in KNOWN_KEYS:
            found.unknown.setdefault(key, []).append(line)
    named = [(key, row[key]) for key in PATH_KEYS if row.get(key)]
    captions = [(key, row[key]) for key in CAPTION_KEYS if row.get(key) is not None]
    if not _is_one_text(found, line, named, "a path", PATH_KEYS, least=1):
        return
    if not _is_one_text(found, line, captions, "a caption", CAPTION_KEYS, least=0):
        return
    key, name = named[0]
    path = found.manifest.parent / name
    media = _row_media(found, line, path, row.get("type"))
    if media is None:
        return
    whole = path.resolve()
    if whole in found.seen:
        found.refuse(line, f"{name} stands in {found.seen[whole]} already. Keep one, or weigh a source by 'repeats'.")
        return
    found.seen[whole] = f"line {line}"
    lost = f"'{key}' is {name}, and there is no such file. Paths count from the manifest's folder."
    place = found.place(line)
    caption = captions[0][1].strip() if captions else ""
    problem = "" if path.exists() else f"{place}: {lost}"
    found.entries.append(Entry(Path(name).as_posix(), path, media, caption or None, place, problem))


def _is_one_text(
    found: Findings, line: int, values: list[tuple[str, Any]], what: str, keys: tuple[str, ...], *, least: int
) -> bool:
    """Whether one key of a kind holds a string; says so otherwise."""
    if len(values) > 1:
        found.refuse(line, f"{what} stands under {' and '.join(f'{key!r}' for key, _ in values)}. Keep one.")
    elif len(values) < least:
        found.refuse(line, f"{what} is lost. Expected one of: {', '.join(keys)}.")
    elif values and not isinstance(values[0][1], str):
        found.refuse(line, f"'{values[0][0]}' is {json.dumps(values[0][1])[:40]}. Expected a string.")
    else:
        return True
    return False


def _row_media(found: Findings, line: int, path: Path, told: Any) -> Media | None:
    """What the row's type says, or else the file's ending; the two must agree."""
    ending = media_of(path)
    if told in (None, ""):
        if ending is None:
            endings = ", ".join((*VIDEO_ENDINGS, *IMAGE_ENDINGS))
            found.refuse(line, f"{path.name} has none of the endings {endings}. Rename it, or give 'type'.")
        return ending
    if told not in ("video", "image"):
        found.refuse(line, f"'type' is {told!r}. {did_you_mean(str(told), ('video', 'image'))}")
        return None
    if ending is not None and told != ending:
        found.refuse(line, f"'type' is {told!r}, but {path.name} is a file of type '{ending}'.")
        return None
    return told
