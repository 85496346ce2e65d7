"""Applies `--set a.b=c`: one value of a configuration, from the command line."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from treering.cli.parsing.expand import expand, renaming
from treering.cli.parsing.nodes import Refused, yaml_node
from treering.cli.parsing.problems import ConfigErrors, Path, Problem, dotted
from treering.cli.parsing.reader import ConfigDocument, node_values
from treering.cli.parsing.scalars import ScalarError, resolve
from treering.cli.parsing.sections import annotation_at, key_of
from treering.cli.text import plain, shown


def override(cls: type, document: ConfigDocument, settings: Sequence[str]) -> ConfigDocument:
    """Return the expanded `document` with each `path=value` of `settings` applied in order.

    Unknown keys are reported by the check that follows. A setting that is not `path=value`, or whose path cannot exist
    in the document, raises `ConfigErrors`.
    """
    problems = []
    for setting in settings:
        try:
            document = expand(cls, _Override(setting).put(cls, document))
        except _Wrong as error:
            problems.append(error.problem)
    if problems:
        raise ConfigErrors("--set", problems)
    return document


class _Wrong(Exception):
    def __init__(self, setting: str, message: str, remedy: str = ""):
        super().__init__(message)
        self.problem = Problem(where=plain(f"--set {setting}"), message=plain(message), remedy=plain(remedy))


class _Override:
    """One `path=value`."""

    def __init__(self, setting: str):
        name, equals, text = setting.partition("=")
        self.setting, self.where = setting, plain(f"--set {name}")
        self.steps = tuple(step.strip() for step in name.split("."))
        if not equals or not all(self.steps):
            raise _Wrong(setting, "this is not path=value", "write for example --set train.steps=100")
        try:
            setting.encode()
            self.value = _value(text.strip())
        except (ScalarError, Refused) as error:
            raise _Wrong(setting, str(error), error.remedy) from None
        except UnicodeEncodeError:
            raise _Wrong(setting, "it is not UTF-8 text") from None

    def put(self, cls: type, document: ConfigDocument) -> ConfigDocument:
        """Return `document` with the value at its path; missing sections on that path are added."""
        values = copy.deepcopy(document.values)
        notices = list(document.notices)
        container: Any = values
        annotation: Any = cls
        path: Path = ()
        for i, text in enumerate(self.steps):
            step = self._step(container, text, path)
            if isinstance(step, str) and (key := key_of(annotation, container, step)) and key.name != step:
                notices.append(renaming(self.where, step, key.name))
                step = key.name
            if isinstance(container, list) and step == len(container):
                container.append(None)
            if i == len(self.steps) - 1:
                container[step] = self.value
            elif (container.get(step) if isinstance(container, dict) else container[step]) is None:
                container[step] = {}
            annotation = annotation_at(annotation, step, container)
            container, path = container[step], (*path, step)
        places = {p: where for p, where in document.places.items() if p[: len(path)] != path}
        return replace(document, values=values, places={**places, path: self.where}, notices=tuple(notices))

    def _step(self, container: Any, text: str, path: Path) -> str | int:
        if isinstance(container, dict):
            return text
        if not isinstance(container, list):
            message = f"{dotted(path)} is {shown(container)}, which has no keys"
            raise _Wrong(self.setting, message, "set the complete value")
        if not (text.isascii() and text.isdigit() and len(text) < 6 and int(text) <= len(container)):
            allowed = f"0 to {len(container)}" if container else "0"
            raise _Wrong(
                self.setting,
                f"{dotted(path)} is a list; {text} is not one of its positions",
                f"write a number, {allowed}",
            )
        return int(text)


def _value(text: str) -> Any:
    # Only what is plainly a collection or quoted goes through YAML: `--set data.path=*.jsonl` is no alias.
    if text[:1] in ("[", "{", '"', "'"):
        return node_values(yaml_node(text))[0]
    return resolve(text)
