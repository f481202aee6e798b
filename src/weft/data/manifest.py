"""From a source to its entries: folders with captions beside the clips, and JSONL, CSV and JSON manifests."""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
# Of VideoX-Fun and musubi; what they bring is not trained on, and the user is told.
UNUSED_KEYS = re.compile(r"(control|object)_file_path|control_path(_\d+)?|image_path_\d+")
PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Entry:
    """One clip that a source names. key: its path within the source. place: where a user would look for it."""

    key: str
    path: Path
    media: Media
    captions: tuple[str, ...]  # empty when there is none
    place: str
    problem: str = ""  # why it can be told already that the clip cannot be read


@dataclass(frozen=True)
class Listed:
    """What a source names, and what the user should know of it."""

    entries: list[Entry]
    notices: tuple[str, ...] = ()


@dataclass
class Findings:
    """What the rows of one manifest gave: entries, and every problem under its line. root: where paths count from."""

    manifest: Path
    root: Path
    entries: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seen: dict[Path, str] = field(default_factory=dict)
    unknown: dict[str, list[int]] = field(default_factory=dict)  # key -> lines
    unused: dict[str, list[int]] = field(default_factory=dict)

    def place(self, line: int) -> str:
        return f"{self.manifest}, line {line}"

    def refuse(self, line: int, problem: str) -> None:
        self.problems.append(f"{self.place(line)}: {problem}")

    def raise_problems(self) -> None:
        """Raise DataError with the first problems, if there are any."""
        if self.problems:
            more = len(self.problems) - PROBLEMS_SHOWN
            rest = [f"... and {more} more problems in {self.manifest}."] if more > 0 else []
            raise DataError("\n".join(self.problems[:PROBLEMS_SHOWN] + rest))


def read_source(
    path: Path, caption_extension: str = ".txt", root: Path | None = None, only: Media | None = None
) -> Listed:
    """All entries of a folder or a manifest, in a stable order. root: where a manifest's paths count from, if not from
    its folder. only: the kind that is taken. Raises DataError with every problem of a manifest."""
    if not path.exists():
        raise DataError(f"data.sources: there is no '{path}'. Paths count from the working directory, {Path.cwd()}.")
    if path.is_dir():
        listed = Listed(folder_entries(path, caption_extension))
    elif path.suffix.lower() in MANIFEST_ENDINGS:
        listed = manifest_entries(path, root or path.parent)
    else:
        endings = ", ".join(MANIFEST_ENDINGS)
        raise DataError(f"data.sources: '{path}' is no folder, no manifest ({endings}) and no musubi dataset (.toml).")
    return listed if only is None else replace(listed, entries=[e for e in listed.entries if e.media == only])


def folder_entries(folder: Path, caption_extension: str) -> list[Entry]:
    """Every video and image below a folder, sorted by path; hidden files are left out."""
    entries = []
    for path in sorted(folder.rglob("*"), key=lambda p: p.relative_to(folder).as_posix()):
        media = media_of(path)
        if media is None or not path.is_file() or path.name.startswith("."):
            continue
        sidecar = path.with_suffix(caption_extension)
        caption = sidecar.read_text("utf-8-sig", errors="replace").strip() if sidecar.is_file() else ""
        entries.append(
            Entry(path.relative_to(folder).as_posix(), path, media, (caption,) if caption else (), f"{path}")
        )
    return entries


def media_of(path: Path) -> Media | None:
    """What a file's ending says that it is."""
    ending = path.suffix.lower()
    return "video" if ending in VIDEO_ENDINGS else "image" if ending in IMAGE_ENDINGS else None


def manifest_entries(manifest: Path, root: Path) -> Listed:
    """The entries of a manifest. Raises DataError with all its problems, each with its line."""
    found = Findings(manifest, root)
    for line, row in rows_of(found):
        _read_row(found, line, row)
    for key, lines in found.unknown.items():
        near = nearest(key, KNOWN_KEYS)
        advice = f"Did you mean '{near[0]}'?" if near else f"Known keys: {', '.join(KNOWN_KEYS)}."
        found.refuse(lines[0], f"there is no key '{key}'{_more(lines)}. {advice}")
    found.raise_problems()
    unused = [
        f"{found.place(lines[0])}: '{key}' is not used{_more(lines)}: Weft trains without control signals."
        for key, lines in found.unused.items()
    ]
    return Listed(found.entries, tuple(unused))


