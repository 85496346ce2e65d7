"""What a configuration may look like, read off plain dataclasses: the core neither knows nor imports what checks it.

An *arm* is one member of a union; a value chooses its arm by kind (mapping, list, scalar), never by trial.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from treering.cli.parsing.problems import Path

Kind = Literal["mapping", "list", "scalar", "null"]
LISTS = (tuple, list, set, frozenset, Sequence)
MAPPINGS = (dict, Mapping)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a section."""

    name: str
    annotation: Any
    required: bool
    default: Any = None  # as a Python value; meaningless if required


@functools.cache
def keys(cls: type) -> dict[str, Key]:
    """The keys that the section `cls` has, in order."""
    hints = typing.get_type_hints(cls)
    found = {}
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        default = None if required else f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        found[f.name] = Key(name=f.name, annotation=hints[f.name], required=required, default=default)
    return found


def arms(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; anything else is its own only arm."""
    if get_origin(annotation) is typing.Annotated:
        return arms(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(arm for member in get_args(annotation) for arm in arms(member))
    return (annotation,)


def kind_of_arm(arm: Any) -> Kind:
    if arm is type(None):
        return "null"
    if dataclasses.is_dataclass(arm) or get_origin(arm) in MAPPINGS:
        return "mapping"
    return "list" if get_origin(arm) in LISTS else "scalar"


def kind_of_value(value: Any) -> Kind:
    if value is None:
        return "null"
    if isinstance(value, dict) or dataclasses.is_dataclass(value):
        return "mapping"
    return "list" if isinstance(value, (list, tuple)) else "scalar"


def chosen(annotation: Any, value: Any) -> Any:
    """The arm that `value` is meant for, or None."""
    return next((a for a in arms(annotation) if kind_of_arm(a) == kind_of_value(value)), None)


def section(annotation: Any) -> type | None:
    """The dataclass among the arms, if there is one."""
    return next((a for a in arms(annotation) if dataclasses.is_dataclass(a)), None)  # type: ignore[return-value]


def shorthand(annotation: Any) -> str | None:
    """The key for which plain text stands: of a section with exactly one required key, if text means nothing else.

    `model: gpt2` is `model: {path: gpt2}`.
    """
    cls = section(annotation)
    if cls is None or any(kind_of_arm(a) == "scalar" for a in arms(annotation)):
        return None
    required = [k for k in keys(cls).values() if k.required]
    return required[0].name if len(required) == 1 and str in arms(required[0].annotation) else None


def null_is_defaults(key: Key) -> bool:
    """`shard:` with nothing behind it means the section with its defaults.

    Not where null is itself a choice: the key's default is a section (so null turns it off), or the section cannot be
    made from defaults alone.
    """
    cls = section(key.annotation)
    if cls is None or any(k.required for k in keys(cls).values()):
        return False
    return type(None) not in arms(key.annotation) or (not key.required and key.default is None)


def child(annotation: Any, step: str | int, value: Any) -> Any:
    """The annotation one `step` below, or None. `value` is what was written at `annotation`; it chooses the arm."""
    arm = chosen(annotation, value)
    if dataclasses.is_dataclass(arm):
        key = keys(arm).get(str(step))  # type: ignore[arg-type]
        return key.annotation if key else None
    inner = get_args(arm)
    if get_origin(arm) in MAPPINGS:
        return inner[1]
    if get_origin(arm) in LISTS and isinstance(step, int):
        if (len(inner) == 2 and inner[1] is Ellipsis) or get_origin(arm) is not tuple:
            return inner[0]
        return inner[step] if step < len(inner) else None
    return None


def paths(cls: type) -> Iterator[Path]:
    """Every path that could be written below the section `cls`; lists by their first element."""
    for key in keys(cls).values():
        yield (key.name,)
        for arm in arms(key.annotation):
            steps: Path = (key.name,)
            while get_origin(arm) in LISTS:
                arm, steps = get_args(arm)[0], (*steps, 0)
            if dataclasses.is_dataclass(arm):
                yield from ((*steps, *below) for below in paths(arm))  # type: ignore[arg-type]


def describe(annotation: Any) -> str:
    """What may be written, in words."""
    words: list[str] = []
    for arm in arms(annotation):
        if get_origin(arm) is Literal:
            words += [_quoted(value) for value in get_args(arm)]
        elif arm is not type(None):
            words.append(_describe_arm(arm))
    if type(None) in arms(annotation):
        words.append("null")
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def _describe_arm(arm: Any) -> str:
    simple = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if arm in simple:
        return simple[arm]
    if dataclasses.is_dataclass(arm):
        return "a section (" + ", ".join(keys(arm)) + ")"  # type: ignore[arg-type]
    inner = get_args(arm)
    if get_origin(arm) is tuple and inner and inner[-1] is not Ellipsis:
        return "a list [" + ", ".join(describe(a) for a in inner) + "]"
    if kind_of_arm(arm) == "list":
        return f"a list of {_plural(describe(inner[0]))}"
    if kind_of_arm(arm) == "mapping":
        return f"a mapping from names to {_plural(describe(inner[1]))}"
    return getattr(arm, "__name__", str(arm)).lower()


def _plural(words: str) -> str:
    known = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts"}
    return known.get(words) or words.replace("a section", "sections", 1)


def _quoted(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
