"""Configuration text to plain values, with the line of every one of them.

The values are built from the parser's events rather than by a YAML constructor: so nothing but mappings, lists and
scalars can come out, depth and size are bounded while reading, and each key's line is known.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

from treering.cli.parsing.events import Refused, json_events, yaml_events
from treering.cli.parsing.problems import ConfigErrors, Path, Problem
from treering.cli.parsing.tree import build
from treering.cli.text import plain

MAX_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Document:
    """A configuration as it was written: values, and where each came from."""

    name: str
    values: dict[str, Any]
    places: Mapping[Path, str] = field(default_factory=dict)  # path -> "run.yaml:12"

    def where(self, path: Path) -> str:
        """The place of `path`, or of the nearest thing around it that was written."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return plain(self.name)


def read_file(path: str | File) -> Document:
    """Read a YAML or JSON file."""
    file, name = File(path), str(path)
    try:
        if file.is_dir():
            raise _refused(name, "this is a folder", "name the YAML file itself")
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _refused(name, "there is no such file", _neighbours(file)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _refused(name, f"it cannot be read: {reason}", "") from None
    return read_text(data, name=name)


def read_text(data: bytes | str, *, name: str = "config") -> Document:
    """Read YAML or, when `name` ends with .json, JSON."""
    if len(data) > MAX_BYTES:
        raise _refused(
            name, f"it is larger than {MAX_BYTES:,} bytes", "a configuration is a page of text; is this the data?"
        )
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data.removeprefix("\ufeff")
        text.encode()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise _refused(f"{name}:{line}", f"byte {error.start} is not UTF-8", "save the file as UTF-8 text") from None
    except UnicodeEncodeError:
        raise _refused(name, "it holds half of a surrogate pair", "save the file as UTF-8 text") from None
    try:
        values, lines = build(json_events(text) if name.endswith(".json") else yaml_events(text))
    except Refused as error:
        raise _refused(f"{name}:{error.line}", str(error), error.remedy) from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise _refused(name, "the top level is not a mapping", "write keys at the left margin: `model: …`")
    return Document(name=name, values=values, places={p: f"{plain(name)}:{n}" for p, n in lines.items()})


def _refused(where: str, message: str, remedy: str) -> ConfigErrors:
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
