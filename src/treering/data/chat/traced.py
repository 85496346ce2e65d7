"""Traced strings, which record for each of their characters the text of the data that it came from.

A chat template mixes its own text (headers, control tokens) with texts of the data. In the rendered text the two cannot
be distinguished, and data may imitate a template. So the origin of each character is recorded while the template runs:
the texts of the data are `Traced` strings, and all strings computed from them are traced as well. A traced string
compares, searches and prints like an ordinary one, so a template decides exactly what it decides without tracing.
"""

import bisect
import itertools
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any, SupportsIndex

from treering.data.chat.traced_parts import TracedPart, append_part, part_of_all

_SEVERAL = (list, tuple, KeysView, ValuesView, ItemsView, set, frozenset)


def _casing(method: Callable[[str], str]) -> Callable[..., str]:
    """Return a method of str that changes characters in place, traced."""

    def cased(self: "Traced") -> str:
        text = method(plain(self))
        return Traced(text, self._parts) if len(text) == len(self) else opaque(text, (self,), complete=True)

    cased.__name__ = method.__name__
    return cased


def _padding(method: Callable[..., str]) -> Callable[..., str]:
    """Return a method of str that adds blanks or digits, traced as one part."""

    def padded(self: "Traced", *args: Any, **kwargs: Any) -> str:
        return opaque(method(plain(self), *args, **kwargs), (self,), complete=True)

    padded.__name__ = method.__name__
    return padded


class Traced(str):
    """A string with the origin of its characters. Templates cannot read `_parts`: it begins with an underscore."""

    __slots__ = ("_ends", "_parts")
    _parts: tuple[TracedPart, ...]
    _ends: list[int]  # where each part ends; computed for the first cut

    def __new__(cls, text: str, parts: tuple[TracedPart, ...] | None = None) -> "Traced":
        string = super().__new__(cls, text)
        string._parts = (TracedPart(len(text)),) if parts is None else parts
        return string

    def __str__(self) -> str:
        return self  # `str(x)` in a template's code keeps the origin

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
                complete = rewritten and self._only_edges(at, at + low) and self._only_edges(at + high, self._ends[i])
                parts.append(part if high - low == part.length else part.cut(low, high, complete))
            elif part.length == 0:  # represents a text that was replaced here
                parts.append(part)
        return type(self)(str.__getitem__(self, slice(begin, end)), tuple(parts))

    def _only_edges(self, begin: int, end: int) -> bool:
        """Whether these characters are only blanks and quotes, as around a value."""
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

    def _three(self, pieces: tuple[str, str, str]) -> tuple[str, str, str]:
        first, second = len(pieces[0]), len(pieces[0]) + len(pieces[1])
        return self._cut(0, first), self._cut(first, second), self._cut(second, len(self))

    def _located(self, pieces: list[str], between: int = 0) -> list[str]:
        """Return these pieces traced; they are in this order, at least `between` characters apart."""
        text, at, located = plain(self), 0, []
        for piece in pieces:
            begin = text.index(piece, at)
            at = begin + len(piece) + between
            located.append(self._cut(begin, begin + len(piece)))
        return located

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:  # type: ignore[override]
        text, limit = plain(self), int(count)
        if not old:
            return opaque(text.replace(old, plain(new), limit), (self, new), complete=True)
        pieces: list[str] = []
        at = 0
        while limit != 0 and (begin := text.find(old, at)) >= 0:
            pieces += (self._cut(at, begin), new)
            if new.strip():
                pieces.append(_replaced(self._cut(begin, begin + len(old))))
            at, limit = begin + len(old), limit - 1
        if not pieces:
            return self
        result = concat((*pieces, self._cut(at, len(self))))
        return result if isinstance(result, Traced) else Traced(result)

    def join(self, items: Iterable[str], /) -> str:
        pieces: list[str] = []
        for item in items:
            if pieces:
                pieces.append(self)
            pieces.append(item)
        return concat(pieces)

    lower = _casing(str.lower)
    upper = _casing(str.upper)
    title = _casing(str.title)
    capitalize = _casing(str.capitalize)
    swapcase = _casing(str.swapcase)
    casefold = _casing(str.casefold)
    center = _padding(str.center)
    ljust = _padding(str.ljust)
    rjust = _padding(str.rjust)
    zfill = _padding(str.zfill)
    expandtabs = _padding(str.expandtabs)

    def translate(self, table: Any, /) -> str:
        return opaque(plain(self).translate(table), (self, table))


_LONGEST_EDGE = 64
_EDGES = " \t\r\n\"'"  # around a value that JSON writes
PRODUCING = {"join", "replace", "center", "ljust", "rjust", "translate"}  # their results contain their arguments


def plain(text: str) -> str:
    """Return the same characters without their origin."""
    return str.__str__(text)


def plain_inside(value: Any) -> Any:
    """Return `value` with each string in it plain."""
    if isinstance(value, str):
        return plain(value) if isinstance(value, Traced) else value
    if isinstance(value, Mapping):
        return {plain_inside(key): plain_inside(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([plain_inside(entry) for entry in value]) if type(value) in (list, tuple) else value
    return [plain_inside(entry) for entry in value] if isinstance(value, _SEVERAL) else value


def concat(pieces: Iterable[str]) -> str:
    """Return the pieces joined, traced if one of them is."""
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
            append_part(parts, part)
    if not parts:
        return "".join(pieces)
    if literal:
        parts.append(TracedPart(literal))
    return Traced("".join(pieces), tuple(parts))


def _replaced(text: str) -> str:
    """Return an empty string that represents all of `text`, which was replaced by something else."""
    parts = text._parts if isinstance(text, Traced) else ()
    return Traced("", tuple(part._replace(length=0) for part in parts if part.source))


def holds_traced(value: Any) -> bool:
    """Whether a string in `value` is traced."""
    if isinstance(value, str):
        return isinstance(value, Traced)
    if isinstance(value, Mapping):
        return any(holds_traced(key) or holds_traced(entry) for key, entry in value.items())
    return isinstance(value, _SEVERAL) and any(map(holds_traced, value))


def opaque(text: str, inputs: Iterable[Any], *, complete: bool = False) -> str:
    """Return `text`, the result of an operation on `inputs` that is not traced character by character.

    `complete`: the operation leaves nothing out; else a part that does not occur in the result counts as left out.
    """
    parts = part_of_all(text, *_collected(list(inputs)), complete=complete)
    return text if parts is None else Traced(text, parts)


def _collected(value: Any) -> tuple[list[TracedPart], bool]:
    """Return the parts of all strings in `value`, and whether some text in them is the template's."""
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
            entry_parts, entry_literal = _collected(entry)
            parts += entry_parts
            literal = literal or entry_literal
    return parts, literal


def _ends(text: Traced, characters: str | None, *, left: bool, right: bool) -> tuple[int, int]:
    string = plain(text)
    begin = len(string) - len(string.lstrip(characters)) if left else 0
    end = len(string.rstrip(characters)) if right else len(string)
    return begin, max(begin, end)
