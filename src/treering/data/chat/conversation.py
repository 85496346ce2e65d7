"""Conversations with traced texts, and the texts that a rendering leaves out."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from treering.data.chat.messages import THOUGHTS
from treering.data.chat.traced import Traced
from treering.data.chat.traced_parts import FieldPath, TextSource, TracedPart

TOOLS = -1  # the turn of texts that belong to no message
_REQUIRED_OF_CALL = ("name", "arguments")
Span = tuple[int, int]


class Conversation(NamedTuple):
    """Messages and tools with traced strings, and the sources of these strings."""

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
    """Return a copy of the messages and tools in which every string is traced."""
    sources: list[TextSource] = []
    traced_messages = [_traced_message(message, turn, sources) for turn, message in enumerate(messages)]
    return Conversation(
        messages=traced_messages, tools=tools and traced(tools, TOOLS, ("tools",), sources, False), sources=sources
    )


def _traced_message(message: dict[str, Any], turn: int, sources: list[TextSource]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for field, value in message.items():
        if field == "role" or value is None:
            fields[field] = value
        elif field == "tool_calls":
            fields[field] = [_traced_call(call, turn, (field, i), sources) for i, call in enumerate(value)]
        elif field in THOUGHTS and (same := next((fields[f] for f in THOUGHTS if fields.get(f) == value), None)):
            fields[field] = same
        else:
            fields[field] = traced(value, turn, (field,), sources, field == "content" or field in THOUGHTS)
    return fields


def _traced_call(
    call: dict[str, Any], turn: int, path: tuple[str | int, ...], sources: list[TextSource]
) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for field, value in call.items():
        if field == "function" and isinstance(value, dict):
            fields[field] = _traced_call(value, turn, (*path, field), sources)
        else:
            fields[field] = traced(value, turn, (*path, field), sources, field in _REQUIRED_OF_CALL)
    return fields


def traced(value: Any, turn: int, path: FieldPath, sources: list[TextSource], required: bool) -> Any:
    """Return `value` with each string in it traced; the sources of the strings are appended to `sources`."""
    if isinstance(value, str):
        source = TextSource(turn, path, value, required)
        sources.append(source)
        return Traced(value, (TracedPart(len(value), source, 0, len(value)),))
    if isinstance(value, dict):
        return {
            traced(key, turn, (*path, "key", key), sources, required): traced(
                entry, turn, (*path, key), sources, required
            )
            for key, entry in value.items()
        }
    if isinstance(value, list):
        return [traced(entry, turn, (*path, i), sources, required) for i, entry in enumerate(value)]
    return value


def pieces_of(texts: Iterable[str]) -> list[TextPiece]:
    """Return the pieces of texts of the data in these texts, which follow one another."""
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
    """Whether a part of the same text continues the last piece, both of them unchanged."""
    verbatim = length == stop - start and last.end - last.begin == last.stop - last.start
    return verbatim and last.end == at and last.stop == start and not (mixed or last.mixed)


def left_out(sources: Sequence[TextSource], pieces: Iterable[TextPiece]) -> Iterator[tuple[TextSource, list[Span]]]:
    """Yield each required source that `pieces` do not show completely, and the missing ranges, stripped of blanks."""
    complete: set[int] = set()
    partial: dict[int, list[Span]] = {}
    for piece in pieces:
        key = id(piece.source)
        if piece.stop - piece.start == len(piece.source.text):
            complete.add(key)
        else:
            partial.setdefault(key, []).append((piece.start, piece.stop))
    for source in sources:
        if not source.required or id(source) in complete or not source.text.strip():
            continue
        missing = []
        at = 0
        for start, stop in [*sorted(partial.get(id(source), ())), (len(source.text), len(source.text))]:
            text = source.text[at:start]
            if text.strip():
                missing.append((at + len(text) - len(text.lstrip()), at + len(text.rstrip())))
            at = max(at, stop)
        if missing:
            yield source, missing


def forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages in the forms of tool calls that templates expect, the given form first.

    Arguments are an object or a string of JSON; a turn that only calls tools has no content, null or an empty string.
    """
    if not any("tool_calls" in message for message in messages):
        yield messages
        return
    yielded = []
    for as_object in (True, False):
        for empty in ("as given", "absent", None, ""):
            form = [_in_form(message, as_object, empty) for message in messages]
            if form not in yielded:
                yielded.append(form)
                yield form


def _in_form(message: dict[str, Any], as_object: bool, empty: str | None) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    changed = {**message, "tool_calls": [_call_in_form(call, as_object) for call in message["tool_calls"]]}
    if empty != "as given" and not message.get("content"):
        changed.pop("content", None)
        if empty != "absent":
            changed["content"] = empty
    return changed


def _call_in_form(call: dict[str, Any], as_object: bool) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call_in_form(call["function"], as_object)}
    if "arguments" not in call:
        return call
    arguments = call["arguments"]
    if as_object:
        return {**call, "arguments": json.loads(arguments.strip() or "{}") if isinstance(arguments, str) else arguments}
    return {**call, "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)}
