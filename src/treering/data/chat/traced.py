"""Strings that know which text of the data each of their characters came from.

A chat template mixes its own text (headers, control tokens) with texts of the data (what people wrote). In the rendered
text both look alike, so data that imitates a template cannot be told from it afterwards. So the origin of every
character is recorded while the template runs: each text of the data enters as a `Traced` string, and every string that
is computed from it is traced as well. A traced string compares, searches and prints like an ordinary one, so a template
decides exactly what it would decide without tracing.
"""

import bisect
import itertools
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any, NamedTuple, SupportsIndex

FieldPath = tuple[str | int, ...]


class TextSource(NamedTuple):
    """One string of a conversation: message `turn` (-1: the tools) has it at `path`."""

    turn: int
    path: FieldPath
    text: str
    required: bool  # a rendering that leaves it out loses something

    @property
    def field(self) -> FieldPath:
        """The part of the message that it belongs to: its content, its thought, or a name or arguments of a call."""
        return self.path[:4] if self.path[0] == "tool_calls" else self.path[:1]


class TracedPart(NamedTuple):
    """`length` characters of a traced string. Without a source they are the template's own.

    Otherwise they show the characters [start, stop) of the source, one by one if the lengths are equal, else rewritten
    (as JSON writes a quote as two characters). `mixed`: text of the template may be among them.
    """

    length: int
    source: TextSource | None = None
    start: int = 0
    stop: int = 0
    mixed: bool = False

    def cut(self, low: int, high: int, whole: bool) -> "TracedPart":
        """Its characters [low, high). `whole`: nothing is lost, if it was rewritten: what is cut off are blanks."""
        if self.source is None or (self.stop - self.start != self.length and whole):
            return self._replace(length=high - low)
        if self.stop - self.start != self.length:  # which characters of the source these are is not known
            return self._replace(length=high - low, stop=self.start)
        return self._replace(length=high - low, start=self.start + low, stop=self.start + high)


_SEVERAL = (list, tuple, KeysView, ValuesView, ItemsView, set, frozenset)


class MixedTextsError(Exception):
    """Texts of several messages went through an operation whose result cannot be traced character by character."""


