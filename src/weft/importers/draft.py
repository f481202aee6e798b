"""What an importer makes: a config of ours, key by key, with the story of each of their settings beside it."""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from weft.config.yaml_text import KeyPath

SECRET = re.compile(r"(?i).*(api_?key|(hub|huggingface|hf|access|wandb|auth)_token|password|secret)")
HIDDEN = "(not shown)"

FileKind = Literal["toml", "yaml", "json", "shell", "args"]


@dataclass(frozen=True)
class ReadFile:
    """One file of theirs, parsed and never executed.

    content: plain data of a toml, yaml or json; of a shell script or a bare list of arguments a
    weft.importers.shell_words.Script. lines: path of a key -> line number from 1, as far as the parser tells.
    """

    path: Path
    text: str
    kind: FileKind
    content: Any
    lines: Mapping[KeyPath, int] = field(default_factory=dict)

    def place(self, *keys: str | int) -> str:
        """`file:line` of a key, or of the nearest table around it; the file alone where no line is known."""
        path: KeyPath = keys
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.path}:{self.lines[path]}" if path in self.lines else str(self.path)


class Importer(Protocol):
    """Reads the files of one program."""

    name: str  # as people call the program

    def recognises(self, file: ReadFile) -> float | bool:
        """How surely the file is this program's, from 0 (not) to 1 (nothing else looks like this)."""
        ...

    def read(self, files: Sequence[ReadFile], draft: "Draft") -> None:
        """Put into the draft what the files say. Raises ConfigError with `file:line` for what cannot be read."""
        ...


@dataclass(frozen=True)
class Note:
    """The story of one setting. of, theirs: their key and its value; key, ours: our key and its value."""

    kind: Literal["set", "drop", "same", "assume", "ask", "warn"]
    text: str = ""
    of: str = ""
    theirs: Any = None
    key: str = ""
    ours: Any = None


class Draft:
    """A config of ours that grows key by key. Keys are dotted; a number is a place in a list: data.sources.0.path."""

    def __init__(self, program: str, model: str | None = None) -> None:
        """model: the source of the model that the user named, which goes before any of theirs."""
        self.program = program
        self.model = model
        self.notes: list[Note] = []
        self._values: dict[str, Any] = {}

    def set(self, key: str, value: Any, of: str, note: str = "", theirs: Any = None) -> None:
        """Ours from theirs. of: their key. note: what changes in meaning. theirs: their value, where it is another."""
        self._values[key] = value
        self.notes.append(Note("set", note, of, value if theirs is None else theirs, key, value))

    def drop(self, of: str, value: Any, why: str) -> None:
        """A setting of theirs without an equivalent; why, and what Weft does instead."""
        self.notes.append(Note("drop", why, of, HIDDEN if SECRET.fullmatch(of) else value))

    def same(self, of: str, value: Any) -> None:
        """A setting that was read and asks for nothing beside what has been told."""
        self.notes.append(Note("same", of=of, theirs=HIDDEN if SECRET.fullmatch(of) else value))

    def warn(self, text: str) -> None:
        """A value that looks like a mistake, or a difference that changes the result."""
        self.notes.append(Note("warn", text))

    def assume(self, key: str, value: Any, why: str) -> None:
        """A value of ours that theirs implies, such as a default of theirs that differs from ours."""
        self._values[key] = value
        self.notes.append(Note("assume", why, key=key, ours=value))

    def ask(self, key: str, placeholder: Any, what: str) -> None:
        """A value that nothing of theirs says: the user fills it in, and the file marks it."""
        self._values[key] = placeholder
        self.notes.append(Note("ask", what, key=key, ours=placeholder))

    def get(self, key: str, default: Any = None) -> Any:
        """What was put at a key."""
        return self._values.get(key, default)

    def has(self, key: str) -> bool:
        """Whether the key, or one below it, was put."""
        return any(known == key or known.startswith(f"{key}.") for known in self._values)

    def words(self) -> frozenset[str]:
        """All words of what has been told, names of keys among them."""
        texts = (f"{note.of} {note.text}" for note in self.notes)
        return frozenset(word.strip(".,:") for text in texts for word in re.findall(r"[\w.:-]+", text))

    def note_of(self, key: str) -> Note | None:
        """The last note about a key of ours."""
        return next((note for note in reversed(self.notes) if note.key == key), None)

    def config(self) -> dict[str, Any]:
        """All keys as nested plain data."""
        nested: dict[str, Any] = {}
        for key, value in self._values.items():
            _put(nested, key.split("."), deepcopy(value))
        return nested


def _put(inside: Any, steps: Sequence[str], value: Any) -> None:
    """Write a value at a path of names and list places, making what lies between."""
    head, *rest = steps
    if isinstance(inside, list):
        assert head.isdecimal() and int(head) <= len(inside), "a list grows at its end"
        if int(head) == len(inside):
            inside.append(None)
        place: Any = int(head)
    else:
        place = head
        inside.setdefault(place, None)
    if not rest:
        old = inside[place]
        both = isinstance(old, dict) and isinstance(value, Mapping)
        inside[place] = {**old, **value} if both else value
        return
    if inside[place] is None:
        inside[place] = [] if rest[0].isdecimal() else {}
    _put(inside[place], rest, value)
