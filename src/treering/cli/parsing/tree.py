"""Events to nested values and a map from path to line, without recursion and within bounds."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from treering.cli.parsing.events import Event, Refused
from treering.cli.parsing.problems import Path
from treering.cli.parsing.scalars import ScalarError
from treering.cli.text import short

MAX_DEPTH = 32
MAX_NODES = 20_000  # after aliases are followed: a "billion laughs" file stops here
MAX_TEXT = 200_000  # of one scalar


@dataclass
class _Open:
    """A mapping or list that has not ended yet."""

    value: dict[str, Any] | list[Any]
    path: Path
    line: int
    anchor: str | None
    key: Event | None = None
    seen: dict[str, int] = field(default_factory=dict)
    start: int = 0


@dataclass
class _Tree:
    lines: dict[Path, int] = field(default_factory=dict)
    anchors: dict[str, tuple[Any, int]] = field(default_factory=dict)  # name -> value and how many nodes it is
    stack: list[_Open] = field(default_factory=list)
    nodes: int = 0
    root: Any = None

    def add(self, event: Event) -> None:
        if event.kind == "end":
            self._close()
            return
        top = self.stack[-1] if self.stack else None
        if top is not None and isinstance(top.value, dict) and top.key is None:
            self._key(top, event)
            return
        path = self._path(top)
        self.lines[path] = top.key.line if top is not None and top.key else event.line
        self._count(1, event.line)
        if event.kind == "scalar":
            self._place(top, _scalar(event))
            self._anchor(event, self.root if top is None else _last(top), 1)
            self._done(top)
        elif event.kind == "alias":
            self._place(top, self._alias(event))
            self._done(top)
        else:
            if len(self.stack) >= MAX_DEPTH:
                raise Refused(event.line, "it is nested too deeply", "a configuration has a few levels")
            value: dict[str, Any] | list[Any] = {} if event.kind == "mapping" else []
            self._place(top, value)
            self.stack.append(_Open(value, path, event.line, event.anchor, start=self.nodes))

    def _path(self, top: _Open | None) -> Path:
        if top is None:
            return ()
        if isinstance(top.value, list):
            return (*top.path, len(top.value))
        assert top.key is not None
        return (*top.path, top.key.text)

    def _key(self, top: _Open, event: Event) -> None:
        text = event.text
        if event.kind != "scalar":
            raise Refused(event.line, f"a key is {_article(event.kind)}", "keys are words")
        if not text:
            raise Refused(event.line, "a key is empty", "write a name before the colon")
        if text == "<<":
            raise Refused(event.line, "merge keys (<<) are not allowed", "write the keys out")
        if text in top.seen:
            message = f"{short(text, 60)} was already given in line {top.seen[text]}"
            raise Refused(event.line, message, "keep one of the two")
        _printable(text, event.line)
        top.seen[text] = event.line
        top.key = event

    def _place(self, top: _Open | None, value: Any) -> None:
        if top is None:
            self.root = value
        elif isinstance(top.value, list):
            top.value.append(value)
        else:
            assert top.key is not None
            top.value[top.key.text] = value

    def _done(self, top: _Open | None) -> None:
        if top is not None:
            top.key = None

    def _close(self) -> None:
        closed = self.stack.pop()
        if closed.anchor:
            self.anchors[closed.anchor] = (closed.value, self.nodes - closed.start + 1)
        self._done(self.stack[-1] if self.stack else None)

    def _anchor(self, event: Event, value: Any, nodes: int) -> None:
        if event.anchor:
            self.anchors[event.anchor] = (value, nodes)

    def _alias(self, event: Event) -> Any:
        if event.anchor not in self.anchors:
            raise Refused(
                event.line, f"*{short(event.anchor or '', 40)} has no finished anchor above", "write the value out"
            )
        value, nodes = self.anchors[event.anchor]
        self._count(nodes, event.line)
        if len(self.stack) + _height(value) > MAX_DEPTH:
            raise Refused(event.line, "it is nested too deeply", "a configuration has a few levels")
        return _copy(value)

    def _count(self, nodes: int, line: int) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise Refused(
                line, f"it has more than {MAX_NODES:,} values", "a configuration is a page of text; is this the data?"
            )


def build(events: Iterable[Event]) -> tuple[Any, dict[Path, int]]:
    """The value that `events` describe, and the line of each path in it."""
    tree = _Tree()
    for event in events:
        tree.add(event)
    return tree.root, tree.lines


def _last(top: _Open) -> Any:
    return top.value[-1] if isinstance(top.value, list) else top.value[top.key.text]  # type: ignore[union-attr]


def _height(value: Any) -> int:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_height, inner), default=0)


def _copy(value: Any) -> Any:
    # An alias may be overridden later by `--set`; its anchor must not change with it.
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _scalar(event: Event) -> Any:
    if isinstance(event.value, ScalarError):
        raise Refused(event.line, str(event.value), event.value.remedy)
    if isinstance(event.value, str):
        _printable(event.value, event.line)
    return event.value


def _printable(text: str, line: int) -> None:
    if len(text) > MAX_TEXT:
        raise Refused(line, f"a text of {len(text):,} characters", "put long text into a file")
    if "\0" in text:
        raise Refused(line, "a NUL character in a text", "remove it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(line, "half of a surrogate pair in a text", "write the character itself") from None


def _article(kind: str) -> str:
    return {"mapping": "a mapping", "list": "a list", "alias": "an alias"}.get(kind, kind)
