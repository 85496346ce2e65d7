"""JSON of traced strings: what a template's `tojson` writes, with the origin of its characters."""

import json
from typing import Any

from treering.data.chat.traced import Part, Source, Traced, concat, holds_traced, opaque, plain, plain_inside


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As `json.dumps` writes it, traced. Brackets, commas and numbers belong to the texts beside them."""
    if not holds_traced(value):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if isinstance(indent, int):
        indent = " " * indent
    between, colon = separators or (", " if indent is None else ",", ": ")
    made: list[tuple[str, bool]] = []  # texts, and whether they are only syntax

    def syntax(text: str) -> None:
        made.append((text, True))

    def write(value: Any, level: int) -> None:
        if isinstance(value, str):
            made.append((_quoted(value, ensure_ascii), False))
        elif isinstance(value, dict) and value:
            items = sorted(value.items()) if sort_keys else value.items()
            bracketed("{}", [(key, entry) for key, entry in items], level)
        elif isinstance(value, list | tuple) and value:
            bracketed("[]", [(None, entry) for entry in value], level)
        else:
            syntax(json.dumps(plain_inside(value), ensure_ascii=ensure_ascii))

    def bracketed(brackets: str, items: list[tuple[Any, Any]], level: int) -> None:
        line = "" if indent is None else "\n" + indent * (level + 1)
        syntax(brackets[0] + line)
        for i, (key, entry) in enumerate(items):
            if i:
                syntax(between + line)
            if brackets == "{}":
                made.append((_quoted(key if isinstance(key, str) else _key(key), ensure_ascii), False))
                syntax(colon)
            write(entry, level + 1)
        syntax(("" if indent is None else "\n" + indent * level) + brackets[1])

    write(value, 0)
    before, behind = _near(made), _near(made[::-1])[::-1]
    return concat([_owned(text, *around) if mere else text for (text, mere), *around in zip(made, before, behind)])


def _near(made: list[tuple[str, bool]]) -> list[Source | None]:
    """For each text of the JSON the last source before it."""
    sources: list[Source | None] = []
    last = None
    for text, _ in made:
        sources.append(last)
        if isinstance(text, Traced):
            last = next((part.source for part in text._parts if part.source), last)
    return sources


def _owned(text: str, before: Source | None, behind: Source | None) -> str:
    """Syntax between two texts of the same turn belongs to them: numbers and brackets are no text of the template."""
    source = before or behind
    if source is None or (before and behind and before.turn != behind.turn):
        return text
    return Traced(text, (Part(len(text), source),))


def _key(key: Any) -> str:
    written = json.dumps({key: 0})
    return json.loads(written[1 : written.rindex(":")])


def _quoted(text: str, ensure_ascii: bool) -> str:
    written = json.dumps(plain(text), ensure_ascii=ensure_ascii)
    if not isinstance(text, Traced):
        return written
    if len(written) == len(text) + 2:  # nothing was escaped, so each character is still itself
        source = next((part.source for part in text._parts if part.source is not None), None)
        edge = Traced('"', (Part(1, source),))
        return concat((edge, text, edge))
    return opaque(written, (text,), complete=True)
