"""The Python code of a template: Jinja's, with added charges, positions of loops and generation tags."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, find_undeclared
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.visitor import NodeTransformer

_ADDED = {"charge", "written", "loop_begins", "loop_at", "loop_ends"}
# Names and statements that mean something else, or nothing, in a function: a tag around them is compiled as Jinja
# compiles call blocks.
_OF_FUNCTIONS = ("caller", "kwargs", "varargs")
_BOUND = (nodes.Break, nodes.Continue, nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)


def with_charges(tree: nodes.Template) -> nodes.Template:
    """Return `tree` with charges for all that can repeat or grow."""
    return _Charging().visit(tree)


class MeteredCode(CodeGenerator):
    """Jinja's code, with charges where it joins and slices in place."""

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        if isinstance(node.node, nodes.EnvironmentAttribute) and node.node.name in _ADDED:
            self.write(f"environment.{node.node.name}(")  # added calls bypass the sandbox
            for argument in node.args:
                self.visit(argument, frame)
            self.write(")")
        else:
            super().visit_Call(node, frame, forward_caller=forward_caller)

    def visit_CallBlock(self, node: nodes.CallBlock, frame: Frame) -> None:
        # A generation tag whose text is written at once needs no function that collects the text first.
        if frame.buffer is not None or not _is_tag(node) or _needs_function(node.body):
            super().visit_CallBlock(node, frame)
            return
        self.writeline("environment.tag_begins()", node)
        self.visit_Scope(nodes.Scope(node.body, lineno=node.lineno), frame)
        self.writeline("environment.tag_ends()", node)

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


def _is_tag(node: nodes.CallBlock) -> bool:
    function = node.call.node
    return isinstance(function, nodes.ExtensionAttribute) and function.identifier == GenerationTag.identifier


def _needs_function(body: Sequence[nodes.Node]) -> bool:
    bound = any(isinstance(inner, _BOUND) for node in body for inner in _all(node))
    return bound or bool(find_undeclared(body, _OF_FUNCTIONS))


class _Charging(NodeTransformer):
    """Adds charges at the beginning of code that can run repeatedly, and around values that are created or compared.

    Loops also report the message they are at.
    """

    def _head(self, node: Any) -> Any:
        price = 1 + sum(map(_price, (inner for part in node.body for inner in _all(part)))) // 8
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call_of("charge", nodes.Const(price)), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _head

    def visit_For(self, node: nodes.For) -> Any:
        target = node.target.name if isinstance(node.target, nodes.Name) else None
        self._head(node)
        if target is None:
            return node
        here = _call_of("loop_at", nodes.Name(target, "load", lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(here, lineno=node.lineno))
        begins, ends = (nodes.ExprStmt(_call_of(name, None, node.lineno)) for name in ("loop_begins", "loop_ends"))
        return [begins.set_lineno(node.lineno), node, ends.set_lineno(node.lineno)]

    def _created(self, node: Any) -> Any:
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"  # {% set a, b = … %}
        return node if stored else _call_of("written", node)

    visit_List = visit_Tuple = visit_Dict = _created

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        """Charge a comparison, and a search in a value, by the length of the values."""
        self.generic_visit(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        with_constant = any(isinstance(side, nodes.Const) for side in sides) and len(sides) == 2
        if not with_constant:
            node.expr = _call_of("written", node.expr)
        for operand in node.ops:
            if not isinstance(operand.expr, nodes.Const) and not (with_constant and operand.op in ("eq", "ne")):
                operand.expr = _call_of("written", operand.expr)
        return node


def _all(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    yield from node.find_all(nodes.Node)


def _price(node: nodes.Node) -> int:
    text = node.data if isinstance(node, nodes.TemplateData) else getattr(node, "value", "")
    return 1 + len(text) // 64 if isinstance(text, str) and text else 0 if isinstance(node, nodes.Name) else 1


def _call_of(name: str, argument: nodes.Expr | None, line: int = 0) -> nodes.Call:
    arguments = [] if argument is None else [argument]
    line = line if argument is None else argument.lineno
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None, lineno=line)


class GenerationTag(Extension):
    """The tag `{% generation %}` around what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 — as Jinja's extensions declare it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_generated"), [], [], body).set_lineno(line)

    def _generated(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.environment.tag_buffered(text)  # type: ignore[attr-defined]
        return text
