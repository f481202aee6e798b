"""Where a config comes from: a YAML file, the files that it extends, and KEY=VALUE on the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.config.ready import find_base, find_config
from weft.config.yaml_text import Document, KeyPath, Place, read_scalar, read_yaml
from weft.errors import ConfigError, nearest

COMMAND_LINE = "(command line)"
EXTENDS = "extends"  # the one key that is ours and no section's


@dataclass(frozen=True)
class Source:
    """Plain data, the place of every key and list item in it, and the name of the file that was asked for."""

    data: dict[str, Any]
    places: Mapping[KeyPath, Place]
    name: str

    def place(self, path: KeyPath) -> Place:
        """Where a value stands, or the nearest section around it."""
        while path not in self.places and path:
            path = path[:-1]
        return self.places.get(path, Place(self.name))


def read_source(path: Path, overrides: Sequence[str] = ()) -> Source:
    """A config file, or the ready config of that name, with what it extends, changed by `adapter.rank=32` and the like.
    Raises ConfigError."""
    return override(_read_file(find_config(path), ()), overrides)


def read_text(text: str, name: str = "(text)", overrides: Sequence[str] = ()) -> Source:
    """The same for YAML that is no file; what it extends is looked up from the working folder."""
    return override(_extended(read_yaml(text, name), name, Path(), ()), overrides)


# ---- Files --------------------------------------------------------------------------------------------------------


def _read_file(path: Path, around: tuple[Path, ...], asked_at: Place | None = None) -> Source:
    """around: the files whose `extends` led here, outermost first."""
    where = f"{asked_at}: extends: " if asked_at else ""
    if path.resolve() in around:
        chain = " -> ".join(file.name for file in (*around, path))
        raise ConfigError(f"{where}the files extend one another in a circle: {chain}.")
    return _extended(read_yaml(_text(path, where), str(path)), str(path), path.parent, (*around, path.resolve()))


def _text(path: Path, where: str) -> str:
    if not path.exists():
        raise ConfigError(f"{where}no such file '{path}' (in {Path.cwd()}).{_near_file(path)}")
    if path.is_dir():
        raise ConfigError(f"{where}'{path}' is a folder, and a config is a file.{_near_file(path / 'run.yaml')}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}'{path}' is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{where}'{path}' cannot be read: {error.strerror}.") from None


def _near_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder '{path.parent}'."
    files = sorted(f.name for f in path.parent.iterdir() if f.suffix in (".yaml", ".yml"))
    near = nearest(path.name, files) or files[: len(files) == 1]
    return f" Did you mean '{path.parent / near[0]}'?" if near else ""


def _extended(document: Document, name: str, folder: Path, around: tuple[Path, ...]) -> Source:
    if not isinstance(document.data, dict):
        raise ConfigError(f"{document.places[()]}: a config is keys with values, such as 'name: first-run'.")
    own = Source({k: v for k, v in document.data.items() if k != EXTENDS}, dict(document.places), name)
    if EXTENDS not in document.data:
        return own
    asked_at = document.places[(EXTENDS,)]
    bases = document.data[EXTENDS]
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not bases or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{asked_at}: extends: expected a file or a list of files, got {bases!r}.")
    result = _read_file(find_base(folder, bases[0]), around, asked_at)
    for base in bases[1:]:
        result = merged(result, _read_file(find_base(folder, base), around, asked_at))
    return merged(result, own)


def merged(base: Source, top: Source) -> Source:
    """base under top: sections are merged key by key, all else is replaced, and so is a section of another kind."""
    data, places = _merge(base.data, dict(base.places), top.data, top.places, ())
    return Source(data, {**places, (): top.place(())}, top.name)


def _merge(
    base: dict[str, Any],
    places: dict[KeyPath, Place],
    top: dict[str, Any],
    top_places: Mapping[KeyPath, Place],
    at: KeyPath,
) -> tuple[dict[str, Any], dict[KeyPath, Place]]:
    data = dict(base)
    for key, value in top.items():
        path = (*at, key)
        old = data.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and _same_kind(old, value):
            data[key], places = _merge(old, places, value, top_places, path)
            places[path] = top_places[path]
        else:
            data[key] = value
            places = _outside(places, path) | _inside(top_places, path)
    return data, places


def _same_kind(old: dict[str, Any], new: dict[str, Any]) -> bool:
    # A base's `lr` means nothing to another optimizer: keys of the old kind would only be refused one by one.
    return "kind" not in old or "kind" not in new or old["kind"] == new["kind"]


def _inside(places: Mapping[KeyPath, Place], path: KeyPath) -> dict[KeyPath, Place]:
    return {known: place for known, place in places.items() if known[: len(path)] == path}


def _outside(places: Mapping[KeyPath, Place], path: KeyPath) -> dict[KeyPath, Place]:
    return {known: place for known, place in places.items() if known[: len(path)] != path}


# ---- The command line ---------------------------------------------------------------------------------------------


def override(source: Source, assignments: Sequence[str]) -> Source:
    """The source with `dotted.key=value` set, left to right. Raises ConfigError with all that cannot be set."""
    problems = []
    for assignment in assignments:
        try:
            source = _assigned(source, assignment)
        except ConfigError as error:
            problems += [f"{COMMAND_LINE}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(*problems)
    return source


def _assigned(source: Source, assignment: str) -> Source:
    key, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(f"'{assignment}' is no assignment. Write key=value, such as adapter.rank=32.")
    key = key.strip().removeprefix("--")
    if not key or not all(key.split(".")):
        raise ConfigError(f"'{assignment}' names no key. Write key=value, such as adapter.rank=32.")
    if key == EXTENDS:
        raise ConfigError("'extends' can be written in a file only.")
    path, data = _set(source.data, key.split("."), _override_value(text.strip(), key), ())
    return Source(data, _outside(source.places, path) | _places_on_the_way(source, path), source.name)


def _places_on_the_way(source: Source, path: KeyPath) -> dict[KeyPath, Place]:
    ends = (path[:end] for end in range(1, len(path) + 1))
    return {way: Place(COMMAND_LINE) for way in ends if way == path or way not in source.places}


def _override_value(text: str, key: str) -> Any:
    """Lists, sections and quoted text are YAML; all else is one scalar, so that 'a cat: asleep' stays text."""
    if text[:1] not in ("[", "{", '"', "'"):
        return read_scalar(text)
    try:
        return read_yaml(text, key).data
    except ConfigError as error:
        raise ConfigError(f"{key}={text}: " + error.problems[0].partition(": ")[2]) from None


def _set(data: Any, keys: Sequence[str], value: Any, at: KeyPath) -> tuple[KeyPath, Any]:
    """(the full path, a copy of data with the value at it)."""
    if not keys:
        return at, value
    head, dotted = keys[0], ".".join(map(str, at))
    if isinstance(data, list):
        if not head.isdecimal() or int(head) > len(data):
            raise ConfigError(f"{dotted} is a list of {len(data)}, so '{head}' is no place in it. They count from 0.")
        index = int(head)
        path, item = _set(data[index] if index < len(data) else None, keys[1:], value, (*at, index))
        return path, [*data[:index], item, *data[index + 1 :]]
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{dotted} is {data!r}, so it has no '{head}' in it.")
    path, item = _set(data.get(head), keys[1:], value, (*at, head))
    return path, {**data, head: item}
