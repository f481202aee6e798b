"""Files of other trainers read as plain data with line numbers; nothing in them is run."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from weft.config.yaml_text import KeyPath, Loader, read_yaml
from weft.errors import ConfigError
from weft.importers.draft import FileKind, ReadFile
from weft.importers.shell_words import read_script

KINDS: Mapping[str, FileKind] = {
    ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".sh": "shell", ".bash": "shell",
    ".bat": "shell", ".cmd": "shell", ".ps1": "shell",
}  # fmt: skip
LARGEST = 4 * 2**20  # bytes: a config is a few thousand; a file of weights given by mistake should not be read whole
MOST_VALUES = 100_000
TOML_KEY = r"(?:[\w-]+|\"[^\"]*\"|'[^']*')"


def read(path: Path) -> ReadFile:
    """One file, by its ending or else by how it begins. Raises ConfigError with `file:line`."""
    try:
        return _read(path, _text(path))
    except RecursionError:
        raise ConfigError(f"'{path}': lists or sections stand in one another too deep to be a config.") from None


def _read(path: Path, text: str) -> ReadFile:
    kind = KINDS.get(path.suffix.lower()) or _kind_of(text)
    if kind == "toml":
        return ReadFile(path, text, kind, _toml(text, path), toml_lines(text))
    if kind == "json":
        content = _json(text, path)
        return ReadFile(path, text, kind, content, dict(_json_lines(content, text)))
    if kind == "yaml":
        _refuse_growth(text, path)
        try:
            document = read_yaml(text, str(path))
        except ConfigError:
            if path.suffix.lower() in KINDS:
                raise
            raise ConfigError(
                f"'{path}' is neither a config nor a launch script: its name has none of the endings "
                f"{', '.join(KINDS)}, and its text is none of these."
            ) from None
        lines = {key: place.line for key, place in document.places.items()}
        return ReadFile(path, text, kind, document.data, lines)
    return ReadFile(path, text, kind, read_script(text, path))


def _text(path: Path) -> str:
    if not path.exists():
        raise ConfigError(f"there is no file '{path}' (in {Path.cwd()}).")
    if path.is_dir():
        raise ConfigError(f"'{path}' is a folder. Name the config file in it.")
    if path.stat().st_size > LARGEST:
        raise ConfigError(f"'{path}' has {path.stat().st_size / 2**20:,.0f} MB, and a config is text of a few pages.")
    try:
        return path.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path}' is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None


def _kind_of(text: str) -> FileKind:
    """By its first line that is no comment, for files without a known ending."""
    lines = [line.strip() for line in text.splitlines()]
    first = next((line for line in lines if line and not line.startswith("#")), "")
    if text.startswith("#!") or re.match(r"(accelerate|torchrun|deepspeed|python3?|export|bash|uv)\s", first):
        return "shell"
    if first.startswith("-") and not first.startswith("- "):
        return "args"
    if first.startswith("{"):
        return "json"
    return "toml" if first.startswith("[") or re.match(rf"{TOML_KEY}\s*=", first) else "yaml"


def _refuse_growth(text: str, path: Path) -> None:
    """Aliases of aliases can stand for more values than any memory holds."""
    try:
        root = yaml.compose(text, Loader=Loader)
    except yaml.YAMLError:  # told with its place when it is read
        return
    if root is not None and _size(root, {}) > MOST_VALUES:
        raise ConfigError(f"'{path}': its aliases stand for more than {MOST_VALUES:,} values. Write them out.")


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node, those of an alias counted each time; one that stands inside itself counts once."""
    if id(node) not in known:
        known[id(node)] = 1
        inner = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] += sum(_size(part, known) for part in inner if isinstance(part, yaml.Node))
    return known[id(node)]


def _toml(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r" ?\(at (?:line (\d+), column (\d+)|end of document)\)", str(error))
        last = text.count("\n") + 1
        where = f"{path}:{at[1] or last}:{at[2] or 1}" if at else str(path)
        said = str(error)[: at.start()] if at else str(error)
        raise ConfigError(f"{where}: not TOML: {said[:1].lower()}{said[1:]}.") from None


def toml_lines(text: str) -> dict[KeyPath, int]:
    """Where each table and each of its keys stands, and each item of an array of tables; TOML parsers do not tell."""
    found: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(rf"\s*(\[\[?)\s*({TOML_KEY}(?:\s*\.\s*{TOML_KEY})*)\s*\]", line):
            table = _in_arrays(_toml_keys(header[2]), counts)
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, counts[table])
            found.setdefault(table, number)
        elif key := re.match(rf"\s*({TOML_KEY}(?:\s*\.\s*{TOML_KEY})*)\s*=", line):
            found.setdefault((*table, *_toml_keys(key[1])), number)
    return found


def _toml_keys(dotted: str) -> KeyPath:
    return tuple(key.strip("\"'") for key in re.findall(TOML_KEY, dotted))


def _in_arrays(keys: KeyPath, counts: Mapping[KeyPath, int]) -> KeyPath:
    """[datasets.more] is a part of the newest [[datasets]]."""
    path: KeyPath = ()
    for key in keys[:-1]:
        path = (*path, key)
        if path in counts:
            path = (*path, counts[path])
    return (*path, keys[-1])


def _json(text: str, path: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ConfigError(f"{path}: the key '{key}' is given twice in one object. Keep one.")
            seen[key] = value
        return seen

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        said = error.msg[:1].lower() + error.msg[1:]
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not JSON: {said}.") from None


def _json_lines(content: Any, text: str) -> Iterator[tuple[KeyPath, int]]:
    """Keys stand in the text in the order in which they were read, so one walk along it finds them all."""
    at = 0
    for path in _paths(content, ()):
        if isinstance(path[-1], str):
            found = re.compile(re.escape(json.dumps(path[-1], ensure_ascii=False)) + r"\s*:").search(text, at)
            if found:
                at = found.end()
        yield path, text.count("\n", 0, at) + 1


def _paths(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _paths(item, (*path, key))
