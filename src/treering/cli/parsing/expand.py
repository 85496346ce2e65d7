"""Expands a document: shorthands become the sections that they mean, and former names today's names."""

import dataclasses
from typing import Any

from treering.cli.parsing.problems import Path, Problem
from treering.cli.parsing.reader import ConfigDocument
from treering.cli.parsing.sections import annotation_at, key_of, null_is_defaults, shorthand


def expand(cls: type, document: ConfigDocument) -> ConfigDocument:
    """Return `document` as a section `cls`, with every shorthand expanded and every former name of a key replaced.

    `model: gpt2` becomes `model: {path: gpt2}`, `shard:` the section with its defaults, a former name of a setting its
    present name, with a notice. Both names of one setting are a problem.
    """
    renamed: dict[Path, str] = {}  # path as it was written → today's name of its last step
    notices: list[str] = []
    problems: list[Problem] = []

    def current(path: Path) -> Path:
        return tuple(renamed.get(path[: i + 1], step) for i, step in enumerate(path))

    def expanded(annotation: Any, value: Any, path: Path) -> Any:
        """Return `value`, which was written at `path`, expanded."""
        if isinstance(value, str) and (name := shorthand(annotation)):
            return {name: value}
        if isinstance(value, list):
            return [expanded(annotation_at(annotation, i, value), v, (*path, i)) for i, v in enumerate(value)]
        if not isinstance(value, dict):
            return value
        result: dict[str, Any] = {}
        for written, inner in value.items():
            name, place = written, (*path, written)
            key = key_of(annotation, value, written)
            if key is not None and key.name != written:
                name, where = key.name, document.where(place)
                if name in value or name in result:
                    message, remedy = f"{written} is now called {name}, and {name} is given too", f"leave {written} out"
                    problems.append(Problem(where=where, path=current(place), message=message, remedy=remedy))
                    continue
                renamed[place] = name
                notices.append(renaming(where, written, name))
            if inner is None and key is not None and null_is_defaults(key):
                inner = {}
            result[name] = expanded(annotation_at(annotation, name, value), inner, place)
        return result

    values = expanded(cls, document.values, ())
    places = {current(path): where for path, where in document.places.items()} if renamed else document.places
    return dataclasses.replace(
        document,
        values=values,
        places=places,
        notices=(*document.notices, *notices),
        problems=(*document.problems, *problems),
    )


def renaming(where: str, former: str, name: str) -> str:
    """Return the notice about a former name that was read."""
    return f"{where}: {former} is now called {name}; the former name is read for one more version"
