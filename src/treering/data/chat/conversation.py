"""A conversation whose texts are traced, and which of them a rendering leaves out."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from treering.data.chat.messages import THOUGHTS
from treering.data.chat.traced import TextSource, Traced, TracedPart, traced

_CONTENT = ("content",)
TOOLS = -1  # the turn of what belongs to no message
_NEEDED_OF_CALL = ("name", "arguments")
Span = tuple[int, int]


class Conversation(NamedTuple):
    messages: list[dict[str, Any]]
    tools: Any
    sources: list[TextSource]


class TextPiece(NamedTuple):
    """The characters [begin, end) of a rendered text, which come from `source`, where they are [start, stop)."""

    begin: int
    end: int
    source: TextSource
    start: int
    stop: int
    mixed: bool


def trace(messages: Sequence[dict[str, Any]], tools: Any) -> Conversation:
    sources: list[TextSource] = []
    made = [_traced_message(message, turn, sources) for turn, message in enumerate(messages)]
    return Conversation(
        messages=made, tools=tools and traced(tools, TOOLS, ("tools",), sources, False), sources=sources
    )


def _traced_message(message: dict[str, Any], turn: int, sources: list[TextSource]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for field, value in message.items():
        if field == "role" or value is None:
            made[field] = value
        elif field == "content" and type(value) is str:
            source = TextSource(turn, _CONTENT, value, True)
            sources.append(source)
            made[field] = Traced(value, (TracedPart(len(value), source, 0, len(value)),))
        elif field == "tool_calls":
            made[field] = [_traced_call(call, turn, (field, i), sources) for i, call in enumerate(value)]
        elif field in THOUGHTS and (same := next((made[f] for f in THOUGHTS if made.get(f) == value), None)):
            made[field] = same
        else:
            made[field] = traced(value, turn, (field,), sources, field == "content" or field in THOUGHTS)
    return made


def _traced_call(
    call: dict[str, Any], turn: int, path: tuple[str | int, ...], sources: list[TextSource]
) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for field, value in call.items():
        if field == "function" and isinstance(value, dict):
            made[field] = _traced_call(value, turn, (*path, field), sources)
        else:
            made[field] = traced(value, turn, (*path, field), sources, field in _NEEDED_OF_CALL)
    return made


def pieces_of(texts: Iterable[str]) -> list[TextPiece]:
    """Where in these texts, one after another, which texts of the data stand."""
    pieces: list[TextPiece] = []
    at = 0
    for text in texts:
        if not isinstance(text, Traced):
            at += len(text)
            continue
        for length, source, start, stop, mixed in text._parts:
            if source is not None:
                last = pieces[-1] if pieces else None
                if last is not None and last.source is source and _continues(last, at, length, start, stop, mixed):
                    pieces[-1] = TextPiece(last.begin, at + length, source, last.start, stop, False)
                else:
                    pieces.append(TextPiece(at, at + length, source, start, stop, mixed))
            at += length
    return pieces


def _continues(last: TextPiece, at: int, length: int, start: int, stop: int, mixed: bool) -> bool:
    """Whether a part of the same text goes on where the last piece ends, both of them unchanged."""
    verbatim = length == stop - start and last.end - last.begin == last.stop - last.start
    return verbatim and last.end == at and last.stop == start and not (mixed or last.mixed)


def left_out(sources: Sequence[TextSource], pieces: Iterable[TextPiece]) -> Iterator[tuple[TextSource, list[Span]]]:
    """Each required source that `pieces` do not show whole, with the missing ranges, blanks around them aside."""
    whole: set[int] = set()
    some: dict[int, list[Span]] = {}
    for piece in pieces:
        key = id(piece.source)
        if piece.stop - piece.start == len(piece.source.text):
            whole.add(key)
        else:
            some.setdefault(key, []).append((piece.start, piece.stop))
    for source in sources:
        if not source.required or id(source) in whole or not source.text.strip():
            continue
        missing = []
        at = 0
        for start, stop in [*sorted(some.get(id(source), ())), (len(source.text), len(source.text))]:
            text = source.text[at:start]
            if text.strip():
                missing.append((at + len(text) - len(text.lstrip()), at + len(text.rstrip())))
            at = max(at, stop)
        if missing:
            yield source, missing


def forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The ways to write tool calls that templates expect: arguments as an object, or as a string of JSON; and a turn
    that only calls tools without content, with null, or with an empty one. As it is given comes first."""
    if not any("tool_calls" in message for message in messages):
        yield messages
        return
    seen = []
    for as_object in (True, False):
        for empty in ("as given", "absent", None, ""):
            form = [_in_form(message, as_object, empty) for message in messages]
            if form not in seen:
                seen.append(form)
                yield form


def _in_form(message: dict[str, Any], as_object: bool, empty: str | None) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    made = {**message, "tool_calls": [_call_in_form(call, as_object) for call in message["tool_calls"]]}
    if empty != "as given" and not message.get("content"):
        made.pop("content", None)
        if empty != "absent":
            made["content"] = empty
    return made


def _call_in_form(call: dict[str, Any], as_object: bool) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call_in_form(call["function"], as_object)}
    if "arguments" not in call:
        return call
    given = call["arguments"]
    if as_object:
        return {**call, "arguments": json.loads(given.strip() or "{}") if isinstance(given, str) else given}
    return {**call, "arguments": given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)}
