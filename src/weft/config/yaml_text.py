"""YAML text to plain data in which every value remembers its place, by the scalar rules of YAML 1.2."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from weft.errors import ConfigError

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, order=True)
class Place:
    """Where a value was written. line and column count from 1; line 0 is a place without lines."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Document:
    """Plain data, and the place of every key and list item by its path; the empty path is the whole."""

    data: Any
    places: Mapping[KeyPath, Place] = field(default_factory=dict)


# PyYAML follows YAML 1.1: there `off` is a boolean, 1e-4 is text and 1:30 is ninety. We read 1.2's core schema,
# and underscores between digits.
SCALARS = {
    "tag:yaml.org,2002:null": re.compile(r"(?:~|null|Null|NULL|)$"),
    "tag:yaml.org,2002:bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"),
    "tag:yaml.org,2002:int": re.compile(r"(?:[-+]?(?:0|[1-9](?:_?\d)*)|0x[0-9a-fA-F]+|0o[0-7]+)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"(?:[-+]?(?:\d(?:_?\d)*\.(?:\d(?:_?\d)*)?|\.\d(?:_?\d)*)(?:[eE][-+]?\d+)?"
        r"|[-+]?\d(?:_?\d)*[eE][-+]?\d+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    "tag:yaml.org,2002:merge": re.compile(r"<<$"),
}
TEXT = "tag:yaml.org,2002:str"


class Loader(yaml.SafeLoader):
    """PyYAML's parser with our scalar rules."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern in SCALARS.items():
    Loader.add_implicit_resolver(_tag, _pattern, None)


def read_yaml(text: str, name: str) -> Document:
    """Plain data with places. Raises ConfigError at the first thing that is not YAML, and at doubled keys."""
    try:
        node = yaml.compose(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ConfigError(_sentence(error, text, name)) from None
    if node is None:
        return Document({}, {(): Place(name, 1, 1)})
    reader = _Reader(name)
    data = reader.value(node, ())
    if reader.problems:
        raise ConfigError(*reader.problems)
    return Document(data, {(): _place(name, node.start_mark), **reader.places})


def read_scalar(text: str) -> Any:
    """What an unquoted scalar means: `1e-4` a number, `off` text."""
    for tag, pattern in SCALARS.items():
        if pattern.match(text):
            return _scalar(tag, text)
    return text


def _scalar(tag: str, text: str) -> Any:
    kind, plain = tag.rpartition(":")[2], text.replace("_", "")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(plain, 0)
    if kind == "float":
        return float(re.sub(r"\.(?=inf|nan)", "", plain.lower()))
    return text


class _Reader:
    """One walk over a composed document."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.places: dict[KeyPath, Place] = {}
        self.problems: list[str] = []
        self._open: list[yaml.Node] = []  # nodes around the current one: an alias to one of them has no end

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        if any(node is outer for outer in self._open):
            self._refuse(node.start_mark, "this alias stands inside its own anchor. Write the value out.")
            return None
        self._open.append(node)
        try:
            return self._value(node, path)
        finally:
            self._open.pop()

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.places[(*path, index)] = _place(self.file, item.start_mark)
                items.append(self.value(item, (*path, index)))
            return items
        assert isinstance(node, yaml.ScalarNode)
        if node.tag in (TEXT, "!", "tag:yaml.org,2002:merge"):
            return node.value
        pattern = SCALARS.get(node.tag)
        if pattern is None or not pattern.match(node.value):
            self._refuse(node.start_mark, f"'{node.value}' cannot be read as '{node.tag}'. Take the tag out.")
            return None
        return _scalar(node.tag, node.value)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        first: dict[str, yaml.Mark] = {}
        for key, value in self._pairs(node):
            if key.tag == "tag:yaml.org,2002:merge":
                for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    found = self.value(part, path)
                    if isinstance(found, dict):
                        merged = found | merged  # of several merged mappings the first wins, as in YAML 1.1
                    else:
                        self._refuse(part.start_mark, "'<<' takes keys from another section, and this is none.")
                continue
            if key.value in first:
                at = _place(self.file, first[key.value])
                self._refuse(key.start_mark, f"the key '{key.value}' is given twice, first at {at}. Keep one.")
                continue
            first[key.value] = key.start_mark
            if key.value in merged:
                self._forget((*path, key.value))
            self.places[(*path, key.value)] = _place(self.file, key.start_mark)
            own[key.value] = self.value(value, (*path, key.value))
        return {**merged, **own}

    def _pairs(self, node: yaml.MappingNode) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        """Key and value nodes, merge keys first, so that own keys overwrite their places."""
        scalars = []
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                scalars.append((key, value))
            else:
                self._refuse(key.start_mark, "a key must be a plain word, and this is a list or a section.")
        yield from sorted(scalars, key=lambda pair: pair[0].tag != "tag:yaml.org,2002:merge")

    def _forget(self, path: KeyPath) -> None:
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]

    def _refuse(self, mark: yaml.Mark, sentence: str) -> None:
        self.problems.append(f"{_place(self.file, mark)}: {sentence}")


def _place(file: str, mark: yaml.Mark) -> Place:
    return Place(file, mark.line + 1, mark.column + 1)


# What PyYAML says (a piece of it) -> what it means to somebody who writes a config.
_MEANINGS = {
    "found character '\\t'": "a tab stands here, and YAML is indented with spaces. Replace it with spaces.",
    "found unknown escape character": "in double quotes a backslash begins an escape. Write the text in single "
    "quotes, or the path with forward slashes.",
    "mapping values are not allowed": "a second ':' in one value, or a line that is indented too far. Quote a text "
    "that holds ': ', and align keys of one section.",
    "could not find expected ':'": "this key has no ':' behind it. Write 'key: value'.",
    "but found another document": "a second document begins with '---' here. A config is one document.",
    "found undefined alias": "a value that begins with '*' is an alias, and no such anchor was given. Quote it.",
    "found unexpected end of stream": "a quote is opened and never closed.",
    "found character '%'": "a value cannot begin with '%'. Quote it.",
    "found character '@'": "a value cannot begin with '@'. Quote it.",
    "found character '`'": "a value cannot begin with '`'. Quote it.",
    "expected ',' or ']'": "this list is not closed: expected ',' or ']'.",
    "expected ',' or '}'": "this section is not closed: expected ',' or '}'.",
    "expected <block end>": "this line does not align with the lines above. Align keys of one section.",
    "found duplicate anchor": "this anchor is given twice. Give it another name.",
}


def _sentence(error: yaml.YAMLError, text: str, name: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        place = Place(name, before.count("\n") + 1, len(before) - before.rfind("\n"))
        return f"{place}: the character {chr(int(error.character))!a} cannot stand in YAML. Take it out."
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{name}: not YAML: {error}."
    mark = error.problem_mark or error.context_mark
    place = _place(name, mark) if mark else Place(name)
    problem = error.problem or str(error)
    if "\t" in _indentation(text, mark):
        problem = "found character '\\t'"
    meaning = next((meaning for piece, meaning in _MEANINGS.items() if piece in problem), None)
    return f"{place}: {meaning or f'not YAML: {problem}.'}"


def _indentation(text: str, mark: yaml.Mark | None) -> str:
    lines = text.splitlines()
    if mark is None or mark.line >= len(lines):
        return ""
    line = lines[mark.line]
    return line[: len(line) - len(line.lstrip())]
