"""Checker's errors to problems: the right place, what was given, what is allowed, what to write."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from treering.cli.parsing.problems import Path, Problem, dotted
from treering.cli.parsing.reader import Document
from treering.cli.parsing.scalars import ScalarError, resolve
from treering.cli.parsing.shape import arms, child, describe, keys, kind_of_arm, section
from treering.cli.parsing.suggest import closest, unknown_key
from treering.cli.text import plain, short, shown


def explain(cls: type, document: Document, values: Any, errors: Iterable[Mapping[str, Any]]) -> list[Problem]:
    """One problem per place, in the order of the file."""
    problems: dict[Path, Problem] = {}
    for error in errors:
        problem = _problem(cls, document, values, error)
        problems.setdefault(problem.path, problem)
    order = {path: i for i, path in enumerate(document.places)}

    def position(problem: Problem) -> int:
        ends = range(len(problem.path), -1, -1)
        return next((order[problem.path[:end]] for end in ends if problem.path[:end] in order), -1)

    return sorted(problems.values(), key=position)


def _problem(cls: type, document: Document, values: Any, error: Mapping[str, Any]) -> Problem:
    path, value, annotation, around = _locate(cls, values, error)
    where, kind = document.where(path), error["type"]
    if kind == "missing" and isinstance(path[-1], int):  # a list that is too short is wrong as a whole
        path, value, annotation, kind = path[:-1], _at(values, path[:-1]), around, "too_short"
    if kind == "extra_forbidden":
        allowed, remedy = unknown_key(cls, path, around)
        message = (
            f"{short(str(path[-1]))} is not a setting here"
            if len(path) > 1
            else f"{short(str(path[-1]))} is not a setting"
        )
        return Problem(where=where, path=path, message=message, allowed=allowed, remedy=remedy)
    if kind == "missing":
        remedy = f"write {path[-1]}: …" + (f" under {dotted(path[:-1])}" if len(path) > 1 else " at the left margin")
        where = document.where(path[:-1]) if len(path) > 1 else plain(document.name)
        return Problem(
            where=where, path=path, message="it is required and missing", allowed=describe(annotation), remedy=remedy
        )
    if kind == "config":
        path = path + _field(error["ctx"]["field"])
        return Problem(where=document.where(path), path=path, message=plain(error["ctx"]["reason"]))
    if kind == "value_error":
        return Problem(where=where, path=path, message=plain(str(error["ctx"]["error"])))
    if annotation is None:
        return Problem(where=where, path=path, message=plain(error["msg"]))
    key = next((s for s in reversed(path) if isinstance(s, str)), "")
    message = f"given: {shown(value, key=key)}"
    return Problem(
        where=where, path=path, message=message, allowed=describe(annotation), remedy=_remedy(annotation, value)
    )


def _locate(cls: type, values: Any, error: Mapping[str, Any]) -> tuple[Path, Any, Any, Any]:
    """(path, value, annotation, section around) of an error, past the names of union arms in its location."""
    path: Path = ()
    value, annotation, around = values, cls, cls
    steps: Sequence[str | int] = error["loc"]
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        inside = (isinstance(value, dict) and step in value) or (isinstance(value, list) and isinstance(step, int))
        if not inside and not (last and error["type"] == "missing"):
            continue
        around = annotation
        annotation = child(annotation, step, value)
        path = (*path, step)
        if isinstance(value, list):
            value = value[step] if isinstance(step, int) and step < len(value) else None
        else:
            value = value.get(step)
        if annotation is None:
            break
    return path, value, annotation, around


def _at(values: Any, path: Path) -> Any:
    for step in path:
        values = values[step]
    return values


def _field(name: str) -> Path:
    steps = [s for s in name.replace("[", ".").replace("]", "").split(".") if s]
    return tuple(int(s) if s.isdigit() else s for s in steps)


def _remedy(annotation: Any, value: Any) -> str:
    wanted = arms(annotation)
    if isinstance(value, str):
        return _instead_of_text(wanted, value)
    if isinstance(value, float) and int in wanted and value.is_integer():
        return f"write {int(value)}"
    if value is None:
        return "leave the key out to get the default"
    if isinstance(value, (bool, int, float)):
        if str in wanted:
            return f'put it into quotes: "{str(value).lower() if isinstance(value, bool) else value}"'
        if bool in wanted and value in (0, 1):
            return f"write {'true' if value else 'false'}"
    if not isinstance(value, (dict, list)) and any(kind_of_arm(a) == "list" for a in wanted):
        return f"write it as a list: [{shown(value)}]"
    if (cls := section(annotation)) is not None and not isinstance(value, dict):
        first = next(iter(keys(cls)), "")
        return f"write its keys below it, for example {first}: …"
    return ""


def _instead_of_text(wanted: tuple[Any, ...], value: str) -> str:
    literals = [v for a in wanted if get_origin(a) is Literal for v in get_args(a)]
    if match := closest(value, [v for v in literals if isinstance(v, str)]):
        return f"did you mean {match}?"
    if bool in wanted and value.lower() in ("yes", "no", "on", "off", "y", "n", "true", "false"):
        return f"write {'true' if value.lower() in ('yes', 'on', 'y', 'true') else 'false'}, without quotes"
    if int in wanted or float in wanted:
        return _as_number(wanted, value)
    if any(kind_of_arm(a) == "list" for a in wanted):
        return f"write it as a list: [{short(value, 40)}]"
    return ""


def _as_number(wanted: tuple[Any, ...], value: str) -> str:
    text = value.strip().replace("_", "").replace(",", "")
    try:
        number = resolve(text)
    except ScalarError:
        return ""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return ""
    if float not in wanted and isinstance(number, float):
        return f"write {int(number)}, without quotes" if number.is_integer() else "write a whole number"
    return f"write {text}, without quotes" if text == value else f"write {text}"
