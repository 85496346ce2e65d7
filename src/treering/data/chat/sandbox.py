"""Jinja for templates that nobody has read: transformers' sandbox, with a bound on what a rendering may cost.

A timer cannot stop `'a' * 10**10`, and none works in every thread. So whatever can repeat or grow pays first: rounds of
loops, calls, texts by their length. The allowance is in proportion to the conversation. A template that uses it up is
refused, at the same place on every machine.
"""

import json
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from datetime import datetime
from functools import update_wrapper
from typing import Any, NamedTuple

import jinja2
import jinja2.filters
import markupsafe
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from treering.data.chat.cost import Meter, TooExpensiveError
from treering.data.chat.traced import (
    PRODUCING,
    Part,
    Traced,
    concat,
    holds_traced,
    opaque,
    plain,
    plain_inside,
)
from treering.data.chat.traced_json import to_json

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


_OWN = {"charge", "written", "loop_begins", "loop_at", "loop_ends"}


class _Generator(CodeGenerator):
    """Jinja's own code, with payments where it joins and slices in place."""

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        if isinstance(node.node, nodes.EnvironmentAttribute) and node.node.name in _OWN:
            self.write(f"environment.{node.node.name}(")  # our own calls need no leave of the sandbox
            for argument in node.args:
                self.visit(argument, frame)
            self.write(")")
        else:
            super().visit_Call(node, frame, forward_caller=forward_caller)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        sliced = isinstance(node.arg, nodes.Slice)
        self.write("environment.copied(" if sliced else "")
        super().visit_Getitem(node, frame)
        self.write(")" if sliced else "")


