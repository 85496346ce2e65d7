"""YAML and JSON text as a graph of PyYAML's nodes, which know their lines; nothing in the text is run.

A file may be hostile: its nesting and the number of its nodes are bounded while they are composed.
"""

import json
import re
from typing import Any

import yaml

from treering.cli.parsing.scalars import ScalarError
from treering.cli.text import short

MAX_DEPTH = 32
MAX_VALUES = 20_000  # after aliases are followed, too: a "billion laughs" file ends here


class Refused(Exception):
    """Text that cannot be a configuration: the line (from 1), the reason and what to write instead."""

    def __init__(self, line: int, message: str, remedy: str = ""):
        super().__init__(message)
        self.line = line
        self.remedy = remedy


def too_deep(line: int) -> Refused:
    """Return the error for nesting beyond MAX_DEPTH."""
    return Refused(line, "it is nested too deeply", "a configuration has a few levels")


def too_many(line: int) -> Refused:
    """Return the error for more than MAX_VALUES values."""
    remedy = "a configuration is a page of text; is this the data?"
    return Refused(line, f"it has more than {MAX_VALUES:,} values", remedy)


def line_of(node: yaml.Node | yaml.Event) -> int:
    """Return the line of a node or event, from 1."""
    return int(node.start_mark.line) + 1  # type: ignore[union-attr]


class _Limits:
    """Composes nodes within the limits; a mixin before a PyYAML loader."""

    def __init__(self, text: str):
        super().__init__(text)  # type: ignore[call-arg]
        self.depth = 0
        self.nodes = 0
        self.anchors: dict[str, yaml.Node] = {}
        self.finished: set[str] = set()  # anchors; an alias inside its own anchor would be a circle

    def compose_node(self, parent: yaml.Node | None, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[attr-defined]
        line, anchor = line_of(event), event.anchor
        if isinstance(event, yaml.AliasEvent):
            if anchor not in self.finished:
                raise Refused(line, f"*{short(anchor, 40)} has no finished anchor above", "write the value out")
            return super().compose_node(parent, index)  # type: ignore[misc]
        if event.tag is not None:
            tag = short(event.tag, 40)
            raise Refused(line, f"the tag {tag} is not allowed", 'write the plain value; quote text: "…"')
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.depth > MAX_DEPTH + 1:
            raise too_deep(line)
        if self.nodes > 2 * MAX_VALUES:  # a key is a node too
            raise too_many(line)
        self.anchors.pop(anchor, None)  # YAML lets a later anchor have the name of an earlier one
        self.finished.discard(anchor)
        node = super().compose_node(parent, index)  # type: ignore[misc]
        self.depth -= 1
        self.finished.add(anchor)
        return node


class PythonComposer(_Limits, yaml.SafeLoader):
    """The composer for a PyYAML that was built without libyaml."""


Composer: Any = PythonComposer
if hasattr(yaml, "CSafeLoader"):

    class CComposer(_Limits, yaml.CSafeLoader, yaml.composer.Composer):
        """Scans and parses in C. Nodes are composed in Python: in C, deep nesting would end the process."""

        get_single_node = yaml.composer.Composer.get_single_node

    Composer = CComposer


def yaml_node(text: str) -> yaml.Node | None:
    """Return the root node of the only document in `text`; None if there is none."""
    composer = None
    try:
        composer = Composer(text)
        return composer.get_single_node()  # type: ignore[no-any-return]
    except yaml.MarkedYAMLError as error:
        raise _syntax(error, text) from None
    except yaml.YAMLError as error:  # reader errors: characters that YAML forbids
        line = text.count("\n", 0, max(getattr(error, "position", 0), 0)) + 1
        reason = getattr(error, "reason", None) or "not YAML"
        raise Refused(line, f"the text is not YAML: {reason}", "remove the control character") from None
    except (ValueError, OverflowError, IndexError, AttributeError, RecursionError) as error:
        # The scanner written in Python raises some of these on odd escapes and directives.
        raise Refused(1, f"the text is not YAML: {short(str(error))}", "") from None
    finally:
        if composer is not None:
            composer.dispose()


def _syntax(error: yaml.MarkedYAMLError, text: str) -> Refused:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    if error.problem == "but found another document":
        return Refused(line, "a second document starts here", "keep one; remove the `---`")
    lines = text.splitlines()
    written = lines[line - 1] if line <= len(lines) else ""
    if re.match(r"\s*\t", written):
        return Refused(line, "this line is indented with a tab", "YAML needs spaces")
    if "\t" in written:
        return Refused(line, "there is a tab in this line", "YAML needs spaces")
    problem = short(" ".join(filter(None, [error.context, error.problem])), 200)
    special = re.search(r"[:#*&!%@`]", written)
    if "maximum nesting depth" in problem:  # libyaml has another limit from PyYAML 6.0.4 on
        return too_deep(line)
    remedy = 'put text with special characters (: # * & ! % @ `) into quotes: "…"' if special else ""
    return Refused(line, f"the text is not YAML: {problem}", remedy)


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]|[^\s{}\[\],:"]+')


def json_node(text: str) -> yaml.Node:
    """Return the root node of JSON text. The json module checks it first, so tokens need no grammar of their own."""
    try:
        json.loads(text, parse_constant=_constant, parse_int=str, parse_float=str)
    except json.JSONDecodeError as error:
        raise Refused(error.lineno, f"the text is not JSON: {error.msg}", "") from None
    except RecursionError:
        raise too_deep(1) from None
    except ScalarError as error:
        raise Refused(1, str(error), error.remedy) from None
    line, last = 0, 0
    starts: list[yaml.Mark] = []  # of the mappings and lists that are still open
    nodes: list[list[yaml.Node]] = [[]]  # the nodes in each of them so far, below the root
    for i, match in enumerate(_TOKEN.finditer(text)):
        line, last = line + text.count("\n", last, match.start()), match.start()
        if i > 3 * MAX_VALUES:  # a value is at most a key and two brackets
            raise too_many(line + 1)
        token, mark = match.group(), yaml.Mark("", last, line, 0, None, 0)
        if token in "{[":
            starts.append(mark)
            nodes.append([])
        elif token in "}]":
            inner, start = nodes.pop(), starts.pop()
            pairs = list(zip(inner[::2], inner[1::2]))
            nodes[-1].append(
                yaml.MappingNode("", pairs, start, mark) if token == "}" else yaml.SequenceNode("", inner, start, mark)
            )
        elif token.startswith('"'):
            nodes[-1].append(yaml.ScalarNode("", json.loads(token), mark, mark, style='"'))
        else:
            nodes[-1].append(yaml.ScalarNode("", token, mark, mark))
    return nodes[0][0]


def _constant(name: str) -> None:
    raise ScalarError(f"{name} is not a finite number", "leave the key out")
