"""A command line of theirs as settings: flags with none, one or many values, as their argparse takes them."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from weft.errors import ConfigError
from weft.importers.shell_words import Word
from weft.importers.values import Given, Theirs

Arity = Literal["flag", "one", "many"]
IS_FLAG = re.compile(r"--?[A-Za-z][\w.-]*(?:=.*)?", re.DOTALL)


def settings(words: Sequence[Word], arity: Mapping[str, Arity], program: str, path: object) -> Theirs:
    """Flags as settings without their dashes. A flag that stands twice counts with its last value, as in argparse.

    Raises ConfigError for a flag without its value, and for a value that belongs to no flag.
    """
    given: dict[str, Given] = {}
    at = 0
    while at < len(words):
        word = words[at]
        if not IS_FLAG.fullmatch(word.text):
            if word.unknown in ("$@", "$*"):  # what is typed behind the script
                at += 1
                continue
            raise ConfigError(
                f"{path}:{word.line}: '{word.text}' stands behind no flag that takes it. {_before(words, at)}"
            )
        name, equals, behind = word.text.lstrip("-").partition("=")
        name = _whole_name(name.replace("-", "_"), arity)
        values = [Word(behind, word.line, word.unknown)] if equals else []
        at += 1
        while not equals and at < len(words) and _takes(arity.get(name), len(values), words[at]):
            values.append(words[at])
            at += 1
        given[name] = _given(name, values, arity.get(name), f"{path}:{word.line}", program)
    return Theirs(given, program)


def _before(words: Sequence[Word], at: int) -> str:
    flag = next((word.text for word in reversed(words[:at]) if IS_FLAG.fullmatch(word.text)), None)
    return f"The flag before it is {flag}." if flag else "Quote it if it belongs to a value."


def _whole_name(name: str, arity: Mapping[str, Arity]) -> str:
    """argparse takes the beginning of a name for the name, where there is but one such."""
    if name in arity:
        return name
    fitting = [known for known in arity if known.startswith(name)]
    return fitting[0] if len(fitting) == 1 else name


def _takes(arity: Arity | None, count: int, word: Word) -> bool:
    if IS_FLAG.fullmatch(word.text):
        return False
    # A flag that nobody knows may have values: they are told of together.
    return arity in ("many", None) or (arity == "one" and count == 0)


def _given(name: str, values: Sequence[Word], arity: Arity | None, place: str, program: str) -> Given:
    unknown = next((word.unknown for word in values if word.unknown), "")
    texts = [word.text for word in values]
    if arity == "many":
        return Given(texts, place, unknown)
    if not texts:
        if arity == "one":
            raise ConfigError(f"{place}: {program}'s --{name} takes a value, and none stands behind it.")
        return Given(True, place)
    return Given(texts[0] if len(texts) == 1 else texts, place, unknown)
