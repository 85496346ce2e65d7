"""Reads configuration files and text as plain values, with the line of each value."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import yaml

from treering.cli.parsing.nodes import MAX_DEPTH, MAX_VALUES, Refused, json_node, line_of, too_deep, too_many, yaml_node
from treering.cli.parsing.problems import ConfigErrors, Path, Problem
from treering.cli.parsing.scalars import ScalarError, resolve
from treering.cli.text import plain, short

MAX_BYTES = 1_000_000
MAX_TEXT = 200_000  # characters of one scalar


@dataclass(frozen=True, kw_only=True)
class ConfigDocument:
    """The values of a configuration as they were written.

    Args:
        name: of the file, for messages
        values: mappings, lists and scalars
        places: path of a value → where it was written: `run.yaml:12`
        notices: lines for the user about text that should be written in another way
        problems: those that reading and overriding reported
    """

    name: str
    values: dict[str, Any]
    places: Mapping[Path, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    def where(self, path: Path) -> str:
        """Return where `path` was written, or else the nearest value around it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return plain(self.name)


def read_file(path: str | File) -> ConfigDocument:
    """Return the document in a YAML or JSON file, or raise `ConfigErrors` with the line of what is wrong."""
    file, name = File(path), str(path)
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise _refusal(name, "this is a folder", "name the YAML file itself") from None
    except FileNotFoundError:
        raise _refusal(name, "there is no such file", _neighbours(file)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _refusal(name, f"it cannot be read: {reason}", "") from None
    return read_text(data, name=name)


def read_text(data: bytes | str, *, name: str = "config") -> ConfigDocument:
    """Return the document in YAML or, when `name` ends with .json, JSON text."""
    if len(data) > MAX_BYTES:
        remedy = "a configuration is a page of text; is this the data?"
        raise _refusal(name, f"it is larger than {MAX_BYTES:,} bytes", remedy)
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data.removeprefix("\ufeff")
        text.encode()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise _refusal(f"{name}:{line}", f"byte {error.start} is not UTF-8", "save the file as UTF-8 text") from None
    except UnicodeEncodeError:
        raise _refusal(name, "it contains half of a surrogate pair", "save the file as UTF-8 text") from None
    try:
        values, lines = node_values(json_node(text) if name.endswith(".json") else yaml_node(text))
    except Refused as error:
        raise _refusal(f"{name}:{error.line}", str(error), error.remedy) from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise _refusal(name, "the top level is not a mapping", "write keys at the left margin: `model: …`")
    return ConfigDocument(name=name, values=values, places={p: f"{plain(name)}:{n}" for p, n in lines.items()})


def node_values(root: yaml.Node | None) -> tuple[Any, dict[Path, int]]:
    """Return the value below `root`, and the line of every path in it. Aliases become copies."""
    lines: dict[Path, int] = {}

    def value(node: yaml.Node, path: Path, line: int) -> Any:
        lines[path] = line
        if len(lines) > MAX_VALUES:
            raise too_many(line)
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if len(path) >= MAX_DEPTH:
            raise too_deep(line_of(node))
        if isinstance(node, yaml.SequenceNode):
            return [value(item, (*path, i), line_of(item)) for i, item in enumerate(node.value)]
        keys = _keys(node)
        return {key: value(inner, (*path, key), line) for (key, line), (_, inner) in zip(keys.items(), node.value)}

    return (None if root is None else value(root, (), line_of(root))), lines


def _keys(mapping: yaml.Node) -> dict[str, int]:
    """Return each key of a mapping with its line."""
    lines: dict[str, int] = {}
    for key, _ in mapping.value:
        line = line_of(key)
        if not isinstance(key, yaml.ScalarNode):
            raise Refused(
                line, f"a key is a {'list' if isinstance(key, yaml.SequenceNode) else 'mapping'}", "keys are words"
            )
        if not key.value:
            raise Refused(line, "a key is empty", "write a name before the colon")
        if key.value == "<<":
            raise Refused(line, "merge keys (<<) are not allowed", "write the keys out")
        if key.value in lines:
            message = f"{short(key.value, 60)} was already given in line {lines[key.value]}"
            raise Refused(line, message, "keep one of the two")
        _check_text(key.value, line)
        lines[key.value] = line
    return lines


def _scalar(node: yaml.ScalarNode) -> Any:
    text = node.value
    if not node.style:  # plain: neither quoted nor a block
        try:
            text = resolve(text)
        except ScalarError as error:
            raise Refused(line_of(node), str(error), error.remedy) from None
    if isinstance(text, str):
        _check_text(text, line_of(node))
    return text


def _check_text(text: str, line: int) -> None:
    if len(text) > MAX_TEXT:
        raise Refused(line, f"a text of {len(text):,} characters", "put long text into a file")
    if "\0" in text:
        raise Refused(line, "a NUL character in a text", "remove it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(line, "half of a surrogate pair in a text", "write the character itself") from None


def _refusal(where: str, message: str, remedy: str) -> ConfigErrors:
    problem = Problem(where=plain(where), message=plain(message), remedy=plain(remedy))
    return ConfigErrors(re.sub(r":\d+$", "", where), [problem])


def _neighbours(file: File) -> str:
    import difflib

    try:
        names = [f.name for f in sorted(file.parent.glob("*"))[:1000] if f.suffix in (".yaml", ".yml", ".json")]
    except OSError:
        return ""
    close = difflib.get_close_matches(file.name, names, n=1)
    if close:
        return f"did you mean {file.parent / close[0]}?"
    return "`treering recipes ls` shows configurations to start from"
