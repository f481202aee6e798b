"""Types and values in plain words, for messages and help."""

from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from weft.config.tree import allows_none, bare, is_fixed, item_type, kind_of, limits, members, sections

LONGEST = 80  # characters of a value in a message
SECRETS = ("token", "password", "secret", "api_key", "apikey")


def shown(value: Any, key: str = "") -> str:
    """A value as a message shows it: on one line, cut, and hidden when its key is a secret's."""
    if value is not None and any(word in key.lower() for word in SECRETS):
        return "(hidden)"
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    text = repr(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def described(kind: Any) -> str:
    """What a value of this type looks like: 'a whole number of at least 1'."""
    options = _without_repeats(_one(member) for member in members(kind))
    if not options:
        return "null" if allows_none(kind) and kind is not Any else "anything"
    if allows_none(kind) and kind is not Any:
        options.append("null for none")
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _without_repeats(words: Any) -> list[str]:
    return list(dict.fromkeys(words))


def _one(kind: Any) -> str:
    plain = bare(kind)
    if get_origin(plain) is Literal or (isinstance(plain, type) and issubclass(plain, Enum)):
        names = [repr(name) for name in choices(plain)]
        return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    if found := sections(plain):
        name = kind_of(found[0])
        return f"a section {{kind: {name}, ...}}" if name else f"a section with {', '.join(found[0].model_fields)}"
    if plain in _NOUNS:
        return _NOUNS[plain] + _range(kind)
    return _container(kind, plain)


def _container(kind: Any, plain: Any) -> str:
    item = item_type(plain)
    if item is None:
        return getattr(plain, "__name__", str(plain))
    if get_origin(plain) is dict or plain is dict:
        return "a section of names with values" if item is Any else f"a section of names, each {described(item)}"
    if is_fixed(plain):
        return f"a list of {len(get_args(plain))}: {', '.join(described(arg) for arg in get_args(plain))}"
    at_least = _limit(kind, "min_length")
    size = f" of at least {at_least}" if at_least else ""
    return f"a list{size}" if item is Any else f"a list{size}, each item {described(item)}"


_NOUNS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    Any: "anything",
}


def choices(plain: Any) -> list[Any]:
    """The values of a Literal or an Enum; empty for other types."""
    if get_origin(plain) is Literal:
        return list(get_args(plain))
    return [member.value for member in plain] if isinstance(plain, type) and issubclass(plain, Enum) else []


def _range(kind: Any) -> str:
    low, high = _limit(kind, "ge"), _limit(kind, "le")
    above, below = _limit(kind, "gt"), _limit(kind, "lt")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    words = [
        f"of at least {low}" if low is not None else "",
        f"above {above}" if above is not None else "",
        f"of at most {high}" if high is not None else "",
        f"below {below}" if below is not None else "",
    ]
    pattern = _limit(kind, "pattern")
    words = [word for word in words if word]
    if (multiple := _limit(kind, "multiple_of")) is not None:
        words.append(f"a multiple of {multiple}")
    if pattern is not None:
        words.append(f"of the form {pattern}")
    return " " + " and ".join(words) if words else ""


def _limit(kind: Any, name: str) -> Any:
    """A limit by its name in annotated_types, pydantic's Field or a `Field(...)` inside Annotated."""
    for limit in limits(kind):
        for holder in (limit, *getattr(limit, "metadata", ())):
            value = getattr(holder, name, None)
            if value is not None:
                return value
    return None


def example(kind: Any) -> str:
    """A value that fits, as one would write it in YAML."""
    member = next(iter(members(kind)), None)
    plain = bare(member)
    if names := choices(plain):
        return str(names[0])
    if found := sections(plain):
        name = kind_of(found[0])
        return f"{{kind: {name}}}" if name else "{...}"
    if plain in (int, float):
        return str(_limit(member, "ge") or (1 if plain is int else 1.0))
    if plain is bool:
        return "true"
    item = item_type(plain)
    return f"[{example(item)}]" if item is not None and get_origin(plain) is not dict else "..."
