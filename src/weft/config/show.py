"""A config as YAML that parses to an equal config, on request with the origin of every value, and how two differ."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel

from weft.config.source import Source
from weft.config.yaml_text import SCALARS, KeyPath

DEFAULT = "default"
ABSENT = "(absent)"  # stands for a key that one of two configs does not have


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or our rules would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Only double quotes keep a text of several lines on one.
    style = '"' if text.splitlines() != [text] else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _tag, _pattern in SCALARS.items():
    _Dumper.add_implicit_resolver(_tag, _pattern, None)
_Dumper.add_representer(str, _text)


def show(config: BaseModel | Mapping[str, Any], origins: Source | None = None) -> str:
    """The resolved config as YAML text. With origins each value has its place, or 'default', in a comment."""
    data = config.model_dump(mode="json") if isinstance(config, BaseModel) else dict(config)
    lines = [(text, path) for path, text in _lines(data, (), "")]
    if origins is None:
        return "".join(f"{text}\n" for text, _ in lines) or "{}\n"
    width = min(max((len(text) for text, _ in lines), default=0), 60)
    return "".join(f"{text:<{width}}  # {_origin(origins, path)}\n" if path else f"{text}\n" for text, path in lines)


def _origin(origins: Source, path: KeyPath) -> str:
    """A value's own place, or that of the list around it; a key that nobody wrote is a default."""
    if path in origins.places:
        return str(origins.places[path])
    return _origin(origins, path[:-1]) if path and isinstance(path[-1], int) else DEFAULT


def _lines(data: Mapping[str, Any], path: KeyPath, indent: str) -> Iterator[tuple[KeyPath, str]]:
    """(path, line) of a section; the path is empty for lines that only open something."""
    for key, value in data.items():
        at, name = (*path, key), f"{indent}{inline(key)}:"
        if isinstance(value, Mapping) and value:
            yield (), name
            yield from _lines(value, at, indent + "  ")
        elif isinstance(value, list) and any(isinstance(item, Mapping) and item for item in value):
            yield (), name
            for index, item in enumerate(value):
                yield from _item(item, (*at, index), indent + "  ")
        else:
            yield at, f"{name} {inline(value)}"


def _item(item: Any, path: KeyPath, indent: str) -> Iterator[tuple[KeyPath, str]]:
    if not (isinstance(item, Mapping) and item):
        yield path, f"{indent}- {inline(item)}"
        return
    for number, (at, line) in enumerate(_lines(item, path, indent + "  ")):
        yield at, f"{indent}- {line[len(indent) + 2 :]}" if number == 0 else line


def inline(value: Any) -> str:
    """A value on one line of YAML."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


# ---- Differences --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One key in which two configs differ; ABSENT where one does not have it."""

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path}: {_word(self.old)} -> {_word(self.new)}"


def _word(value: Any) -> str:
    return ABSENT if value == ABSENT else inline(value)


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The differences of two resolved configs, in the order of the old one; lists of equal length item by item."""
    return list(_changes(old, new, ""))


def _changes(old: Any, new: Any, path: str) -> Iterator[Change]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _changes(old.get(key, ABSENT), new.get(key, ABSENT), f"{path}.{key}" if path else str(key))
    elif isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _changes(before, after, f"{path}.{index}")
    elif old != new:
        yield Change(path, old, new)
