"""A pydantic checker for a tree of plain dataclasses, made from the outside.

Every dataclass is mirrored by a TypedDict that forbids extra keys and is checked strictly; the dataclass itself is
made from the checked values, and a `ConfigError` out of its `__post_init__` becomes one more located error among the
others. Handing pydantic the dataclass directly would let that first ConfigError hide everything else.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, NotRequired, get_args, get_origin

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, TypeAdapter
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from treering.cli.parsing.plain import plain_values
from treering.cli.parsing.shape import (
    LISTS,
    MAPPINGS,
    arms,
    keys,
    kind_of_arm,
    kind_of_value,
    null_is_defaults,
    shorthand,
)
from treering.core.errors import ConfigError

TAG = "\0"  # marks the union arms in pydantic's locations; no key that was read can hold a NUL


@functools.cache
def adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(_mirror(cls))


@functools.cache
def _mirror(cls: type) -> Any:
    fields: dict[str, Any] = {}
    for key in keys(cls).values():
        annotation: Any = Annotated[_rewrite(key.annotation), Field(json_schema_extra=_for_editors(key))]
        fields[key.name] = annotation if key.required else NotRequired[annotation]
    make: Any = TypedDict  # type checkers know it only with names written out
    mirror = make(cls.__name__, fields)
    mirror.__doc__ = cls.__doc__
    mirror.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    return Annotated[mirror, AfterValidator(_maker(cls))]


def _maker(cls: type) -> Callable[[dict[str, Any]], Any]:
    def make(values: dict[str, Any]) -> Any:
        try:
            return cls(**values)
        except ConfigError as error:
            raise PydanticCustomError("config", "{reason}", {"reason": str(error), "field": error.field}) from None

    return make


def _rewrite(annotation: Any) -> Any:
    """`annotation` with dataclasses mirrored, and unions decided by the kind of the value."""
    if get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        return _union(annotation)
    if dataclasses.is_dataclass(annotation):
        return _mirror(annotation)  # type: ignore[arg-type]
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in LISTS or origin in MAPPINGS:
        return origin[tuple(a if a is Ellipsis else _rewrite(a) for a in inner)]
    return annotation


def _union(annotation: Any) -> Any:
    by_kind: dict[str, list[Any]] = {}
    for arm in arms(annotation):
        by_kind.setdefault(kind_of_arm(arm), []).append(_rewrite(arm))
    members = {kind: functools.reduce(lambda a, b: a | b, group) for kind, group in _unions(by_kind).items()}
    if len(members) == 1:
        return next(iter(members.values()))
    tagged = [Annotated[member, Tag(TAG + kind)] for kind, member in members.items()]
    union = functools.reduce(lambda a, b: typing.Union[a, b], tagged)  # noqa: UP007 — Annotated has no `|` here
    return Annotated[union, Discriminator(lambda value: TAG + kind_of_value(value))]


def _unions(by_kind: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {kind: [typing.Union[tuple(group)]] for kind, group in by_kind.items()}  # noqa: UP007


def _for_editors(key: Any) -> Callable[[dict[str, Any]], None]:
    """Adds to the JSON schema what the checks around pydantic allow too: defaults, plain text, null."""

    def extend(schema: dict[str, Any]) -> None:
        others = [{"type": "string"}] if shorthand(key.annotation) else []
        others += [{"type": "null"}] if null_is_defaults(key) and type(None) not in arms(key.annotation) else []
        if others:
            inner = dict(schema)
            schema.clear()
            schema["anyOf"] = [inner, *others]
        if not key.required:
            schema["default"] = plain_values(key.default)

    return extend
