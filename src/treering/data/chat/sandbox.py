"""Jinja for untrusted templates: transformers' sandbox, with a limit on the cost of a rendering.

A timer cannot stop `'a' * 10**10`, and does not work in every thread. So all that can repeat or grow is charged before
it runs: iterations of loops, calls, texts by their length. The allowance is in proportion to the conversation. A
template that exceeds it is refused, at the same place on every machine.
"""

import itertools
import json
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from functools import update_wrapper
from typing import Any

import jinja2
import jinja2.filters
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from treering.data.chat.conversation import Span
from treering.data.chat.cost import Meter, TooExpensiveError
from treering.data.chat.filters import (
    DictFunction,
    TemplateNamespace,
    add,
    join,
    mark_safe,
    now,
    refuse,
    replace,
    to_json,
)
from treering.data.chat.template_code import GenerationTag, MeteredCode, with_charges
from treering.data.chat.traced import PRODUCING, Traced, concat, holds_traced, opaque, plain, plain_inside

LONGEST = 1 << 18  # characters of a template
MOST_TOKENS = 1 << 14  # names, operators and texts between tags: compiling one costs up to 30 µs and 4 KiB
_REMOVED = ("pprint", "urlize", "random", "xmlattr", "urlencode")
_CHEAP = {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean", "integer"}
_CHEAP |= {"float", "true", "false", "callable", "odd", "even", "sameas", "filter", "test"}
# Filters that return parts of their input, or use the traced methods of strings. All others get plain strings, and
# their result is traced as one part.
_TRACING = {"attr", "batch", "capitalize", "count", "d", "default", "dictsort", "first", "groupby", "items", "join"}
_TRACING |= {"last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse"}
_TRACING |= {"safe", "select", "selectattr", "slice", "sort", "string", "sum", "tojson", "trim", "unique", "upper"}
# Of the others, those that leave out nothing.
_COMPLETE = {"center", "e", "escape", "forceescape", "indent", "title", "wordwrap"}
# Of the tracing filters, those that turn other values into text.
_OF_TEXT = {"capitalize", "lower", "replace", "safe", "string", "trim", "upper"}


class Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up, with charges and traced strings."""

    code_generator_class = MeteredCode
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        self.meter = Meter()
        self.charge, self.copied = self.meter.pay, self.meter.copied
        self.written = self.meter.written
        self.turns: dict[int, int] = {}  # index of each message, by its `id`
        self.turn: int | None = None  # the message at which the template's loop is
        self._outer: list[int | None] = []
        self.length = 0  # number of characters written so far
        self.tags: list[Span] = []
        self._tag_start: int | None = None  # of the generation tag that is open
        self._buffered: list[tuple[int, str]] = []  # where the text of a tag has to be, and the text
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, loopcontrols],
            finalize=self._finalized,
        )
        self.concat = concat  # type: ignore[method-assign]  # macros, blocks and `set` blocks are joined by it
        for name in _REMOVED:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters |= {"tojson": to_json, "join": join, "replace": replace, "safe": mark_safe}
        self.filters = {name: self._metered(name, filter) for name, filter in self.filters.items()}
        self.tests = {n: test if n in _CHEAP else self._metered(n, test) for n, test in self.tests.items()}
        self.globals |= {
            "raise_exception": refuse,
            "strftime_now": now,
            "dict": DictFunction(),
            "namespace": TemplateNamespace,
        }

    def begin(self, messages: Sequence[Any], tools: Any) -> None:
        """Reset the state of the previous rendering."""
        self.meter.fill(*_size(messages, tools))
        self.turns = {id(message): i for i, message in enumerate(messages)}
        self.turn, self._outer = None, []
        self.length, self.tags, self._tag_start, self._buffered = 0, [], None, []

    def tag_begins(self) -> None:
        """Note that a generation tag begins here."""
        if self._tag_start is not None:
            raise MisplacedTagError
        self._tag_start = self.length

    def tag_ends(self) -> None:
        """Note that the generation tag ends here."""
        assert self._tag_start is not None
        self.tags.append((self._tag_start, self.length))
        self._tag_start = None

    def tag_buffered(self, text: str) -> None:
        """Note the text of a generation tag that is not written yet; `check_tags` checks that it is written here."""
        if self._tag_start is not None:
            raise MisplacedTagError
        self.tags.append((self.length, self.length + len(text)))
        self._buffered.append((self.length, text))

    def check_tags(self, text: str) -> None:
        """Raise MisplacedTagError unless each buffered tag is where it was noted."""
        if not all(text.startswith(buffered, start) for start, buffered in self._buffered):
            raise MisplacedTagError

    def loop_begins(self) -> None:
        """Note that a loop begins."""
        self._outer.append(self.turn)

    def loop_at(self, item: Any) -> None:
        """Note that the loop is at `item`, which may be a message."""
        self.turn = self.turns.get(id(item), self._outer[-1] if self._outer else None)

    def loop_ends(self) -> None:
        """Note that the loop ends, so that an outer loop is at its item again."""
        self.turn = self._outer.pop() if self._outer else None

    def compiled(self, source: str) -> jinja2.Template:
        """Return the compiled template. Raise an error if it is too long or switches escaping."""
        if len(source) > LONGEST:
            raise TooExpensiveError(f"it is longer than {LONGEST:,} characters")
        lexed = (kind for _, kind, _ in self.lexer.tokeniter(source, None) if kind != "whitespace")
        if next(itertools.islice(lexed, MOST_TOKENS, None), None) is not None:
            raise TooExpensiveError(f"it has more than {MOST_TOKENS:,} tokens")
        parsed = self.parse(source)
        if next(parsed.find_all(nodes.EvalContextModifier), None) is not None:
            raise jinja2.exceptions.SecurityError("it switches escaping on or off")
        tree = with_charges(parsed)
        tree.set_environment(self)
        return jinja2.Template.from_code(self, self.compile(tree), dict(self.globals))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute or item, by the sandbox's rules; fields of a dict first."""
        if type(obj) is dict and attribute in obj and attribute not in _OF_DICT:  # most of what templates ask for
            return obj[attribute]
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Return the result of a binary operator, charged and traced."""
        self.meter.operate(operator, left, right)
        if operator == "%" and isinstance(left, str) and holds_traced(right):
            return opaque(plain(left) % plain_inside(right), (left, right))
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            return add(left, right)
        return self.binop_table[operator](left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Return the result of a call, charged and traced."""
        subject = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        positional = [value if type(value) is str else self._read(value) for value in args]
        named = [kwargs[key] for key in kwargs if key not in ("_loop_vars", "_block_vars", "caller")]
        name = getattr(function, "__name__", "")
        self.meter.call(name, subject, [*positional, *named] if named else positional)
        if type(subject) is str and name in PRODUCING and holds_traced(positional):
            function = getattr(Traced(subject), name)
        return self.meter.returned(super().call(context, function, *positional, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        """Return `str.format` of the sandbox with a traced result, or None for other values."""
        format_plain = super().wrap_str_format(value)
        if format_plain is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            inputs = (value.__self__, list(args), kwargs)
            return opaque(plain(format_plain(*args, **kwargs)), inputs)

        return update_wrapper(formatted, value)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may read an attribute."""
        if attr in _OF_BYTES:  # operations on bytes are not charged
            return False
        return super().is_safe_attribute(obj, attr, value)

    def joined(self, parts: tuple[Any, ...]) -> str:
        """Return the parts as one text."""
        return concat([str(self._finalized(part)) for part in parts])

    def _finalized(self, value: Any) -> Any:
        """Return what is written for `value`, after charging for it."""
        self.meter.written(value)
        if type(value) is str or type(value) is Traced:
            return value
        if isinstance(value, _WRITTEN) and not holds_traced(value):
            return value
        if isinstance(value, str):
            return value
        if not isinstance(value, _WRITTEN):  # an object of unknown content
            raise PythonNotationError
        written = opaque(str(value), (value,), complete=True)
        if isinstance(written, Traced) and any(part.source and part.source.turn >= 0 for part in written._parts):
            raise PythonNotationError
        return written

    def _read(self, value: Any) -> Any:
        return self.meter.items(value) if isinstance(value, Iterator) else value

    def _metered(self, name: str, function: Any) -> Callable[..., Any]:
        hidden = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or context comes first

        def metered(*args: Any, **kwargs: Any) -> Any:
            positional = [value if type(value) is str else self._read(value) for value in args[hidden:]]
            self.meter.call(name, positional[0] if positional else None, [*positional[1:], *kwargs.values()])
            if name in _OF_TEXT and positional and not isinstance(positional[0], str) and holds_traced(positional[0]):
                positional[0] = opaque(str(positional[0]), (positional[0],), complete=True)
            if name in _TRACING or not holds_traced([positional, kwargs]):
                return self.meter.copied(function(*args[:hidden], *positional, **kwargs))
            result = function(*args[:hidden], *map(plain_inside, positional), **plain_inside(kwargs))
            if not isinstance(result, str):
                return self.meter.copied(result)
            text = opaque(plain(result), (positional, kwargs), complete=name in _COMPLETE)
            return self.meter.copied(mark_safe(text) if hasattr(result, "__html__") else text)

        return update_wrapper(metered, function)


_OF_BYTES = {"encode", "to_bytes", "from_bytes"}
_OF_DICT = frozenset(dir(dict))
_CONTAINERS = (list, tuple, dict, set, KeysView, ValuesView, ItemsView)
_WRITTEN = (str, int, float, bool, type(None), jinja2.Undefined, *_CONTAINERS)


class MisplacedTagError(Exception):
    """A generation tag is inside another one, or in a macro or block that is written somewhere else."""


class PythonNotationError(Exception):
    """A template writes a mapping or a list of a message as Python prints it."""


def _size(messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[int, int]:
    """Return the numbers of values and characters of a conversation."""
    texts = [value for message in messages for value in message.values()]
    characters = sum([len(value) for value in texts if isinstance(value, str)])
    others = [value for value in texts if not isinstance(value, str) and value is not None]
    if others or tools:
        written = len(json.dumps([others, tools]))
        return len(texts) + written // 16, characters + written
    return len(texts), characters
