"""What a config may hold, from the types alone: help for people, and a JSON schema for their editors."""

import json
import textwrap
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import PydanticUndefined, core_schema

from weft.config.meanings import meaning, summary
from weft.config.peers import PEERS
from weft.config.show import inline
from weft.config.source import EXTENDS
from weft.config.tree import SectionType, bare, every_key, field_type, item_type, kind_of, members, sections
from weft.config.words import described
from weft.errors import ConfigError, did_you_mean

WIDTH = 100  # columns of the help


class _Schema(GenerateJsonSchema):
    """Pydantic's schema with our fields' comments as descriptions, and without titles, which only repeat names."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        found = super().model_schema(schema)
        section = schema["cls"]
        for name, field in found.get("properties", {}).items():
            words = meaning(section, name) if name in section.model_fields else ""
            if words:
                field["description"] = words
        return found

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a config file."""
    found = model.model_json_schema(schema_generator=_Schema)
    files = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    extends = {EXTENDS: {"description": "Files whose keys this file takes over; its own keys win.", **files}}
    return {"$schema": _Schema.schema_dialect, **found, "properties": {**extends, **found["properties"]}}


def schema_text(model: type[BaseModel]) -> str:
    """The schema as the file that is shipped."""
    return json.dumps(schema(model), indent=1, ensure_ascii=False) + "\n"


# ---- Help ---------------------------------------------------------------------------------------------------------


def explain(model: SectionType, path: str = "") -> str:
    """Help for a section or a key, such as 'adapter', 'adapter.lora.rank' or 'data.sources'. Raises ConfigError."""
    steps = [step for step in path.split(".") if step]
    if not steps:
        return _section_help(model, "")
    owner, kind, at = model, model, []
    field: FieldInfo | None = None
    for step in steps:
        found = _sections_in(kind)
        by_kind = [section for section in found if kind_of(section) == step]
        if by_kind and not any(step in section.model_fields for section in found):
            kind, field = by_kind[0], None
            continue
        if step.isdecimal():
            continue
        if get_origin(bare(kind)) is dict and not any(step in section.model_fields for section in found):
            kind, field, at = get_args(bare(kind))[1], None, [*at, step]  # a name that the user chooses
            continue
        owner = next((section for section in found if step in section.model_fields), None)
        if owner is None:
            raise ConfigError(f"{path}: {_nothing(step, found, '.'.join(at))}")
        field, at = owner.model_fields[step], [*at, step]
        kind = field_type(field)
    below = _sections_in(kind)
    if not below:
        assert field is not None
        return _key_help(owner, at[-1], ".".join(at))
    words = f"{'.'.join(at)}: {meaning(owner, at[-1])}.\n\n" if field and meaning(owner, at[-1]) else ""
    return words + "\n\n".join(_section_help(section, ".".join(at)) for section in below)


def _nothing(step: str, found: list[SectionType], inside: str) -> str:
    names = list(dict.fromkeys(name for section in found for name in section.model_fields))
    names += [kind for section in found if (kind := kind_of(section)) and len(found) > 1]
    if not names:
        return f"'{inside}' is a single value and has no '{step}' in it."
    return f"there is no '{step}'{f' in {inside!r}' if inside else ''}. {did_you_mean(step, names)}"


def _sections_in(kind: Any) -> list[SectionType]:
    """The sections of a type, or of the items of its lists."""
    items = [item for member in members(kind) if (item := item_type(member)) not in (None, Any)]
    return sections(kind) or [section for item in items for section in _sections_in(item)]


def _section_help(section: SectionType, path: str) -> str:
    kind = kind_of(section)
    title = f"{path} (kind: {kind})" if kind else path or "a run"
    lines = [f"{title}: {summary(section)}", ""]
    for name, field in section.model_fields.items():
        if name != "kind":
            lines += [f"  {name}{_default(field)}{_type(field)}"]
            lines += _wrapped(_sentence(section, name, field, path), "      ")
    return "\n".join(lines).rstrip()


def _type(field: FieldInfo) -> str:
    kind = field_type(field)
    return "" if _sections_in(kind) else f"  ({described(kind)})"


def _sentence(section: SectionType, name: str, field: FieldInfo, path: str) -> str:
    words = meaning(section, name)
    below = _sections_in(field_type(field))
    if not below:
        return f"{words}." if words else ""
    kinds = [kind for found in below if (kind := kind_of(found))]
    choice = f" Kinds: {', '.join(kinds)}." if kinds else ""
    words = words or summary(below[0]).rstrip(".")
    return f"{words}.{choice} See: weft config explain {f'{path}.' if path else ''}{name}"


def _default(field: FieldInfo) -> str:
    """The default as YAML; sections have their own help instead."""
    if field.is_required():
        return " (required)"
    value = field.get_default(call_default_factory=False)
    if field.default_factory is not None or value is PydanticUndefined or isinstance(value, BaseModel):
        return ""
    plain = list(value) if isinstance(value, tuple) else value
    return f" = {inline(plain if isinstance(plain, (str, int, float, list, type(None))) else str(plain))}"


def _key_help(section: SectionType, name: str, path: str) -> str:
    field = section.model_fields[name]
    words = meaning(section, name)
    lines = [f"{path}{_default(field)}{_type(field)}"]
    lines += _wrapped(f"{words}.", "  ") if words else []
    names = list(_names_elsewhere(path))
    return "\n".join([*lines, *_wrapped(f"Other trainers call it {', '.join(names)}.", "  ")] if names else lines)


def _names_elsewhere(path: str) -> Iterator[str]:
    return (name for name, peer in PEERS.items() if peer.ours.replace(".0.", ".") == path)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False)


def keys(model: SectionType) -> list[str]:
    """Every dotted key that a config may have."""
    return list(dict.fromkeys(key.dotted for key in every_key(model)))
