"""The origin of characters: texts of the data, and the parts of a string that come from them or from a template."""

from collections.abc import Sequence
from typing import NamedTuple

FieldPath = tuple[str | int, ...]


class TextSource(NamedTuple):
    """A string of a conversation, at `path` of message `turn` (-1: the tools)."""

    turn: int
    path: FieldPath
    text: str
    required: bool  # a rendering must not leave it out

    @property
    def field(self) -> FieldPath:
        """The field of the message: its content, its thought, or the name or arguments of a call."""
        return self.path[:4] if self.path[0] == "tool_calls" else self.path[:1]


class TracedPart(NamedTuple):
    """`length` characters of a traced string. Without a source they are the template's.

    Otherwise they are the characters [start, stop) of the source: unchanged if the lengths are equal, else rewritten
    (as JSON writes a quote as two characters). `mixed`: text of the template may be among them.
    """

    length: int
    source: TextSource | None = None
    start: int = 0
    stop: int = 0
    mixed: bool = False

    def cut(self, low: int, high: int, complete: bool) -> "TracedPart":
        """Return its characters [low, high). `complete`: if it was rewritten, only blanks and quotes are cut off."""
        if self.source is None or (self.stop - self.start != self.length and complete):
            return self._replace(length=high - low)
        if self.stop - self.start != self.length:  # it is not known which characters of the source these are
            return self._replace(length=high - low, stop=self.start)
        return self._replace(length=high - low, start=self.start + low, stop=self.start + high)


class MixedTextsError(Exception):
    """Texts of several messages went through an operation whose result cannot be traced character by character."""


def append_part(parts: list[TracedPart], part: TracedPart) -> None:
    """Add a part of the data, joined with the last part if it continues it."""
    last = parts[-1] if parts else None
    if last is not None and part.source is last.source:
        verbatim = part.length == part.stop - part.start and last.length == last.stop - last.start
        if verbatim and part.start == last.stop and not (part.mixed or last.mixed):
            parts[-1] = TracedPart(last.length + part.length, last.source, last.start, part.stop)
            return
    parts.append(part)


def part_of_all(
    text: str, parts: Sequence[TracedPart], literal: bool, *, complete: bool
) -> tuple[TracedPart, ...] | None:
    """Return the parts of `text`, which an operation computed from strings with `parts`; None without a source.

    Args:
        literal: whether text of the template was among the strings.
        complete: the operation leaves nothing out; else a part that does not occur in `text` counts as left out.
    """
    used = [part for part in parts if part.source is not None]
    if not used:
        return None
    if not complete:
        used = [part if _occurs(part, text) else part._replace(stop=part.start) for part in used]
    if len({part.source.turn for part in used if part.source is not None}) > 1:
        raise MixedTextsError
    first, *rest = used
    mixed = literal or any(part.mixed for part in used)
    all_of_it = TracedPart(len(text), first.source, first.start, first.stop, mixed)
    return (all_of_it, *(part._replace(length=0) for part in rest))


def _occurs(part: TracedPart, text: str) -> bool:
    assert part.source is not None
    return part.source.text[part.start : part.stop].strip() in text
