"""`--set a.b=c`: one value of a configuration, from the command line."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from treering.cli.parsing.events import Refused, yaml_events
from treering.cli.parsing.normal import normal
from treering.cli.parsing.problems import ConfigErrors, Path, Problem, dotted
from treering.cli.parsing.reader import Document
from treering.cli.parsing.scalars import ScalarError, resolve
from treering.cli.parsing.tree import build
from treering.cli.text import plain, shown


def override(document: Document, cls: type, settings: Sequence[str]) -> Document:
    """`document` with each `path=value` of `settings` put in, in order. Unknown keys are found by the check after."""
    values = normal(cls, document.values)
    places = dict(document.places)
    problems = []
    for setting in settings:
        try:
            steps, value = _parse(setting)
            path = _put(values, steps, value, setting)
        except _Bad as error:
            problems.append(error.problem)
            continue
        places = {p: where for p, where in places.items() if p[: len(path)] != path}
        places[path] = plain(f"--set {setting.partition('=')[0]}")
        values = normal(cls, values)
    if problems:
        raise ConfigErrors("--set", problems)
    return replace(document, values=values, places=places)


class _Bad(Exception):
    def __init__(self, setting: str, message: str, remedy: str = "", path: Path = ()):
        super().__init__(message)
        where = plain(f"--set {setting}")
        self.problem = Problem(where=where, path=path, message=plain(message), remedy=plain(remedy))


def _parse(setting: str) -> tuple[tuple[str, ...], Any]:
    name, equals, text = setting.partition("=")
    steps = tuple(step.strip() for step in name.split("."))
    if not equals or not all(steps):
        raise _Bad(setting, "this is not path=value", "write for example --set train.steps=100")
    try:
        setting.encode()
        return steps, _value(text.strip())
    except (ScalarError, Refused) as error:
        raise _Bad(setting, str(error), error.remedy) from None
    except UnicodeEncodeError:
        raise _Bad(setting, "it is not UTF-8 text") from None


def _value(text: str) -> Any:
    # Only what is plainly a collection or quoted goes through YAML: `--set data.path=*.jsonl` is no alias.
    if text[:1] in ("[", "{", '"', "'"):
        return build(yaml_events(text))[0]
    return resolve(text)


def _put(values: dict[str, Any], steps: tuple[str, ...], value: Any, setting: str) -> Path:
    place: Any = values
    path: Path = ()
    for i, text in enumerate(steps):
        step = _step(place, text, setting, path)
        path = (*path, step)
        if i == len(steps) - 1:
            if isinstance(place, list) and step == len(place):
                place.append(value)
            else:
                place[step] = value
            return path
        if isinstance(place, list) and step == len(place):
            place.append({})
        elif isinstance(place, dict) and place.get(step) is None:
            place[step] = {}
        place = place[step]
    raise AssertionError("unreachable: a path has at least one step")


def _step(place: Any, text: str, setting: str, path: Path) -> str | int:
    if isinstance(place, dict):
        return text
    if not isinstance(place, list):
        raise _Bad(setting, f"{dotted(path)} is {shown(place)}, which has nothing below it", "set it as a whole")
    if not (text.isascii() and text.isdigit() and len(text) < 6 and int(text) <= len(place)):
        allowed = f"0 to {len(place)}" if place else "0"
        raise _Bad(setting, f"{dotted(path)} is a list; {text} is none of its places", f"write a number, {allowed}")
    return int(text)
