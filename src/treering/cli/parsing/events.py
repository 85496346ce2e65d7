"""YAML and JSON text as one flat stream of events, each with its line; what a config has no use for is refused here."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from treering.cli.parsing.scalars import ScalarError, resolve
from treering.cli.text import short

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same parser in C, where PyYAML was built with it


class Refused(Exception):
    """Text that cannot be a configuration."""

    def __init__(self, line: int, message: str, remedy: str = ""):
        super().__init__(message)
        self.line = line
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Event:
    """`text` is a scalar as written (keys are always text), `value` what it means."""

    kind: Literal["mapping", "list", "end", "scalar", "alias"]
    line: int
    value: Any = None
    text: str = ""
    anchor: str | None = None


def yaml_events(text: str) -> Iterator[Event]:
    """The events of the single document in `text`."""
    loader = None
    documents = 0
    try:
        loader = _Loader(text)
        while loader.check_event():
            event = loader.get_event()
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise Refused(_line(event), "a second document starts here", "keep one; remove the `---`")
            elif isinstance(event, (yaml.NodeEvent, yaml.CollectionEndEvent)):
                yield _event(event)
    except yaml.MarkedYAMLError as error:
        raise _syntax(error, text) from None
    except yaml.YAMLError as error:  # reader errors: characters that YAML forbids
        line = text.count("\n", 0, max(getattr(error, "position", 0), 0)) + 1
        reason = getattr(error, "reason", None) or "not YAML"
        raise Refused(line, f"the text is not YAML: {reason}", "remove the control character") from None
    except (ValueError, OverflowError, IndexError, AttributeError, RecursionError) as error:
        # The pure-Python scanner lets some of these out on odd escapes and directives.
        raise Refused(1, f"the text is not YAML: {short(str(error))}", "") from None
    finally:
        if loader is not None:
            loader.dispose()


def _line(event: Any) -> int:
    return event.start_mark.line + 1


def _event(event: Any) -> Event:
    line = _line(event)
    if isinstance(event, yaml.CollectionEndEvent):
        return Event("end", line)
    if isinstance(event, yaml.AliasEvent):
        return Event("alias", line, anchor=event.anchor)
    if event.tag is not None:
        raise Refused(line, f"the tag {short(event.tag, 40)} is not allowed", 'write the plain value; quote text: "…"')
    if isinstance(event, yaml.ScalarEvent):
        if event.style:  # quoted or a block: always text (plain is None in Python, "" in C)
            return Event("scalar", line, value=event.value, text=event.value, anchor=event.anchor)
        try:
            return Event("scalar", line, value=resolve(event.value), text=event.value, anchor=event.anchor)
        except ScalarError as error:
            # A key is text whatever it looks like, so the builder decides whether this matters.
            return Event("scalar", line, value=error, text=event.value, anchor=event.anchor)
    return Event("mapping" if isinstance(event, yaml.MappingStartEvent) else "list", line, anchor=event.anchor)


def _syntax(error: yaml.MarkedYAMLError, text: str) -> Refused:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    lines = text.splitlines()
    here = lines[line - 1] if line <= len(lines) else ""
    if re.match(r"\s*\t", here):
        return Refused(line, "this line is indented with a tab", "YAML wants spaces")
    if "\t" in here:
        return Refused(line, "there is a tab in this line", "YAML wants spaces")
    problem = short(" ".join(filter(None, [error.context, error.problem])), 200)
    if "maximum nesting depth" in problem:  # libyaml has a limit of its own from PyYAML 6.0.4 on
        return Refused(line, "it is nested too deeply", "a configuration has a few levels")
    remedy = (
        'put text with special characters (: # * & ! % @ `) into quotes: "…"' if re.search(r"[:#*&!%@`]", here) else ""
    )
    return Refused(line, f"the text is not YAML: {problem}", remedy)


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]|[^\s{}\[\],:"]+')


def json_events(text: str) -> Iterator[Event]:
    """The events of JSON text. It is checked by the json module first, so the tokens need no grammar of their own."""
    try:
        json.loads(text, parse_constant=_constant, parse_int=str, parse_float=str)
    except json.JSONDecodeError as error:
        raise Refused(error.lineno, f"the text is not JSON: {error.msg}", "") from None
    except RecursionError:
        raise Refused(1, "it is nested too deeply", "a configuration has a few levels") from None
    except ScalarError as error:
        raise Refused(1, str(error), error.remedy) from None
    line, last = 1, 0
    for match in _TOKEN.finditer(text):
        line, last = line + text.count("\n", last, match.start()), match.start()
        token = match.group()
        if token in "{[":
            yield Event("mapping" if token == "{" else "list", line)
        elif token in "}]":
            yield Event("end", line)
        else:
            yield _json_scalar(token, line)


def _json_scalar(token: str, line: int) -> Event:
    if token.startswith('"'):
        value = json.loads(token)
        return Event("scalar", line, value=value, text=value)
    try:
        return Event("scalar", line, value=resolve(token), text=token)
    except ScalarError as error:
        return Event("scalar", line, value=error, text=token)


def _constant(name: str) -> None:
    raise ScalarError(f"{name} is not a finite number", "leave the key out")
