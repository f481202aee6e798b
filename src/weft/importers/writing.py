"""A draft as text: a commented run.yaml in the order of our sections, and the list of what became of each setting."""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from weft.config.show import inline, show
from weft.config.source import Source, read_text
from weft.config.yaml_text import KeyPath, Place
from weft.errors import ConfigError
from weft.importers.draft import Draft, Note
from weft.run.config import RunConfig, parse_config

LONGEST_COMMENT = 60  # characters of a note that still stands behind its key; all notes stand at the end
WIDTH = 116
MARK = "<-- FILL IN"  # behind the place of a value that nothing of theirs says
FILL_IN = "FILL-IN"  # how the place of a value begins that nothing of theirs says


def written(draft: Draft, schema: str | None = None) -> str:
    """The run.yaml. schema: where editors find its schema. Raises ConfigError when what was read makes no valid run."""
    config = _ordered(draft.config())
    head = [f"# From {draft.program}, by weft import. Every key and its meaning: weft config explain"]
    if schema:
        head.insert(0, f"# yaml-language-server: $schema={schema}")
    comments = _comments(draft, config)
    parts = ["\n".join(head) + "\n"]
    for key, value in config.items():
        parts.append(show({key: value}, Source(config, comments, "")))
    tail = "".join(f"# {line}".rstrip() + "\n" for line in story(draft))
    text = _spaced(parts) + "\n" + tail
    checked(text)
    return text


def checked(text: str) -> RunConfig:
    """The run that a text describes. Raises ConfigError with all problems, each with its line in the text."""
    try:
        return parse_config(read_text(text, "run.yaml"))
    except ConfigError as error:
        raise ConfigError(
            "what was read makes no valid run. The lines below count in the run.yaml that would have been written; "
            "mend their file where these values come from.",
            *error.problems,
        ) from None


def story(draft: Draft) -> list[str]:
    """What became of each setting, as lines of text."""
    lines: list[str] = []
    for title, kind in (
        ("Fill in", "ask"),
        ("Look at", "warn"),
        ("Their key -> ours", "set"),
        ("Chosen because theirs imply it", "assume"),
        ("Without an equivalent", "drop"),
        ("Read, and as it is here anyway, or a part of what is told above", "same"),
    ):
        notes = [note for note in draft.notes if note.kind == kind]
        if notes:
            lines += ["", f"{title}:", *(line for sentence in _sentences(notes) for line in _wrapped(sentence))]
    return lines[1:]


def _sentences(notes: Sequence[Note]) -> Iterator[str]:
    """One for each note; those of which the same is told stand in one, where the first of them is."""
    alike: dict[tuple[str, str], list[Note]] = {}
    for number, note in enumerate(notes):
        together = note.kind in ("drop", "same")
        alike.setdefault((note.text, "" if together else str(number)), []).append(note)
    for (text, _), group in alike.items():
        if group[0].kind in ("drop", "same"):
            names = ", ".join(f"{note.of} {_short(note.theirs)}".rstrip() for note in group)
            yield f"{names}: {text}" if text else names
        else:
            yield _sentence(group[0])


def _wrapped(sentence: str) -> list[str]:
    return textwrap.wrap(
        sentence, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def _sentence(note: Note) -> str:
    text = f": {note.text}" if note.text else ""
    if note.kind == "set":
        ours = "" if _same(note.theirs, note.ours) else f" {_short(note.ours)}"
        return f"{note.of} {_short(note.theirs)} -> {note.key}{ours}{text}"
    if note.kind == "warn":
        return note.text
    return f"{note.key} {_short(note.ours)}{text}"


def _same(theirs: Any, ours: Any) -> bool:
    return str(theirs) == str(ours)


def _short(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = re.sub(r"\s+", " ", value if isinstance(value, str) else inline(value))
    return text if len(text) <= 60 else text[:59] + "…"


# ---- The YAML -------------------------------------------------------------------------------------------------------


def _ordered(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sections in the order of a run's; keys that no run has stand last, and are refused when it is checked."""
    known = [key for key in RunConfig.model_fields if key in config]
    ordered = {key: config[key] for key in [*known, *(key for key in config if key not in known)]}
    return {key: _kind_first(value) for key, value in ordered.items()}


def _kind_first(value: Any) -> Any:
    if isinstance(value, dict):
        kind = {"kind": value["kind"]} if "kind" in value else {}
        return {**kind, **{key: _kind_first(item) for key, item in value.items() if key != "kind"}}
    return [_kind_first(item) for item in value] if isinstance(value, list) else value


def _comments(draft: Draft, config: Mapping[str, Any]) -> dict[KeyPath, Place]:
    """What stands behind each key of the YAML, in the form in which `show` takes origins."""
    found: dict[KeyPath, Place] = {}
    for path in _leaves(config, ()):
        note, depth = None, len(path)
        while note is None and depth:
            note = draft.note_of(".".join(map(str, path[:depth])))
            depth -= 1
        found[path] = Place(_comment(note) if note else "")
    return found


def _leaves(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path


def _comment(note: Note) -> str:
    if note.kind == "ask":
        text = note.text if len(note.text) <= LONGEST_COMMENT else note.text.partition(":")[0]
        return f"{MARK}: {text}"
    if note.kind == "assume":
        return note.text if len(note.text) <= LONGEST_COMMENT else "see below"
    theirs = "" if _same(note.theirs, note.ours) else f" {_short(note.theirs)}"
    said = f"{note.of}{theirs}"
    return f"{said}: {note.text}" if note.text and len(note.text) + len(said) <= LONGEST_COMMENT else said


def _spaced(parts: list[str]) -> str:
    """A blank line around each section of several lines."""
    text = parts[0]
    for before, part in pairwise(parts):
        alone = part.count("\n") == 1 and before.count("\n") == 1 and before is not parts[0]
        text += part if alone else "\n" + part
    return "".join(f"{line.rstrip().removesuffix('  #').rstrip()}\n" for line in text.splitlines())
