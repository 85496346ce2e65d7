"""Translates pydantic's errors into problems: where, what was given, what is allowed, and what to write."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from treering.cli.parsing.problems import Path, Problem, dotted
from treering.cli.parsing.reader import ConfigDocument
from treering.cli.parsing.scalars import ScalarError, resolve
from treering.cli.parsing.sections import (
    annotation_at,
    describe,
    keys,
    kind_of_member,
    kind_of_value,
    member_for,
    members,
    section,
)
from treering.cli.parsing.suggest import closest, meant_by
from treering.cli.text import plain, short, shown
from treering.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class _Location:
    """The place of an error: its path, the value that was written, and what is allowed there and around it."""

    path: Path
    value: Any
    annotation: Any
    around: Any


def explain(cls: type, document: ConfigDocument, errors: Iterable[Mapping[str, Any]]) -> Iterator[Problem]:
    """Yield the problem of each of pydantic's `errors` about `document` as a `cls`."""
    for error in errors:
        location = _locate(cls, document.values, error["loc"])
        kind = error["type"]
        if kind.endswith(("_type", "literal_error")) and _is_for_another_member(location):
            continue
        if kind == "unexpected_keyword_argument":
            yield _unknown_key(cls, document, location)
        elif kind == "missing" and isinstance(location.path[-1], str):
            yield _missing_key(document, location)
        elif kind == "value_error":
            reason = error["ctx"]["error"]
            path = location.path + (_steps(reason.field) if isinstance(reason, ConfigError) else ())
            yield Problem(where=document.where(path), path=path, message=plain(str(reason)))
        else:
            if kind == "missing":  # a list that is too short: the error is that of the complete list
                location = _locate(cls, document.values, error["loc"][:-1])
            yield _wrong_value(document, location)


def _locate(cls: type, values: Any, steps: Iterable[str | int]) -> _Location:
    path: Path = ()
    value, annotation, around = values, cls, cls
    named = False  # pydantic puts its name for a member of a union before the steps inside that member
    for step in steps:
        if not named and len([m for m in members(annotation) if m is not type(None)]) > 1:
            named = True
            continue
        around, annotation = annotation, annotation_at(annotation, step, value)
        if isinstance(value, dict):
            value = value.get(step)
        else:
            value = value[step] if isinstance(step, int) and step < len(value) else None
        path, named = (*path, step), False
    return _Location(path=path, value=value, annotation=annotation, around=around)


def _is_for_another_member(location: _Location) -> bool:
    """Return whether a mapping or list was compared with a member of a union that it is not meant for."""
    kind = kind_of_value(location.value)
    return kind in ("mapping", "list") and member_for(location.annotation, location.value) is not None


def _unknown_key(cls: type, document: ConfigDocument, location: _Location) -> Problem:
    path, here = location.path, section(location.around)
    allowed = list(keys(here)) if here is not None else []
    message = f"{short(str(path[-1]))} is not a setting" + (" here" if len(path) > 1 else "")
    remedy = plain(meant_by(cls, path, allowed))
    where = document.where(path)
    return Problem(where=where, path=path, message=message, allowed=", ".join(allowed), remedy=remedy)


def _missing_key(document: ConfigDocument, location: _Location) -> Problem:
    path = location.path
    return Problem(
        where=document.where(path[:-1]) if len(path) > 1 else plain(document.name),
        path=path,
        message="it is required and missing",
        allowed=describe(location.annotation),
        remedy=f"write {path[-1]}: …" + (f" under {dotted(path[:-1])}" if len(path) > 1 else " at the left margin"),
    )


def _wrong_value(document: ConfigDocument, location: _Location) -> Problem:
    key = next((step for step in reversed(location.path) if isinstance(step, str)), "")
    return Problem(
        where=document.where(location.path),
        path=location.path,
        message=f"given: {shown(location.value, key=key)}",
        allowed=describe(location.annotation),
        remedy=_remedy(location.annotation, location.value),
    )


def _steps(field: str) -> Path:
    steps = [s for s in field.replace("[", ".").replace("]", "").split(".") if s]
    return tuple(int(s) if s.isdigit() else s for s in steps)


def _remedy(annotation: Any, value: Any) -> str:
    allowed = members(annotation)
    if isinstance(value, str):
        return _instead_of_text(allowed, value)
    if isinstance(value, float) and int in allowed and value.is_integer():
        return f"write {int(value)}"
    if value is None:
        return "leave the key out to get the default"
    if isinstance(value, (bool, int, float)):
        if str in allowed:
            return f'put it into quotes: "{str(value).lower() if isinstance(value, bool) else value}"'
        if bool in allowed and value in (0, 1):
            return f"write {'true' if value else 'false'}"
    if not isinstance(value, (dict, list)) and any(kind_of_member(m) == "list" for m in allowed):
        return f"write it as a list: [{shown(value)}]"
    if (cls := section(annotation)) is not None and not isinstance(value, dict):
        first = next(iter(keys(cls)), "")
        return f"write its keys below it, for example {first}: …"
    return ""


def _instead_of_text(allowed: tuple[Any, ...], value: str) -> str:
    literals = [v for m in allowed if get_origin(m) is Literal for v in get_args(m)]
    if match := closest(value, [v for v in literals if isinstance(v, str)]):
        return f"did you mean {match}?"
    if bool in allowed and value.lower() in ("yes", "no", "on", "off", "y", "n", "true", "false"):
        return f"write {'true' if value.lower() in ('yes', 'on', 'y', 'true') else 'false'}, without quotes"
    if int in allowed or float in allowed:
        return _as_number(allowed, value)
    if any(kind_of_member(m) == "list" for m in allowed):
        return f"write it as a list: [{short(value, 40)}]"
    return ""


def _as_number(allowed: tuple[Any, ...], value: str) -> str:
    text = value.strip().replace("_", "").replace(",", "")
    try:
        number = resolve(text)
    except ScalarError:
        return ""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return ""
    if float not in allowed and isinstance(number, float):
        return f"write {int(number)}, without quotes" if number.is_integer() else "write a whole number"
    return f"write {text}, without quotes" if text == value else f"write {text}"
