"""The allowance of a rendering, and the cost of its operations, which is charged before an operation runs."""

import re
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from jinja2.utils import Namespace

from treering.data.chat.traced import Traced

_BASE, _EACH = 1_000_000, 2_000  # units for any rendering, and for each value of the conversation
_UNIT = 64  # characters that cost one unit: about as long as a step of the interpreter
_NUMBER = 1 << 64
_LINEAR = {"trim", "strip", "lstrip", "rstrip", "startswith", "endswith", "split", "lower", "upper", "length"}
_WIDE = re.compile(r"[0-9]{5,}|:[^{}]*\{|%[^%a-zA-Z]*\*")  # a wide field, or one whose width is a value


class TooExpensiveError(Exception):
    """A template needs more than the allowance for a conversation of this size."""


class Meter:
    """The rest of a rendering's allowance. Not for two threads at once."""

    def __init__(self) -> None:
        self.left = _BASE

    def fill(self, values: int, characters: int) -> None:
        """Set a new allowance, in proportion to the size of the conversation."""
        self.left = _BASE + _EACH * values + characters

    def pay(self, units: int = 1) -> None:
        """Take units from the allowance; raise TooExpensiveError if none are left."""
        self.left -= units
        if self.left < 0:
            raise TooExpensiveError("it repeats or grows without end")

    def weigh(self, value: Any) -> int:
        """Return the number of characters of a value as text; values inside are charged each time they are read."""
        kind = type(value)
        if kind is str:
            return len(value)
        if isinstance(value, Traced):
            self.pay(len(value._parts) >> 3)
            return len(value)
        if kind is dict:
            self.pay(len(value) + 1)
            return sum([self.weigh(key) + self.weigh(inner) + 8 for key, inner in value.items()])
        if kind is list or kind is tuple:
            self.pay(len(value) + 1)
            return sum([self.weigh(inner) + 8 for inner in value])
        if isinstance(value, str):
            return len(value)
        if isinstance(value, Mapping):
            return self.weigh(dict(value))
        if isinstance(value, set | frozenset | KeysView | ValuesView | ItemsView | list | tuple):
            return self.weigh([*value])
        if isinstance(value, Namespace):
            return self.weigh(object.__getattribute__(value, "_Namespace__attrs"))
        if isinstance(value, int):
            _within(value)
        return 64

    def written(self, value: Any) -> Any:
        """Charge for `value` as text, and return it."""
        kind = type(value)
        if kind is str:
            self.left -= 1 + (len(value) >> 6)
        elif kind is Traced:
            self.left -= 1 + (len(value) >> 6) + (len(value._parts) >> 3)
        else:
            self.left -= 1 if kind is bool else 1 + (self.weigh(value) >> 6)
        if self.left < 0:
            self.pay()
        return value

    def copied(self, value: Any) -> Any:
        """Charge for a copy of `value` that shares its items, and return it."""
        if isinstance(value, str | list | tuple):
            self.pay(1 + len(value) // _UNIT)
        return value

    def call(self, name: str, subject: Any, arguments: list[Any]) -> None:
        """Charge for a method or filter called `name`, of `subject`."""
        if name in ("length", "count", "first", "last") and not (isinstance(subject, str) and arguments):
            self.pay()  # for any length
            return
        if name in _LINEAR and isinstance(subject, str):
            self.pay(
                2 + (len(subject) + sum([len(value) if isinstance(value, str) else 64 for value in arguments]) >> 6)
            )
            return
        weight = self.weigh(subject)
        numbers = [abs(n) for n in arguments if isinstance(n, int)]
        weights = [self.weigh(value) for value in arguments]
        units = 1 + (weight + sum(weights)) // _UNIT
        for number in numbers:
            _within(number)
            if name == "round" and number > 300:
                raise TooExpensiveError("it rounds to more than 300 digits")
            units += number * (1 + weight) // _UNIT + (number if name in ("batch", "slice") else 0)
        if name == "replace" and len(arguments) > 1:
            units += (weight // max(1, weights[0]) + 1) * weights[1] // _UNIT
        elif name == "join":
            between, items = (arguments[:1] or [""])[0], subject
            if isinstance(subject, str) and arguments:  # the method; otherwise the filter, with the items first
                between, items = subject, arguments[0]
            count = len(items) if hasattr(items, "__len__") else 0
            units += (self.weigh(between) * count) // _UNIT
        elif name in ("format", "format_map"):
            units += self.fields(str(subject), sum(weights))
        elif name in ("translate", "expandtabs"):
            units += weight * (8 + sum(weights)) // _UNIT
        self.pay(units)

    def fields(self, text: str, weight: int) -> int:
        """Return the cost of formatting `text` if each field took all arguments, which have `weight` characters."""
        if _WIDE.search(text):
            raise TooExpensiveError("it formats with a width that is large or taken from a value")
        return (text.count("{") + text.count("%") + 1) * weight // _UNIT

    def operate(self, operator: str, left: Any, right: Any) -> None:
        """Charge for a binary operator."""
        if isinstance(left, str) and isinstance(right, str) and operator == "+":
            self.pay(1 + (self.weigh(left) + self.weigh(right) >> 6))
            return
        if isinstance(left, float | int) and isinstance(right, float | int):
            if (
                operator == "**"
                and isinstance(left, int)
                and isinstance(right, int)
                and abs(right) > 64
                and abs(left) > 1
            ):
                raise TooExpensiveError("it calculates with numbers beyond 2^64")
            _within(left)
            _within(right)
            return
        if operator == "%" and isinstance(left, str):
            self.pay(1 + self.fields(left, self.weigh(right)))
        elif operator == "*":
            times = right if isinstance(right, int) else left if isinstance(left, int) else 1
            self.pay(1 + self.weigh(left if times is right else right) * max(times, 1) // 8)
        else:
            self.pay(1 + (self.weigh(left) + self.weigh(right)) // _UNIT)

    def items(self, values: Iterator[Any]) -> list[Any]:
        """Return the items of an iterator, each of which is charged."""
        items = []
        for value in values:
            self.pay()
            items.append(value)
        return items


def _within(number: float) -> None:
    if isinstance(number, int) and not -_NUMBER < number < _NUMBER:
        raise TooExpensiveError("it calculates with numbers beyond 2^64")
