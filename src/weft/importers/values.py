"""The settings of another trainer, read one by one with their types, so that none is overlooked."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from weft.errors import ConfigError, did_you_mean
from weft.importers.draft import Draft, ReadFile

YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0", "none", "")


@dataclass(frozen=True)
class Given:
    """A value of theirs and its `file:line`. unknown: what in it only a running shell could say."""

    value: Any
    place: str
    unknown: str = ""


def _number(value: Any) -> float:
    return int(value) if str(value).lstrip("+-").isdecimal() else float(value)


class Theirs:
    """Settings by name. What is read counts as told of; `left` are the others."""

    def __init__(self, given: Mapping[str, Given], program: str) -> None:
        self.given, self.program = dict(given), program
        self._taken: set[str] = set()

    @classmethod
    def of_table(cls, file: ReadFile, program: str, *table: str | int) -> "Theirs":
        """Those of one table of a toml, yaml or json file."""
        content = file.content
        for step in table:
            content = content[step]
        given = {str(key): Given(value, file.place(*table, key)) for key, value in content.items()}
        return cls(given, program)

    def __contains__(self, key: str) -> bool:
        return key in self.given

    @property
    def left(self) -> list[str]:
        """Keys that nobody has asked for, in their order."""
        return [key for key in self.given if key not in self._taken]

    @property
    def asked(self) -> frozenset[str]:
        """Keys that were asked for, also those that are not there: what the program knows."""
        return frozenset(self._taken)

    def place(self, key: str) -> str:
        return self.given[key].place

    def take(self, key: str, default: Any = None) -> Any:
        """A value as it stands. Raises ConfigError when only a running shell could say it."""
        self._taken.add(key)
        if key not in self.given:
            return default
        given = self.given[key]
        if given.unknown:
            command = given.unknown.startswith(("$(", "`"))
            why = "is a command's output" if command else "has no plain value in this file"
            raise ConfigError(
                f"{given.place}: '{key}' is '{given.value}', and {given.unknown} {why}; nothing that is read here is "
                "run. Write the value itself there."
            )
        return given.value

    def refused(self, key: str, expected: str) -> ConfigError:
        """What to raise for a value that cannot be."""
        given = self.given[key]
        return ConfigError(f"{given.place}: {self.program}'s '{key}' is {given.value!r}. Expected was {expected}.")

    def number(self, key: str, default: float | None = None) -> float | None:
        """A number, also one that stands as text; None for the words none and null."""
        value = self.take(key, default)
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return default
        if isinstance(value, bool):
            raise self.refused(key, "a number")
        try:
            found = value if isinstance(value, (int, float)) else _number(value)
        except (TypeError, ValueError):
            raise self.refused(key, "a number") from None
        if not isfinite(found):
            raise self.refused(key, "a number that is finite")
        return found

    def whole(self, key: str, default: int | None = None) -> int | None:
        """A whole number."""
        value = self.number(key, default)
        if value is None:
            return None
        if not float(value).is_integer():  # nor nan and inf
            raise self.refused(key, "a whole number")
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false, also in the words that YAML 1.1 takes for them."""
        value = self.take(key, default)
        if isinstance(value, bool):
            return value
        word = str(value).lower()
        if word not in (*YES, *NO):
            raise self.refused(key, "true or false")
        return word in YES

    def text(self, key: str, default: str | None = None) -> str | None:
        """One text; None when it is empty."""
        value = self.take(key, default)
        if value is None or value == "":
            return None
        if isinstance(value, (list, dict)):
            raise self.refused(key, "one text")
        return str(value)

    def choice(self, key: str, choices: Sequence[str], default: str) -> str:
        """One of a program's words. Raises ConfigError with the nearest."""
        value = self.text(key) or default
        if value not in choices:
            raise ConfigError(
                f"{self.place(key)}: {self.program}'s '{key}' is '{value}'. {did_you_mean(value, list(choices))}"
            )
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts; a single one counts as a list of one."""
        value = self.take(key)
        if value is None:
            return []
        return [str(item) for item in value] if isinstance(value, list) else [str(value)]

    def numbers(self, key: str) -> list[float]:
        """A list of numbers; a single one counts as a list of one."""
        found = []
        for text in self.texts(key):
            try:
                found.append(float(text))
            except ValueError:
                raise self.refused(key, "numbers") from None
        if not all(map(isfinite, found)):
            raise self.refused(key, "numbers that are finite")
        return found


# ---- Tables ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Same:
    """A setting of theirs that is one of ours. note: what differs all the same."""

    of: str
    key: str
    type: Literal["number", "whole", "flag", "text", "texts"]
    note: str = ""


def carry(theirs: Theirs, draft: Draft, same: Iterable[Same]) -> None:
    """Put every setting of a table that is there and not empty."""
    for one in same:
        if one.of not in theirs:
            theirs.take(one.of)  # so that the name counts as known
            continue
        reader: Callable[[str], Any] = getattr(theirs, one.type)
        value = reader(one.of)
        if value is not None:
            draft.set(one.key, value, of=one.of, note=one.note)


def drop_left(theirs: Theirs, draft: Draft, reasons: Mapping[str, str], known: Collection[str]) -> None:
    """Report all that is left: with its reason, as known but without an equivalent, or as no key of their program.

    What was asked for, and of which nothing has been told so far, is told too, so that no setting goes without a word.
    """
    left = set(theirs.left)
    told = draft.words()
    for key, given in theirs.given.items():
        within = any(word.startswith(f"{key}.") for word in told)  # its parts were told of
        if key not in left and not within and not {key, key.rpartition(".")[2]} & told:
            draft.same(key, given.value)
    for key in theirs.left:
        value = theirs.given[key].value
        if key in reasons:
            draft.drop(key, value, reasons[key])
        elif key in known:
            draft.drop(key, value, "Weft has no such setting.")
        else:
            near = did_you_mean(key, sorted({*known, *reasons}))
            draft.drop(key, value, f"{theirs.program} has no such key. {near}")
            draft.warn(f"{theirs.place(key)}: '{key}' is no key of {theirs.program}, which may leave it out. {near}")
