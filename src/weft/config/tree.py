"""The tree of a config's sections and keys, read from the types: what may stand where."""

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from weft.config.yaml_text import KeyPath

SectionType = type[BaseModel]


@dataclass(frozen=True)
class Key:
    """One key that a config may have. path: the keys from the root, '0' for the first item of a list."""

    path: tuple[str, ...]
    section: SectionType
    field: FieldInfo

    @property
    def dotted(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True)
class Spot:
    """What the tree has at an error's location. choice: the path of the first union of unlike types on the way."""

    path: KeyPath
    section: SectionType  # that holds the last key of the path
    type: Any  # of the value; None when the section has no such key
    choice: KeyPath | None
    choice_type: Any


def field_type(field: FieldInfo) -> Any:
    """A field's type with its limits inside, as Annotated."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def members(kind: Any) -> list[Any]:
    """The alternatives of a type without None; limits stay on each."""
    if get_origin(kind) is Annotated:
        inner, *limits = get_args(kind)
        return [Annotated[(member, *limits)] for member in members(inner)]
    if get_origin(kind) in (Union, types.UnionType):
        return [member for part in get_args(kind) for member in members(part)]
    return [] if kind in (None, type(None)) else [kind]


def allows_none(kind: Any) -> bool:
    if get_origin(kind) is Annotated:
        return allows_none(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return any(allows_none(part) for part in get_args(kind))
    return kind in (None, type(None), Any)


def bare(kind: Any) -> Any:
    """A type without its limits."""
    return bare(get_args(kind)[0]) if get_origin(kind) is Annotated else kind


def limits(kind: Any) -> list[Any]:
    """The limits that stand on a type, flat."""
    return [*limits(get_args(kind)[0]), *kind.__metadata__] if get_origin(kind) is Annotated else []


def sections(kind: Any) -> list[SectionType]:
    """The sections that may stand directly in a field of this type."""
    plain = [bare(member) for member in members(kind)]
    return [member for member in plain if isinstance(member, type) and issubclass(member, BaseModel)]


def kind_of(section: SectionType) -> str | None:
    """The name by which a section is chosen."""
    field = section.model_fields.get("kind")
    return get_args(field.annotation)[0] if field and get_origin(field.annotation) is Literal else None


def chosen(kind: Any, value: Any) -> SectionType | None:
    """The section that a value is meant to be: the only one, or the one of its `kind`."""
    among = sections(kind)
    if len(among) == 1:
        return among[0]
    name = value.get("kind") if isinstance(value, Mapping) else None
    return next((section for section in among if name is not None and kind_of(section) == name), None)


def item_type(kind: Any, at: int | str = 0) -> Any:
    """The type of a container's items; None when it is no container."""
    plain = bare(kind)
    origin, args = get_origin(plain), get_args(plain)
    if origin is tuple and args and args[-1] is not Ellipsis:
        return args[at] if isinstance(at, int) and at < len(args) else args[-1]
    if origin in (tuple, list, set, frozenset) or origin is Sequence:
        return args[0] if args else Any
    if origin in (dict, Mapping):
        return args[1] if args else Any
    return Any if plain in (list, tuple, dict) else None


def is_fixed(kind: Any) -> bool:
    """Whether this is a list of a given length."""
    plain = bare(kind)
    args = get_args(plain)
    return get_origin(plain) is tuple and bool(args) and args[-1] is not Ellipsis


def every_key(root: SectionType) -> Iterator[Key]:
    """All keys of the tree, outer ones first, those of every kind of a choice included."""
    yield from _keys(root, (), ())


def _keys(section: SectionType, path: tuple[str, ...], around: tuple[SectionType, ...]) -> Iterator[Key]:
    inner: list[tuple[SectionType, tuple[str, ...]]] = []
    for name, field in section.model_fields.items():
        yield Key((*path, name), section, field)
        inner += [(found, (*path, name, *steps)) for found, steps in _sections_below(field_type(field))]
    for found, at in inner:
        if found not in around:
            yield from _keys(found, at, (*around, section))


def _sections_below(kind: Any) -> Iterator[tuple[SectionType, tuple[str, ...]]]:
    for section in sections(kind):
        yield section, ()
    for member in members(kind):
        item = item_type(member)
        if item is not None and item is not Any:
            step = "NAME" if get_origin(bare(member)) in (dict, Mapping) else "0"
            yield from ((section, (step, *steps)) for section, steps in _sections_below(item))


def locate(root: SectionType, loc: Sequence[int | str]) -> Spot:
    """Follow pydantic's location, which also names the branches of unions, to the path that the user wrote."""
    kind: Any = root
    path: KeyPath = ()
    section, choice, choice_type = root, None, None
    rest = list(loc)
    while rest and kind is not None:
        options = members(kind)
        if len(options) > 1:
            tag = rest.pop(0)
            by_kind = [option for option in sections(kind) if kind_of(option) == tag]
            if not by_kind and choice is None:
                choice, choice_type = path, kind
            containers = [option for option in options if item_type(option) is not None]
            kind = next(iter(by_kind or (containers if rest else []) or sections(kind) or options))
            continue
        found, head = sections(kind), rest.pop(0)
        if head == "[key]":
            break
        if found:
            section, path = found[0], (*path, head)
            field = section.model_fields.get(str(head))
            kind = field_type(field) if field else None
        elif options and (item := item_type(options[0], head)) is not None:
            path, kind = (*path, head), item
        else:
            break  # inside a single value pydantic names steps of its own
    return Spot(path, section, kind, choice, choice_type)


def value_at(data: Any, path: KeyPath) -> Any:
    """The value at a path; None where there is none."""
    for step in path:
        if isinstance(data, Mapping):
            data = data.get(step)
        elif isinstance(data, Sequence) and isinstance(step, int) and step < len(data):
            data = data[step]
        else:
            return None
    return data


def walk(kind: Any, value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any, Any]]:
    """(path, type, value) of everything in the data that the types know, outer ones first."""
    yield path, kind, value
    if isinstance(value, Mapping) and (section := chosen(kind, value)):
        for name, field in section.model_fields.items():
            if name in value:
                yield from walk(field_type(field), value[name], (*path, name))
        return
    containers = [member for member in members(kind) if item_type(member) is not None]
    if containers and isinstance(value, Mapping):
        for name, item in value.items():
            yield from walk(item_type(containers[0], name), item, (*path, name))
    elif containers and isinstance(value, list):
        for index, item in enumerate(value):
            yield from walk(item_type(containers[0], index), item, (*path, index))
