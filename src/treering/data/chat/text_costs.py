"""How much the operations of a template can write or look at, from their inputs: what no limit on lengths shows."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from treering.data.chat.traced import Traced

LARGE = 1 << 14  # characters from which on pieces and matches are counted before an operation runs
REVERSE = frozenset({"rfind", "rindex", "rsplit", "rpartition"})  # searches without a bound better than n · m
ITERATING = frozenset({"batch", "groupby", "join", "list", "map", "max", "min", "reject", "rejectattr", "reverse"})
ITERATING |= {"select", "selectattr", "slice", "sort", "sum", "unique"}  # filters that read a text by characters
_SPLITTING = {"split", "rsplit", "splitlines"}
_WORDS = {"title", "wordcount"}
_PIECE = 16  # what is charged for a character that may become a text of its own, which has fifty bytes
_WIDE = re.compile(r"[0-9]{5,}|:[^{}]*\{|%[^%a-zA-Z]*\*")  # a wide field, or one whose width is a value
_DIGITS = re.compile(r"[0-9]+")
_DASHES, _WORDS_OF_TEXT = re.compile(r"-{2,}"), re.compile(r"\S+")


def is_wide(text: str) -> bool:
    """Whether a format has a field that is wide, or whose width is a value."""
    return _WIDE.search(text) is not None


def widths(text: str) -> int:
    """Return at least the sum of the widths and precisions of a format's fields."""
    return sum(int(digits[0]) for digits in _DIGITS.finditer(text))


def parts_of(name: str, subject: str, arguments: list[Any]) -> int:
    """Return at least how many parts a method or filter makes of a long text; 0 for others."""
    length = len(subject)
    if name in ITERATING:
        return length
    if name in _WORDS:
        return length // 4
    if length < LARGE:
        return 0
    if name in _SPLITTING:
        separator = next((value for value in arguments if isinstance(value, str)), "")
        pieces = subject.count(separator) if separator else length // 2
        return pieces if isinstance(subject, Traced) else pieces // 2
    if name == "replace" and isinstance(subject, Traced):
        return subject.count(str(arguments[0])) if arguments else 0
    return 0


def reverse_search(subject: str, arguments: list[Any]) -> int:
    """Return the most comparisons of characters of a search from the end."""
    return len(subject) * max([len(value) for value in arguments if isinstance(value, str)], default=1)


def wrapping(text: str, arguments: list[Any]) -> int:
    """Return the most characters that `wordwrap` writes, copies and looks at."""
    width = next((value for value in arguments if type(value) is int and value > 0), 79)
    between = max([len(value) for value in arguments if isinstance(value, str)], default=1)
    words, dashes = (sum(len(run[0]) ** 2 for run in runs.finditer(text)) for runs in (_WORDS_OF_TEXT, _DASHES))
    return (len(text) + 1) * (between + _PIECE) + words // width + 8 * dashes


def indenting(text: str, arguments: list[Any]) -> int:
    """Return the most characters that `indent` adds."""
    return (len(text) + 1) * (max([len(value) for value in arguments if isinstance(value, str)], default=4) + _PIECE)


def json_layout(value: Any, arguments: list[Any]) -> int:
    """Return the most characters that separators and indents add to JSON."""
    given = [inner for outer in arguments for inner in (outer if isinstance(outer, list | tuple) else [outer])]
    widest = max([len(entry) for entry in given if isinstance(entry, str)], default=0)
    return _levels(value, 1) * widest if widest else 0


def tags(text: str) -> int:
    """Return the most characters that `striptags` copies: the rest of the text for each tag, and the words."""
    return (min(text.count("<"), text.count(">")) + _PIECE) * len(text)


def summing(values: Any) -> int:
    """Return the most characters, eight for an item, that `sum` copies: a list grows with each item."""
    if not isinstance(values, Iterable) or all(isinstance(value, int | float) for value in values):
        return 0
    items = sum(len(value) if hasattr(value, "__len__") else 1 for value in values)
    return 8 * items * sum(1 for _ in values)


def _levels(value: Any, level: int) -> int:
    """Return the sum, over all values inside, of how deep they are."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple | range):
        return level
    return level * len(value) + sum([_levels(inner, level + 1) for inner in value])
