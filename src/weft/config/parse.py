"""Plain data to a config section, and every error of pydantic to one sentence that begins with its place."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from weft.config.meanings import meaning
from weft.config.peers import NOT_BUILT, PEERS
from weft.config.source import COMMAND_LINE, Source
from weft.config.tree import (
    Key,
    Spot,
    allows_none,
    bare,
    chosen,
    every_key,
    field_type,
    is_fixed,
    item_type,
    kind_of,
    locate,
    members,
    sections,
    value_at,
    walk,
)
from weft.config.words import choices, described, example, shown
from weft.config.yaml_text import KeyPath
from weft.errors import ConfigError, did_you_mean, nearest

Model = TypeVar("Model", bound=BaseModel)

CLEAR = 0.75  # likeness from which on a name is surely what was meant; two letters swapped in four have it
EMPTY = "this section is empty. Indent its keys below it, or take the line out."


def parse(model: type[Model], source: Source) -> Model:
    """The section that the source describes. Raises ConfigError with every problem, sorted by place."""
    try:
        parsed = model.model_validate(source.data)
        errors: list[Any] = []
    except ValidationError as refused:
        parsed, errors = None, refused.errors(include_url=False)
    problems = _by_path(_Translator(model, source).problems(errors))
    if problems:
        # What the command line says stands last, for it was typed last.
        order = sorted(problems, key=lambda p: (source.place(p.path).file == COMMAND_LINE, source.place(p.path)))
        raise ConfigError(*(f"{source.place(problem.path)}: {problem.sentence}" for problem in order))
    assert parsed is not None
    return parsed


@dataclass(frozen=True)
class Problem:
    """path: of the key that is at fault; the nearest place around it is shown."""

    path: KeyPath
    sentence: str


def _by_path(problems: Iterator[Problem]) -> list[Problem]:
    """Without the second sentence about the same key: it is the same mistake seen by another rule."""
    seen: dict[tuple[KeyPath, str], Problem] = {}
    for problem in problems:
        seen.setdefault((problem.path, problem.sentence.partition(":")[0]), problem)
    return list(seen.values())


def dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()


class _Translator:
    """Turns errors about one source into problems."""

    def __init__(self, model: type[BaseModel], source: Source) -> None:
        self.model, self.data, self.places = model, source.data, source.places

    def problems(self, errors: list[Any]) -> Iterator[Problem]:
        spots = [(error, locate(self.model, error["loc"])) for error in errors]
        # Pydantic leaves faulty items out and then finds the list too short as well.
        faulty = {error["loc"][:depth] for error, _ in spots for depth in range(len(error["loc"]))}
        spots = [(error, spot) for error, spot in spots if error["type"] != "too_short" or error["loc"] not in faulty]
        spots = [(error, spot) for error, spot in spots if not self._is_misspelt(error, spot, spots)]
        answered: set[KeyPath] = set()
        for error, spot in spots:
            if spot.choice is None:
                yield self._problem(error, spot)
            elif self._is_inside(spot):
                yield self._problem(error, spot)
                answered.add(spot.choice)
        for _, spot in spots:
            if spot.choice is not None and spot.choice not in answered:
                answered.add(spot.choice)
                yield self._mismatch(spot.choice, spot.choice_type, value_at(self.data, spot.choice))
        yield from self._false_booleans()

    def _is_misspelt(self, error: Any, spot: Spot, spots: list[tuple[Any, Spot]]) -> bool:
        """Whether a missing key is there under a name so near that the unknown key's sentence says enough."""
        around = [s.path for e, s in spots if e["type"] == "extra_forbidden" and s.path[:-1] == spot.path[:-1]]
        return error["type"] == "missing" and any(
            likeness(str(path[-1]), str(spot.path[-1])) >= CLEAR for path in around
        )

    def _is_inside(self, spot: Spot) -> bool:
        """Whether an error in one branch of a union is about a part of the value, so that the branch was meant."""
        assert spot.choice is not None
        return len(spot.path) > len(spot.choice) and value_at(self.data, spot.choice) not in (None, [], {})

    def _problem(self, error: Any, spot: Spot) -> Problem:
        kind, value = error["type"], error["input"]
        if kind == "extra_forbidden":
            return Problem(spot.path, f"{dotted(spot.path)}: {self._unknown(spot)}")
        if kind == "missing":
            return self._missing(spot)
        if kind in ("union_tag_invalid", "union_tag_not_found"):
            return self._no_kind(spot, value)
        if kind in ("value_error", "assertion_error"):
            return self._own_words(spot, str(error["ctx"]["error"]))
        if spot.type is None:
            return Problem(spot.path, f"{dotted(spot.path)}: {error['msg']}.")
        if kind == "string_pattern_mismatch" and (words := meaning(spot.section, str(spot.path[-1]))):
            expected = f"expected {described(spot.type)} ({words}), got {shown(value)}."
            return Problem(spot.path, f"{dotted(spot.path)}: {expected}")
        return self._mismatch(spot.path, spot.type, value)

    # ---- Keys -----------------------------------------------------------------------------------------------------

    def _unknown(self, spot: Spot) -> str:
        name, names = str(spot.path[-1]), [*spot.section.model_fields]
        keys = list(every_key(self.model))
        peer = PEERS.get(name.lower().replace("-", "_"))
        if peer and any(key.dotted == peer.ours for key in keys):
            return f"unknown key. This is {peer.who} name of {peer.ours}.{' ' + peer.note if peer.note else ''}"
        near = nearest(name, names)
        if near and likeness(name, near[0]) >= CLEAR:
            return f"unknown key. Did you mean '{near[0]}'?"
        if homes := [key for key in keys if key.path[-1] == name]:
            return "unknown key. " + self._belongs(homes, spot)
        if near:
            return f"unknown key. Did you mean '{near[0]}'?"
        if far := nearest(name, [key.path[-1] for key in keys]):
            places = [key.dotted for key in keys if key.path[-1] == far[0]]
            if likeness(name, far[0]) >= CLEAR:
                return f"unknown key. Did you mean '{places[0]}'?"
        return f"unknown key. There {'are' if len(names) != 1 else 'is'}: {', '.join(names)}."

    def _belongs(self, homes: list[Key], spot: Spot) -> str:
        here = tuple("0" if isinstance(step, int) else step for step in spot.path)
        same = [home for home in homes if home.path == here]
        if same:  # the right place, but another kind of the choice
            if kind_of(spot.section) is None:  # of a choice further out
                names = ", ".join(spot.section.model_fields)
                return f"It goes with another kind of {here[0]}. Here there are: {names}."
            kinds = " and ".join(f"'{kind_of(home.section)}'" for home in same)
            named = [name for name in spot.section.model_fields if str(here[-1]) in name.split("_")]
            own = f" Here there {'is' if len(named) == 1 else 'are'}: {', '.join(named)}." if named else ""
            return f"It belongs to kind {kinds}, and this is kind '{kind_of(spot.section)}'.{own}"
        places = list(dict.fromkeys(home.dotted for home in homes))
        return f"Write it as {' or '.join(places[:3])}."

    def _missing(self, spot: Spot) -> Problem:
        if spot.path and isinstance(spot.path[-1], int):  # a list of fixed length that is too short
            around = spot.path[:-1]
            owner = locate(self.model, around)
            return self._mismatch(around, owner.type, value_at(self.data, around))
        name, inside = spot.path[-1], dotted(spot.path[:-1])
        field = spot.section.model_fields[str(name)]
        where = f"Write it under '{inside}'" if inside else "Write it at the left margin"
        line = f"{name}: {example(field_type(field))}"
        words = meaning(spot.section, str(name))
        tail = f" ({words})" if words else ""
        return Problem(spot.path, f"{dotted(spot.path)}: this key is missing. {where}, such as '{line}'{tail}.")

    def _no_kind(self, spot: Spot, value: Any) -> Problem:
        path, kinds = (*spot.path, "kind"), [str(kind_of(section)) for section in sections(spot.type)]
        where = dotted(path)
        given = value.get("kind") if isinstance(value, Mapping) else None
        listed = f"There are: {', '.join(kinds)}."
        if given is None:
            return Problem(path, f"{where}: this key is missing. Write, for example, 'kind: {kinds[0]}'. {listed}")
        if reason := NOT_BUILT.get(str(given)):
            return Problem(path, f"{where}: there is no {shown(given)}: {reason}. {listed}")
        near = nearest(str(given), kinds)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        return Problem(path, f"{where}: there is no {shown(given)}. {hint}{listed}")

    def _own_words(self, spot: Spot, words: str) -> Problem:
        """A section's own sentence. When it begins with the name of a key, that key's place is shown."""
        words = words.strip().rstrip(".") + ("" if words.rstrip().endswith("?") else ".")
        named = words.split(":")[0].split(" ")[0].rstrip(".,")
        key: KeyPath = tuple(int(step) if step.isdecimal() else step for step in named.split("."))
        path = spot.path
        if key[: len(path)] == path and (path or key[0] in self.model.model_fields):
            return Problem(key, words)
        inside = [section for section in sections(spot.type) if named in section.model_fields]
        return Problem((*path, named) if inside else path, f"{dotted(path)}: {words}" if path else words)

    # ---- Values ---------------------------------------------------------------------------------------------------

    def _mismatch(self, path: KeyPath, kind: Any, value: Any) -> Problem:
        where = f"{dotted(path)}: " if path else ""
        return Problem(path, where + self._expected(kind, value, str(path[-1]) if path else ""))

    def _expected(self, kind: Any, value: Any, key: str) -> str:
        found, options = sections(kind), members(kind)
        if value is None and found:
            return EMPTY
        if found and not isinstance(value, Mapping):
            return self._no_section(kind, value)
        names = [str(name) for option in options for name in choices(bare(option))]
        if names and isinstance(value, str) and (len(options) == 1 or nearest(value, names)):
            listed = f" There are: {', '.join(names)}." if nearest(value, names) and len(names) > 1 else ""
            return f"{shown(value, key)} is no choice. {did_you_mean(value, names)}{listed}"
        return f"expected {described(kind)}, got {shown(value, key)}.{_advice(kind, value)}"

    def _no_section(self, kind: Any, value: Any) -> str:
        named = [kind_of(section) for section in sections(kind) if kind_of(section) == value]
        advice = f" Write {{kind: {named[0]}}}." if named else ""
        keys = [name for section in sections(kind) for name in section.model_fields]
        listed = ", ".join(list(dict.fromkeys(keys))[:6])
        return f"expected a section with keys ({listed}, ...), got {shown(value)}.{advice}"

    def _false_booleans(self) -> Iterator[Problem]:
        """What pydantic would take for a boolean or a number, and a reader of the file would not."""
        for path, kind, value in walk(self.model, self.data):
            plain = {bare(member) for member in members(kind)}
            words = [word for each in plain if get_origin(each) is Literal for word in get_args(each)]
            no_truth = bool in plain and str not in plain and not isinstance(value, (bool, type(None)))
            no_truth = no_truth and not (isinstance(value, str) and value in words)
            no_number = isinstance(value, bool) and bool(plain) and plain <= {int, float}
            if no_truth or no_number:
                yield self._mismatch(path, kind, value)


_TRUE, _FALSE = ("yes", "on", "y", "1"), ("no", "off", "n", "0")


def _advice(kind: Any, value: Any) -> str:
    plain = {bare(member) for member in members(kind)}
    if value is None and not allows_none(kind):
        return " Give it a value, or take the line out for the default."
    if bool in plain:
        word = str(value).lower()
        return " Write true." if word in _TRUE else " Write false." if word in _FALSE else ""
    if str in plain and isinstance(value, (bool, int, float)):
        return f' Put it in quotes: "{shown(value)}".'
    wants_list = any(item_type(option) is not None and not _is_mapping(option) for option in members(kind))
    if any(is_fixed(option) for option in members(kind)):
        return ""
    if wants_list and not isinstance(value, (list, Mapping)):
        text = value if isinstance(value, str) else shown(value)
        return f" Write [{text}]."
    if wants_list and isinstance(value, Mapping) and any(chosen(item_type(o), value) for o in members(kind)):
        return " Begin its first line with '- '."
    return ""


def _is_mapping(kind: Any) -> bool:
    plain = bare(kind)
    return dict in (plain, get_origin(plain)) or Mapping in (plain, get_origin(plain))