class Traced(str):
    """A string with the origin of its characters. `_parts` has an underscore to be out of reach for templates."""

    __slots__ = ("_ends", "_parts")
    _parts: tuple[TracedPart, ...]
    _ends: list[int]  # where each part ends; made when it is first cut

    def __new__(cls, text: str, parts: tuple[TracedPart, ...] | None = None) -> "Traced":
        made = super().__new__(cls, text)
        made._parts = (TracedPart(len(text)),) if parts is None else parts
        return made

    def __str__(self) -> str:
        return self  # `str(x)` in a template's code must not forget the origin

    def __add__(self, other: str) -> str:
        return concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> str:
        return concat([self] * int(times))

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        return opaque(plain(self) % plain_inside(values), (self, values))

    def __iter__(self) -> Iterator[str]:
        return (self._cut(i, i + 1) for i in range(len(self)))

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if not isinstance(key, slice):
            at = range(len(self))[key]
            return self._cut(at, at + 1)
        begin, end, step = key.indices(len(self))
        if step == 1:
            return self._cut(begin, max(begin, end))
        return concat([self._cut(i, i + 1) for i in range(begin, end, step)])

    def _cut(self, begin: int, end: int) -> str:
        if begin == 0 and end == len(self):
            return self
        if not hasattr(self, "_ends"):
            self._ends = list(itertools.accumulate(part.length for part in self._parts))
        parts = []
        for i in range(bisect.bisect_left(self._ends, begin), len(self._parts)):
            part = self._parts[i]
            at = self._ends[i] - part.length
            if at > end or (at == end and part.length):
                break
            low, high = max(begin - at, 0), min(end - at, part.length)
            if low < high:
                rewritten = part.source is not None and part.stop - part.start != part.length
                whole = rewritten and self._only_edges(at, at + low) and self._only_edges(at + high, self._ends[i])
                parts.append(part if high - low == part.length else part.cut(low, high, whole))
            elif part.length == 0:  # stands for what was replaced here
                parts.append(part)
        return type(self)(str.__getitem__(self, slice(begin, end)), tuple(parts))

    def _only_edges(self, begin: int, end: int) -> bool:
        """Whether these characters are only what stands around a value."""
        return end - begin <= _LONGEST_EDGE and not str.__getitem__(self, slice(begin, end)).strip(_EDGES)

    def strip(self, characters: str | None = None, /) -> str:
        return self._cut(*_ends(self, characters, left=True, right=True))

    def lstrip(self, characters: str | None = None, /) -> str:
        return self._cut(*_ends(self, characters, left=True, right=False))

    def rstrip(self, characters: str | None = None, /) -> str:
        return self._cut(*_ends(self, characters, left=False, right=True))

    def removeprefix(self, prefix: str, /) -> str:
        return self._cut(len(prefix), len(self)) if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> str:
        return self._cut(0, len(self) - len(suffix)) if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:  # type: ignore[override]
        return self._located(plain(self).split(sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:  # type: ignore[override]
        return self._located(plain(self).rsplit(sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:  # type: ignore[override]
        return self._located(plain(self).splitlines(keepends))

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        return self._three(plain(self).partition(sep))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        return self._three(plain(self).rpartition(sep))

    def _three(self, found: tuple[str, str, str]) -> tuple[str, str, str]:
        first, second = len(found[0]), len(found[0]) + len(found[1])
        return self._cut(0, first), self._cut(first, second), self._cut(second, len(self))

    def _located(self, pieces: list[str], between: int = 0) -> list[str]:
        """Pieces that stand in this order, at least `between` characters apart."""
        text, at, made = plain(self), 0, []
        for piece in pieces:
            begin = text.index(piece, at)
            at = begin + len(piece) + between
            made.append(self._cut(begin, begin + len(piece)))
        return made

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:  # type: ignore[override]
        text, limit = plain(self), int(count)
        if not old:
            return opaque(text.replace(old, plain(new), limit), (self, new), complete=True)
        made: list[str] = []
        at = 0
        while limit != 0 and (found := text.find(old, at)) >= 0:
            made += (self._cut(at, found), new)
            if new.strip():
                made.append(_shown(self._cut(found, found + len(old))))
            at, limit = found + len(old), limit - 1
        if not made:
            return self
        rest = concat((*made, self._cut(at, len(self))))
        return rest if isinstance(rest, Traced) else Traced(rest)

    def join(self, items: Iterable[str], /) -> str:
        made: list[str] = []
        for item in items:
            if made:
                made.append(self)
            made.append(item)
        return concat(made)

    def lower(self) -> str:
        return self._changed(plain(self).lower())

    def upper(self) -> str:
        return self._changed(plain(self).upper())

    def title(self) -> str:
        return self._changed(plain(self).title())

    def capitalize(self) -> str:
        return self._changed(plain(self).capitalize())

    def swapcase(self) -> str:
        return self._changed(plain(self).swapcase())

    def casefold(self) -> str:
        return self._changed(plain(self).casefold())

    def center(self, width: SupportsIndex, fill: str = " ", /) -> str:
        return opaque(plain(self).center(width, fill), (self,), complete=True)

    def ljust(self, width: SupportsIndex, fill: str = " ", /) -> str:
        return opaque(plain(self).ljust(width, fill), (self,), complete=True)

    def rjust(self, width: SupportsIndex, fill: str = " ", /) -> str:
        return opaque(plain(self).rjust(width, fill), (self,), complete=True)

    def zfill(self, width: SupportsIndex, /) -> str:
        return opaque(plain(self).zfill(width), (self,), complete=True)

    def expandtabs(self, tabsize: SupportsIndex = 8) -> str:  # type: ignore[override]
        return opaque(plain(self).expandtabs(tabsize), (self,), complete=True)

    def translate(self, table: Any, /) -> str:
        return opaque(plain(self).translate(table), (self, table))

    def _changed(self, text: str) -> str:
        return Traced(text, self._parts) if len(text) == len(self) else opaque(text, (self,), complete=True)


_LONGEST_EDGE = 64
_EDGES = " \t\r\n\"'"  # around a value that JSON writes
PRODUCING = {"join", "replace", "center", "ljust", "rjust", "translate"}  # their results hold what they are given


def traced(value: Any, turn: int, path: FieldPath, sources: list[TextSource], required: bool) -> Any:
    """`value` with every string in it traced; their sources are appended to `sources`."""
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


def plain(text: str) -> str:
    """The same characters without their origin."""
    return str.__str__(text)


def plain_inside(value: Any) -> Any:
    """`value` with every string in it plain."""
    if isinstance(value, str):
        return plain(value) if isinstance(value, Traced) else value
    if isinstance(value, Mapping):
        return {plain_inside(key): plain_inside(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([plain_inside(entry) for entry in value]) if type(value) in (list, tuple) else value
    return [plain_inside(entry) for entry in value] if isinstance(value, _SEVERAL) else value


def concat(pieces: Iterable[str]) -> str:
    """The pieces one after another, traced if one of them is."""
    pieces = list(pieces)
    parts: list[TracedPart] = []
    literal = 0  # characters without a source, since the last part
    for piece in pieces:
        if not isinstance(piece, Traced):
            literal += len(piece)
            continue
        for part in piece._parts:
            if part.source is None:
                literal += part.length
                continue
            if literal:
                parts.append(TracedPart(literal))
                literal = 0
            _append(parts, part)
    if not parts:
        return "".join(pieces)
    if literal:
        parts.append(TracedPart(literal))
    return Traced("".join(pieces), tuple(parts))


def _shown(text: str) -> str:
    """No characters, which stand for all of `text`: something else was written in its place."""
    parts = text._parts if isinstance(text, Traced) else ()
    return Traced("", tuple(part._replace(length=0) for part in parts if part.source))


def _append(parts: list[TracedPart], part: TracedPart) -> None:
    """Add a part of the data, as one with the last one where the two continue each other."""
    last = parts[-1] if parts else None
    if last is not None and part.source is last.source:
        verbatim = part.length == part.stop - part.start and last.length == last.stop - last.start
        if verbatim and part.start == last.stop and not (part.mixed or last.mixed):
            parts[-1] = TracedPart(last.length + part.length, last.source, last.start, part.stop)
            return
    parts.append(part)


def holds_traced(value: Any) -> bool:
    """Whether a string in `value` is traced."""
    if isinstance(value, str):
        return isinstance(value, Traced)
    if isinstance(value, Mapping):
        return any(holds_traced(key) or holds_traced(entry) for key, entry in value.items())
    return isinstance(value, _SEVERAL) and any(map(holds_traced, value))


def opaque(text: str, inputs: Iterable[Any], *, complete: bool = False) -> str:
    """The result of an operation on `inputs` that is not followed character by character. `complete`: the operation
    leaves nothing out; else what is not found in the result counts as left out."""
    parts, literal = _collected(list(inputs))
    used = [part for part in parts if part.source is not None]
    if not used:
        return text
    if not complete:
        used = [part if _found(part, text) else part._replace(stop=part.start) for part in used]
    turns = {part.source.turn for part in used if part.source is not None}
    if len(turns) > 1:
        raise MixedTextsError
    first, *rest = used
    mixed = literal or any(part.mixed for part in used)
    whole = TracedPart(len(text), first.source, first.start, first.stop, mixed)
    return Traced(text, (whole, *(part._replace(length=0) for part in rest)))


def _found(part: TracedPart, text: str) -> bool:
    assert part.source is not None
    return part.source.text[part.start : part.stop].strip() in text


def _collected(value: Any) -> tuple[list[TracedPart], bool]:
    """The parts of all strings in `value`, and whether some text in them is the template's own."""
    if isinstance(value, Traced):
        return list(value._parts), any(part.source is None and part.length for part in value._parts)
    if isinstance(value, str):
        return [], bool(value.strip())
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    parts: list[TracedPart] = []
    literal = False
    if isinstance(value, _SEVERAL):
        for entry in value:
            more, some = _collected(entry)
            parts += more
            literal = literal or some
    return parts, literal


def _ends(text: Traced, characters: str | None, *, left: bool, right: bool) -> tuple[int, int]:
    whole = plain(text)
    begin = len(whole) - len(whole.lstrip(characters)) if left else 0
    end = len(whole.rstrip(characters)) if right else len(whole)
    return begin, max(begin, end)
