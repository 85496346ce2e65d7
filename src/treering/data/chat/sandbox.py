"""Jinja for templates that nobody has read: transformers' sandbox, with a bound on what a rendering may cost.

A timer cannot stop `'a' * 10**10`, and none works in every thread. So whatever can repeat or grow pays first: rounds of
loops, calls, texts by their length. The allowance is in proportion to the conversation. A template that uses it up is
refused, at the same place on every machine.
"""

import json
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from functools import update_wrapper
from typing import Any, NamedTuple

import jinja2
import jinja2.filters
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from treering.data.chat.conversation import Span, TextPiece, pieces_of
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
from treering.data.chat.template_code import GenerationTag, MeteredCode, with_payments
from treering.data.chat.traced import (
    PRODUCING,
    Traced,
    concat,
    holds_traced,
    opaque,
    plain,
    plain_inside,
)

LONGEST = 1 << 20  # characters of a template
_LEFT_OUT = ("pprint", "urlize", "random", "xmlattr", "urlencode")
_CHEAP = {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean", "integer"}
_CHEAP |= {"float", "true", "false", "callable", "odd", "even", "sameas", "filter", "test"}
# Filters that hand on what they are given, or use the traced methods of strings. All others get plain strings, and
# what they make is traced as a whole.
_TRACING = {"attr", "batch", "capitalize", "count", "d", "default", "dictsort", "first", "groupby", "items", "join"}
_TRACING |= {"last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse"}
_TRACING |= {"safe", "select", "selectattr", "slice", "sort", "string", "sum", "tojson", "trim", "unique", "upper"}
_COMPLETE = {
    "center",
    "e",
    "escape",
    "forceescape",
    "indent",
    "title",
    "wordwrap",
}  # of the others: they leave out nothing
_OF_TEXT = {
    "capitalize",
    "lower",
    "replace",
    "safe",
    "string",
    "trim",
    "upper",
}  # of those: what else they get is written


class Environment(ImmutableSandboxedEnvironment):
    """As transformers sets it up, and metered."""

    code_generator_class = MeteredCode
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        self.meter = Meter()
        self.charge, self.copied = self.meter.pay, self.meter.copied
        self.written = self.meter.written
        self.turns: dict[int, int] = {}  # index of each message by its identity
        self.turn: int | None = None  # the message that the template's loop is at
        self._outer: list[int | None] = []
        self.length = 0  # characters that are written so far
        self.tags: list[Span] = []
        self._tag_start: int | None = None  # of the generation tag that is open
        self._buffered: list[tuple[int, str]] = []  # where a tag's text has to be written, and the text
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, loopcontrols],
            finalize=self._finalized,
        )
        self.concat = concat  # type: ignore[method-assign]  # macros, blocks and `set` blocks are joined by it
        for name in _LEFT_OUT:
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
        """Forget the rendering before."""
        self.meter.fill(*_size(messages, tools))
        self.turns = {id(message): i for i, message in enumerate(messages)}
        self.turn, self._outer = None, []
        self.length, self.tags, self._tag_start, self._buffered = 0, [], None, []

    def tag_begins(self) -> None:
        if self._tag_start is not None:
            raise MisplacedTagError
        self._tag_start = self.length

    def tag_ends(self) -> None:
        assert self._tag_start is not None
        self.tags.append((self._tag_start, self.length))
        self._tag_start = None

    def tag_buffered(self, text: str) -> None:
        """A generation tag whose text is not written yet; `check_tags` proves that it is written next."""
        if self._tag_start is not None:
            raise MisplacedTagError
        self.tags.append((self.length, self.length + len(text)))
        self._buffered.append((self.length, text))

    def check_tags(self, text: str) -> None:
        if not all(text.startswith(buffered, start) for start, buffered in self._buffered):
            raise MisplacedTagError

    def loop_begins(self) -> None:
        self._outer.append(self.turn)

    def loop_at(self, item: Any) -> None:
        self.turn = self.turns.get(id(item), self._outer[-1] if self._outer else None)

    def loop_ends(self) -> None:
        self.turn = self._outer.pop() if self._outer else None

    def compiled(self, source: str) -> jinja2.Template:
        if len(source) > LONGEST:
            raise TooExpensiveError(f"it is longer than {LONGEST:,} characters")
        parsed = self.parse(source)
        if next(parsed.find_all(nodes.EvalContextModifier), None) is not None:
            raise jinja2.exceptions.SecurityError("it switches escaping on or off")
        tree = with_payments(parsed)
        tree.set_environment(self)
        return jinja2.Template.from_code(self, self.compile(tree), dict(self.globals))

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute in obj and attribute not in _OF_DICT:  # most of what templates ask for
            return obj[attribute]
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.meter.operate(operator, left, right)
        if operator == "%" and isinstance(left, str) and holds_traced(right):
            return opaque(plain(left) % plain_inside(right), (left, right))
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            return add(left, right)
        return self.binop_table[operator](left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        subject = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        given = [value if type(value) is str else self._whole(value) for value in args]
        named = [kwargs[key] for key in kwargs if key not in ("_loop_vars", "_block_vars", "caller")]
        name = getattr(function, "__name__", "")
        self.meter.call(name, subject, [*given, *named] if named else given)
        if type(subject) is str and name in PRODUCING and holds_traced(given):
            function = getattr(Traced(subject), name)
        return super().call(context, function, *given, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        made = super().wrap_str_format(value)
        if made is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            inputs = (value.__self__, list(args), kwargs)
            return opaque(plain(made(*args, **kwargs)), inputs)

        return update_wrapper(formatted, value)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr == "encode":  # bytes would grow unseen
            return False
        return super().is_safe_attribute(obj, attr, value)

    def joined(self, parts: tuple[Any, ...]) -> str:
        return concat([str(self._finalized(part)) for part in parts])

    def _finalized(self, value: Any) -> Any:
        """What is written for `value`, paid for."""
        self.meter.written(value)
        if type(value) is str or type(value) is Traced:
            return value
        if isinstance(value, _WRITTEN) and not holds_traced(value):
            return value
        if isinstance(value, str):
            return value
        if not isinstance(value, _WRITTEN):  # nobody can look into it
            raise PythonNotationError
        written = opaque(str(value), (value,), complete=True)
        if isinstance(written, Traced) and any(part.source and part.source.turn >= 0 for part in written._parts):
            raise PythonNotationError
        return written

    def _whole(self, value: Any) -> Any:
        return self.meter.items(value) if isinstance(value, Iterator) else value

    def _metered(self, name: str, function: Any) -> Callable[..., Any]:
        hidden = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or context comes first

        def metered(*args: Any, **kwargs: Any) -> Any:
            whole = [value if type(value) is str else self._whole(value) for value in args[hidden:]]
            self.meter.call(name, whole[0] if whole else None, [*whole[1:], *kwargs.values()])
            if name in _OF_TEXT and whole and not isinstance(whole[0], str) and holds_traced(whole[0]):
                whole[0] = opaque(str(whole[0]), (whole[0],), complete=True)
            if name in _TRACING or not holds_traced([whole, kwargs]):
                return self.meter.copied(function(*args[:hidden], *whole, **kwargs))
            made = function(*args[:hidden], *map(plain_inside, whole), **plain_inside(kwargs))
            if not isinstance(made, str):
                return self.meter.copied(made)
            text = opaque(plain(made), (whole, kwargs), complete=name in _COMPLETE)
            return self.meter.copied(mark_safe(text) if hasattr(made, "__html__") else text)

        return update_wrapper(metered, function)


_OF_DICT = frozenset(dir(dict))
_WRITTEN = (
    str,
    int,
    float,
    bool,
    type(None),
    jinja2.Undefined,
    list,
    tuple,
    dict,
    set,
    KeysView,
    ValuesView,
    ItemsView,
)


class MisplacedTagError(Exception):
    """A generation tag inside another one, or inside a macro or a block that is written somewhere else."""


class PythonNotationError(Exception):
    """A template writes a mapping or a list of a message as Python prints it."""


class Rendering:
    """A template that can be rendered again and again. Not in two threads at once."""

    def __init__(self, source: str):
        self.environment = Environment()
        self.template = self.environment.compiled(source)

    def render(self, values: dict[str, Any]) -> "Written":
        environment = self.environment
        environment.begin(values["messages"], values["tools"])
        context = self.template.new_context(values)
        blocks: list[str] = []
        turn = None
        loops: list[tuple[int, int | None]] = [(0, None)]
        # Not `generate`, which hands each block through one more generator.
        for block in self.template.root_render_func(context):
            if environment.turn != turn:
                turn = environment.turn
                loops.append((environment.length, turn))
            blocks.append(block)
            environment.length += len(block)
        text = "".join(blocks)
        environment.check_tags(text)
        return Written(text, pieces_of(blocks), environment.tags, loops)


class Written(NamedTuple):
    """What a template wrote: the text, the places of the data's texts in it, the ranges of generation tags, and from
    which characters on the template's loop was at which message."""

    text: str
    pieces: list[TextPiece]
    tags: list[Span]
    loops: list[tuple[int, int | None]]


def _size(messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[int, int]:
    """Values and characters of a conversation."""
    texts = [value for message in messages for value in message.values()]
    characters = sum([len(value) for value in texts if isinstance(value, str)])
    beside = [value for value in texts if not isinstance(value, str) and value is not None]
    if beside or tools:
        written = len(json.dumps([beside, tools]))
        return len(texts) + written // 16, characters + written
    return len(texts), characters