class _Paying(NodeTransformer):
    """Puts a payment at the head of whatever runs more than once, and around what is made or compared in place. Loops
    also report which message they are at."""

    def _head(self, node: Any) -> Any:
        price = 1 + sum(map(_price, (inner for part in node.body for inner in _all(part)))) // 8
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_own("charge", nodes.Const(price)), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _head

    def visit_For(self, node: nodes.For) -> Any:
        target = node.target.name if isinstance(node.target, nodes.Name) else None
        self._head(node)
        if target is None:
            return node
        here = _own("loop_at", nodes.Name(target, "load", lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(here, lineno=node.lineno))
        begins, ends = (nodes.ExprStmt(_own(name, None, node.lineno)) for name in ("loop_begins", "loop_ends"))
        return [begins.set_lineno(node.lineno), node, ends.set_lineno(node.lineno)]

    def _made(self, node: Any) -> Any:
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"  # {% set a, b = … %}
        return node if stored else _own("written", node)

    visit_List = visit_Tuple = visit_Dict = _made

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        """To look into a value, or to compare it with another one, costs what the value is long."""
        self.generic_visit(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        known = any(isinstance(side, nodes.Const) for side in sides) and len(sides) == 2
        if not known:
            node.expr = _own("written", node.expr)
        for operand in node.ops:
            if not isinstance(operand.expr, nodes.Const) and not (known and operand.op in ("eq", "ne")):
                operand.expr = _own("written", operand.expr)
        return node


def _all(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    yield from node.find_all(nodes.Node)


def _price(node: nodes.Node) -> int:
    text = node.data if isinstance(node, nodes.TemplateData) else getattr(node, "value", "")
    return 1 + len(text) // 64 if isinstance(text, str) and text else 0 if isinstance(node, nodes.Name) else 1


def _own(name: str, argument: nodes.Expr | None, line: int = 0) -> nodes.Call:
    given = [] if argument is None else [argument]
    line = line if argument is None else argument.lineno
    return nodes.Call(nodes.EnvironmentAttribute(name), given, [], None, None, lineno=line)


class _Generation(Extension):
    """`{% generation %}`: what the assistant says. The spans are collected while `blocks` is a list."""

    tags = {"generation"}  # noqa: RUF012 — how jinja's extensions say it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        said, environment = caller(), self.environment
        assert isinstance(environment, Environment)
        if environment.blocks is not None:
            start = sum(map(len, environment.blocks))
            environment.spans.append((start, start + len(said), said))
        return said


class Environment(ImmutableSandboxedEnvironment):
    """As transformers sets it up, and metered."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        self.meter = Meter()
        self.charge, self.copied = self.meter.pay, self.meter.copied
        self.written = self.meter.written
        self.turns: dict[int, int] = {}  # index of each message by its identity
        self.turn: int | None = None  # the message that the template's loop is at
        self._outer: list[int | None] = []
        self.blocks: list[str] | None = None
        self.spans: list[tuple[int, int, str]] = []
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=self._finalized,
        )
        self.concat = concat  # type: ignore[method-assign]  # macros, blocks and `set` blocks are joined by it
        for name in _LEFT_OUT:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters |= {"tojson": to_json, "join": _join, "replace": _replace, "safe": _safe}
        self.filters = {name: self._metered(name, filter) for name, filter in self.filters.items()}
        self.tests = {n: test if n in _CHEAP else self._metered(n, test) for n, test in self.tests.items()}
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace}

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
        tree = _Paying().visit(parsed)
        tree.set_environment(self)
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.meter.operate(operator, left, right)
        if operator == "%" and isinstance(left, str) and holds_traced(right):
            return opaque(plain(left) % plain_inside(right), (left, right))
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            return _added(left, right)
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
            return self.meter.copied(_safe(text) if hasattr(made, "__html__") else text)

        return update_wrapper(metered, function)


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
    """A generation tag inside a macro or a block that is written somewhere else."""


class PythonNotationError(Exception):
    """A template writes a mapping or a list of a message as Python prints it."""


class Rendering:
    """A template that can be rendered again and again. Not in two threads at once."""

    def __init__(self, source: str):
        self.environment = Environment()
        self.template = self.environment.compiled(source)

    def render(self, values: Mapping[str, Any]) -> "Written":
        environment = self.environment
        environment.meter.fill(*_size(values["messages"], values["tools"]))
        environment.turns = {id(message): i for i, message in enumerate(values["messages"])}
        environment.turn, environment._outer = None, []
        blocks: list[str] = []
        environment.blocks, environment.spans = blocks, []
        loops: list[tuple[int, int | None]] = [(0, None)]
        length = 0
        try:
            for block in self.template.generate(values):
                if environment.turn != loops[-1][1]:
                    loops.append((length, environment.turn))
                blocks.append(block)
                length += len(block)
            text = concat(blocks)
        finally:
            environment.blocks = None
        parts = text._parts if isinstance(text, Traced) else (Part(len(text)),)
        whole = plain(text)
        if any(whole[start:end] != said for start, end, said in environment.spans):
            raise MisplacedTagError
        return Written(whole, parts, [(start, end) for start, end, _ in environment.spans], loops)


class Written(NamedTuple):
    """What a template wrote: the text, the origins of its characters, the ranges of generation tags, and from which
    characters on the template's loop was at which message."""

    text: str
    parts: tuple[Part, ...]
    tags: list[tuple[int, int]]
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


class _Dict:
    """`dict` for templates: a function, not a class with all that hangs on one."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:  # Jinja's signature: `self` may be a name of the template's
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _named(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _named(name)
        super().__setitem__(name, value)


def _named(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no place for {name!r}: names must not begin with _")


@jinja2.pass_environment
def _join(environment: Environment, values: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        values = map(jinja2.filters.make_attrgetter(environment, attribute), values)
    return Traced(str(d)).join([_text(value) for value in values])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else opaque(str(value), (value,), complete=True)


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    subject = str(text)
    if type(subject) is str and holds_traced(new):
        subject = Traced(subject)
    return subject.replace(str(old), str(new), -1 if count is None else count)


class _Safe(Traced):
    """A text that a template declares safe: what is added to it is escaped, as Jinja does even here."""

    __slots__ = ()

    def __html__(self) -> str:
        return self


def _safe(value: Any) -> str:
    text = str(value)
    return _Safe(plain(text), text._parts if isinstance(text, Traced) else None)


def _added(left: str, right: str) -> str:
    if not (hasattr(left, "__html__") or hasattr(right, "__html__")):
        return left + right
    both = concat([_escaped(left), _escaped(right)])
    return _Safe(plain(both), both._parts if isinstance(both, Traced) else None)


def _escaped(text: str) -> str:
    if hasattr(text, "__html__"):
        return text
    written = plain(markupsafe.escape(plain(text)))
    return text if written == text else opaque(written, (text,), complete=True)


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _now(format: str) -> str:
    return opaque(datetime.now().strftime(plain(format)), (format,))