def _more(lines: list[int]) -> str:
    return f" (and in {len(lines) - 1} more lines)" if len(lines) > 1 else ""


def rows_of(found: Findings) -> Iterator[tuple[int, Any]]:
    """(line, value) of what a manifest lists, by its ending."""
    return {".jsonl": jsonl_rows, ".csv": csv_rows, ".json": json_rows}[found.manifest.suffix.lower()](found)


def jsonl_rows(found: Findings) -> Iterator[tuple[int, Any]]:
    """(line, value) of every line that is not empty."""
    for line, text in enumerate(utf8_text(found.manifest).splitlines(), start=1):
        if not text.strip():
            continue
        try:
            yield line, json.loads(text)
        except json.JSONDecodeError as error:
            found.refuse(line, f"not JSON, {error.msg.lower()} at column {error.colno}. Expected one object per line.")


def csv_rows(found: Findings) -> Iterator[tuple[int, Any]]:
    """(line, row) of a CSV file whose first line names its columns."""
    reader = csv.DictReader(utf8_text(found.manifest).splitlines(keepends=True))
    for row in reader:
        extra: Any = row.pop(None, None)  # DictReader puts surplus cells under None
        if extra:
            found.refuse(reader.line_num, f"{len(extra)} more cells than columns. Quote texts that hold commas.")
            continue
        yield reader.line_num, {name: cell for name, cell in row.items() if cell not in (None, "")}


def json_rows(found: Findings) -> Iterator[tuple[int, Any]]:
    """(line, value) of the members of a JSON list, read one by one so that each keeps its line."""
    text, decoder = utf8_text(found.manifest), json.JSONDecoder()
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


def utf8_text(path: Path) -> str:
    """What a file says. Raises DataError."""
    try:
        return path.read_text("utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}. Save it as UTF-8.") from error


def _read_row(found: Findings, line: int, row: Any) -> None:
    """Add a row's entry to the findings, or what is wrong with it."""
    if not isinstance(row, dict):
        found.refuse(line, f"expected an object with '{PATH_KEYS[0]}' and 'text', found {json.dumps(row)[:40]}.")
        return
    for key in row:
        if UNUSED_KEYS.fullmatch(key):
            found.unused.setdefault(key, []).append(line)
        elif key not in KNOWN_KEYS:
            found.unknown.setdefault(key, []).append(line)
    named = [(key, row[key]) for key in PATH_KEYS if row.get(key)]
    told = [(key, row[key]) for key in CAPTION_KEYS if row.get(key) is not None]
    lists = [(key, text) for key, value in told for text in (value if isinstance(value, list) else [value])]
    if not is_one_text(found, line, named, "a path", PATH_KEYS, least=1):
        return
    if not all(is_one_text(found, line, [text], "a caption", CAPTION_KEYS, least=0) for text in lists[1:]):
        return
    if not is_one_text(found, line, lists[:1] if len(told) < 2 else told, "a caption", CAPTION_KEYS, least=0):
        return
    key, name = named[0]
    path = found.root / name
    media = _row_media(found, line, path, row.get("type"))
    if media is None:
        return
    whole = path.resolve()
    if whole in found.seen:
        found.refuse(line, f"{name} stands in {found.seen[whole]} already. Keep one, or weigh a source by 'repeats'.")
        return
    found.seen[whole] = f"line {line}"
    origin = "the manifest's folder" if found.root == found.manifest.parent else f"the source's root, {found.root}"
    lost = f"'{key}' is {name}, and there is no such file. Paths count from {origin}."
    place = found.place(line)
    captions = tuple(filter(None, (text.strip() for _, text in lists)))
    problem = "" if path.exists() else f"{place}: {lost}"
    found.entries.append(Entry(Path(name).as_posix(), path, media, captions, place, problem))


def is_one_text(
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
