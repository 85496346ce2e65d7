"""Filters and functions of templates for traced strings: results are those of Jinja's own, and traced."""

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.filters
import markupsafe
from jinja2.utils import Namespace

from treering.data.chat.traced import Traced, concat, holds_traced, opaque, plain, plain_inside
from treering.data.chat.traced_parts import TextSource, TracedPart


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return the JSON of `json.dumps`, traced. Brackets, commas and numbers belong to the texts next to them."""
    if not holds_traced(value):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if isinstance(indent, int):
        indent = " " * indent
    between, colon = separators or (", " if indent is None else ",", ": ")
    texts: list[tuple[str, bool]] = []  # with whether each is only syntax

    def syntax(text: str) -> None:
        texts.append((text, True))

    def write(value: Any, level: int) -> None:
        if isinstance(value, str):
            texts.append((_quoted(value, ensure_ascii), False))
        elif isinstance(value, dict) and value:
            items = sorted(value.items()) if sort_keys else value.items()
            bracketed("{}", [(key, entry) for key, entry in items], level)
        elif isinstance(value, list | tuple) and value:
            bracketed("[]", [(None, entry) for entry in value], level)
        else:
            syntax(json.dumps(plain_inside(value), ensure_ascii=ensure_ascii))

    def bracketed(brackets: str, items: list[tuple[Any, Any]], level: int) -> None:
        line = "" if indent is None else "\n" + indent * (level + 1)
        syntax(brackets[0] + line)
        for i, (key, entry) in enumerate(items):
            if i:
                syntax(between + line)
            if brackets == "{}":
                texts.append((_quoted(key if isinstance(key, str) else _key(key), ensure_ascii), False))
                syntax(colon)
            write(entry, level + 1)
        syntax(("" if indent is None else "\n" + indent * level) + brackets[1])

    write(value, 0)
    before, behind = _preceding(texts), _preceding(texts[::-1])[::-1]
    return concat(
        [_assigned(text, *around) if is_syntax else text for (text, is_syntax), *around in zip(texts, before, behind)]
    )


def _preceding(texts: list[tuple[str, bool]]) -> list[TextSource | None]:
    """Return for each text of the JSON the last source before it."""
    sources: list[TextSource | None] = []
    last = None
    for text, _ in texts:
        sources.append(last)
        if isinstance(text, Traced):
            last = next((part.source for part in text._parts if part.source), last)
    return sources


def _assigned(text: str, before: TextSource | None, behind: TextSource | None) -> str:
    """Return syntax between two texts of one turn as a part of them: it is not text of the template."""
    source = before or behind
    if source is None or (before and behind and before.turn != behind.turn):
        return text
    return Traced(text, (TracedPart(len(text), source),))


def _key(key: Any) -> str:
    written = json.dumps({key: 0})
    return json.loads(written[1 : written.rindex(":")])


def _quoted(text: str, ensure_ascii: bool) -> str:
    written = json.dumps(plain(text), ensure_ascii=ensure_ascii)
    if not isinstance(text, Traced):
        return written
    if len(written) == len(text) + 2:  # nothing was escaped: each character is unchanged
        source = next((part.source for part in text._parts if part.source is not None), None)
        edge = Traced('"', (TracedPart(1, source),))
        return concat((edge, text, edge))
    return opaque(written, (text,), complete=True)


class DictFunction:
    """`dict` for templates: an object without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class TemplateNamespace(Namespace):
    """`namespace` for templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # Jinja's signature: `self` may be a name of the template's
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have {name!r}: names must not begin with _")


@jinja2.pass_environment
def join(environment: jinja2.Environment, values: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    """Return `values`, or an attribute of each, joined by `d`, traced."""
    if attribute is not None:
        values = map(jinja2.filters.make_attrgetter(environment, attribute), values)
    return Traced(str(d)).join([_text(value) for value in values])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else opaque(str(value), (value,), complete=True)


def replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    """Return `text` with `old` replaced by `new`, traced."""
    string = str(text)
    if type(string) is str and holds_traced(new):
        string = Traced(string)
    return string.replace(str(old), str(new), -1 if count is None else count)


class _Safe(Traced):
    """A text that a template declares safe: Jinja escapes what is added to it, even without autoescape."""

    __slots__ = ()

    def __html__(self) -> str:
        return self


def mark_safe(value: Any) -> str:
    """Return `value` as a text that Jinja does not escape."""
    text = str(value)
    return _Safe(plain(text), text._parts if isinstance(text, Traced) else None)


def add(left: str, right: str) -> str:
    """Return `left + right`, where one that is not safe is escaped if the other is."""
    if not (hasattr(left, "__html__") or hasattr(right, "__html__")):
        return left + right
    both = concat([_escaped(left), _escaped(right)])
    return _Safe(plain(both), both._parts if isinstance(both, Traced) else None)


def _escaped(text: str) -> str:
    if hasattr(text, "__html__"):
        return text
    written = plain(markupsafe.escape(plain(text)))
    return text if written == text else opaque(written, (text,), complete=True)


def refuse(message: str) -> None:
    """Raise the error with which a template refuses a conversation."""
    raise jinja2.exceptions.TemplateError(message)


def now(format: str) -> str:
    """Return the current time, formatted by `strftime`."""
    return opaque(datetime.now().strftime(plain(format)), (format,))
