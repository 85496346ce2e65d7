"""The rules of a configuration, read from plain dataclasses: sections, their keys, and what each key allows.

A section is a dataclass. A value chooses the member of a union by its kind (mapping, list, scalar), never by trial.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from treering.cli.parsing.problems import Path
from treering.core.settings import FORMERLY

Kind = Literal["mapping", "list", "scalar", "null"]
LISTS = (tuple, list, set, frozenset, Sequence)
MAPPINGS = (dict, Mapping)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a section. `default` is a Python value, without meaning if the key is required."""

    name: str
    annotation: Any
    required: bool
    default: Any = None
    formerly: tuple[str, ...] = ()


@functools.cache
def keys(cls: type) -> dict[str, Key]:
    """Return the keys that the section `cls` has, in order."""
    hints = typing.get_type_hints(cls)
    result = {}
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        default = None if required else f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        formerly = tuple(f.metadata.get(FORMERLY, ()))
        result[f.name] = Key(
            name=f.name, annotation=hints[f.name], required=required, default=default, formerly=formerly
        )
    return result


def key_of(annotation: Any, value: Any, name: str) -> Key | None:
    """Return the key that `name`, today's or a former one, means in the mapping `value` written at `annotation`."""
    member = member_for(annotation, value)
    if not dataclasses.is_dataclass(member):
        return None
    known = keys(member)  # type: ignore[arg-type]
    return known.get(name) or next((key for key in known.values() if name in key.formerly), None)


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union; any other annotation is its only member."""
    if get_origin(annotation) is typing.Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(inner for member in get_args(annotation) for inner in members(member))
    return (annotation,)


def kind_of_member(member: Any) -> Kind:
    """Return the kind of value that a member of a union is for."""
    if member is type(None):
        return "null"
    if dataclasses.is_dataclass(member) or get_origin(member) in MAPPINGS:
        return "mapping"
    return "list" if get_origin(member) in LISTS else "scalar"


def kind_of_value(value: Any) -> Kind:
    """Return the kind of a value that was read."""
    if value is None:
        return "null"
    if isinstance(value, dict) or dataclasses.is_dataclass(value):
        return "mapping"
    return "list" if isinstance(value, (list, tuple)) else "scalar"


def member_for(annotation: Any, value: Any) -> Any:
    """Return the member of `annotation` that `value` is meant for, or None."""
    return next((m for m in members(annotation) if kind_of_member(m) == kind_of_value(value)), None)


def section(annotation: Any) -> type | None:
    """Return the dataclass among the members, if there is one."""
    return next((m for m in members(annotation) if dataclasses.is_dataclass(m)), None)  # type: ignore[return-value]


def shorthand(annotation: Any) -> str | None:
    """Return the key that plain text sets in a section with exactly one required key.

    `model: gpt2` is `model: {path: gpt2}`. None where text means something else, or nothing.
    """
    cls = section(annotation)
    if cls is None or any(kind_of_member(m) == "scalar" for m in members(annotation)):
        return None
    required = [k for k in keys(cls).values() if k.required]
    return required[0].name if len(required) == 1 and str in members(required[0].annotation) else None


def null_is_defaults(key: Key) -> bool:
    """Return whether `shard:` without a value means the section with its defaults.

    Not where null is itself a choice: the key's default is a section (so null turns it off), or the section has
    required keys.
    """
    cls = section(key.annotation)
    if cls is None or any(k.required for k in keys(cls).values()):
        return False
    return type(None) not in members(key.annotation) or (not key.required and key.default is None)


def annotation_at(annotation: Any, step: str | int, value: Any) -> Any:
    """Return the annotation one `step` further in, or None. `value`, written at `annotation`, chooses the member."""
    member = member_for(annotation, value)
    if dataclasses.is_dataclass(member):
        key = keys(member).get(str(step))  # type: ignore[arg-type]
        return key.annotation if key else None
    inner = get_args(member)
    if get_origin(member) in MAPPINGS:
        return inner[1]
    if get_origin(member) in LISTS and isinstance(step, int):
        if (len(inner) == 2 and inner[1] is Ellipsis) or get_origin(member) is not tuple:
            return inner[0]
        return inner[step] if step < len(inner) else None
    return None


def paths(cls: type) -> Iterator[Path]:
    """Yield every path that could be written in the section `cls`; of lists, the first element's."""
    for key in keys(cls).values():
        yield (key.name,)
        for member in members(key.annotation):
            steps: Path = (key.name,)
            while get_origin(member) in LISTS:
                member, steps = get_args(member)[0], (*steps, 0)
            if dataclasses.is_dataclass(member):
                yield from ((*steps, *inner) for inner in paths(member))  # type: ignore[arg-type]


def describe(annotation: Any) -> str:
    """Return what may be written, in words."""
    words: list[str] = []
    for member in members(annotation):
        if get_origin(member) is Literal:
            words += [_literal(value) for value in get_args(member)]
        elif member is not type(None):
            words.append(_describe_member(member))
    if type(None) in members(annotation):
        words.append("null")
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def _describe_member(member: Any) -> str:
    simple = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if member in simple:
        return simple[member]
    if dataclasses.is_dataclass(member):
        return "a section (" + ", ".join(keys(member)) + ")"  # type: ignore[arg-type]
    inner = get_args(member)
    if get_origin(member) is tuple and inner and inner[-1] is not Ellipsis:
        return "a list [" + ", ".join(describe(a) for a in inner) + "]"
    if kind_of_member(member) == "list":
        return f"a list of {_plural(describe(inner[0]))}"
    if kind_of_member(member) == "mapping":
        return f"a mapping from names to {_plural(describe(inner[1]))}"
    return getattr(member, "__name__", str(member)).lower()


def _plural(words: str) -> str:
    known = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts"}
    return known.get(words) or words.replace("a section", "sections", 1)


def _literal(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
