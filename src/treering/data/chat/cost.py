"""The allowance of a rendering, and the cost of its operations, which is charged before an operation runs."""

from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from jinja2.utils import Namespace

from treering.data.chat import text_costs
from treering.data.chat.traced import Traced

_BASE, _EACH = 1_000_000, 2_000  # units for any rendering, and for each value of the conversation
_UNIT = 64  # characters that cost one unit: about as long as a step of the interpreter
_NUMBER = 1 << 64
_LINEAR = {"trim", "strip", "lstrip", "rstrip", "startswith", "endswith", "split", "lower", "upper", "length"}
_LONGEST_DATE = 1_000  # characters of a date's format; C writes up to 256 times as many


# Filters and methods whose cost is more than their lengths, in characters.
_GROWING: dict[str, Callable[[Any, list[Any]], int]] = {
    "indent": lambda subject, arguments: text_costs.indenting(str(subject), arguments),
    "wordwrap": lambda subject, arguments: text_costs.wrapping(str(subject), arguments),
    "tojson": text_costs.json_layout,
    "striptags": lambda subject, arguments: text_costs.tags(str(subject)),
    "sum": lambda subject, arguments: text_costs.summing(subject),
    **dict.fromkeys(text_costs.REVERSE, lambda subject, arguments: text_costs.reverse_search(str(subject), arguments)),
}


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
            self.pay(len(value._parts) >> 2)
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
        if isinstance(value, range):
            self.pay(len(value))
            return 8 * len(value)
        if isinstance(value, bytes | bytearray | memoryview):
            raise TooExpensiveError("it computes with bytes")
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
            self.left -= 1 + (len(value) >> 6) + (len(value._parts) >> 2)
        else:
            self.left -= 1 if kind is bool else 1 + (self.weigh(value) >> 6)
        if self.left < 0:
            self.pay()
        return value

    def copied(self, value: Any) -> Any:
        """Charge for a copy of `value` that shares its items, and return it."""
        if isinstance(value, Traced):
            self.pay(1 + len(value) // _UNIT + 4 * len(value._parts))
        elif isinstance(value, str | list | tuple):
            self.pay(1 + len(value) // _UNIT)
        return value

    def returned(self, value: Any) -> Any:
        """Charge for the parts of a method's result, and return it."""
        if type(value) is list:
            self.pay(2 * len(value))
        elif type(value) is Traced:
            self.pay(4 * len(value._parts))
        return value

    def call(self, name: str, subject: Any, arguments: list[Any]) -> None:
        """Charge for a method or filter called `name`, of `subject`."""
        if name in ("length", "count", "first", "last") and not arguments:
            self.pay()  # for any length
            return
        if isinstance(subject, str) and (len(subject) >= text_costs.LARGE or name in text_costs.ITERATING):
            self.pay(text_costs.parts_of(name, subject, arguments))
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
        elif name == "now":
            units += 4 * sum(weights)
            if sum(weights) > _LONGEST_DATE:
                raise TooExpensiveError(f"it writes a date with a format of more than {_LONGEST_DATE:,} characters")
        elif name in _GROWING:
            units += _GROWING[name](subject, arguments) // _UNIT
        self.pay(units)

    def fields(self, text: str, weight: int) -> int:
        """Return the cost of formatting `text` if each field took all arguments, which have `weight` characters."""
        if text_costs.is_wide(text):
            raise TooExpensiveError("it formats with a width that is large or taken from a value")
        return ((text.count("{") + text.count("%") + 1) * weight + text_costs.widths(text)) // _UNIT

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
            repeated = left if times is right else right
            self.pay(1 + self.weigh(repeated) * max(times, 1) // 8)
            if isinstance(repeated, Traced):  # each copy is a part
                self.pay(max(times, 0) * len(repeated._parts))
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
