"""From a conversation to its rendered text and the proved ranges that are trained."""

import json
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from treering.data import skeleton
from treering.data.control import Control
from treering.data.formats import Sample
from treering.data.messages import THOUGHTS
from treering.data.records import SampleError, bad
from treering.data.skeleton import Run, Skeleton, Slot
from treering.data.strings import CONTROL_CLOSE, CONTROL_OPEN
from treering.data.template import Span, Template

_REMEMBERED = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """`text` still holds the marks of control strings. `trained` are ranges in it; a token that reaches beyond its
    range is trained only if it ends before `limits`: beyond them is somebody else's text."""

    text: str
    trained: list[Span]
    limits: list[Span]
    endless: bool  # some assistant turn has no end-of-turn token


class Chat:
    """Renders conversations with one template; remembers the skeletons of the shapes it has seen."""

    def __init__(self, template: Template, control: Control):
        self._template, self._control = template, control
        self._shapes: OrderedDict[Hashable, Skeleton] = OrderedDict()

    def render(self, sample: Sample) -> Rendered:
        assert sample.messages is not None
        self._check_thoughts(sample)
        messages = [self._marked(message) for message in sample.messages]
        tools = self._control.mark_all(sample.tools, structural=True)
        if self._template.tagged:
            return self._tagged(messages, tools, sample.where)
        text, _ = self._template.render(messages, tools, sample.where)
        shape, remembered = self._skeleton(messages, tools, sample.where)
        try:
            return self._match(text, shape, messages, sample.where)
        except SampleError:
            if not remembered:
                raise
        # A template may write the date: what was remembered yesterday is rebuilt once before it is believed.
        self._shapes.clear()
        shape, _ = self._skeleton(messages, tools, sample.where)
        return self._match(text, shape, messages, sample.where)

    def _check_thoughts(self, sample: Sample) -> None:
        """A template may drop the thoughts of earlier turns; one that knows no thoughts would lose all of them."""
        if self._template.thinks:
            return
        for i, message in enumerate(sample.messages or []):
            if field := next((field for field in THOUGHTS if field in message), None):
                raise bad(
                    sample.where, "template", "the chat template has no place for it", at=f"messages[{i}].{field}"
                )

    def _marked(self, message: dict[str, Any]) -> dict[str, Any]:
        structural = message["role"] != "assistant"
        return {
            key: value if key == "role" else self._control.mark_all(value, structural=structural)
            for key, value in message.items()
        }

    def _skeleton(self, messages: list[dict[str, Any]], tools: Any, where: str) -> tuple[Skeleton, bool]:
        key = skeleton.shape_of(messages, tools)
        if key in self._shapes:
            self._shapes.move_to_end(key)
            return self._shapes[key], True
        shape = skeleton.placeholders(messages)

        def render(part: Sequence[dict[str, Any]], prompt: bool) -> str:
            return self._template.render(part, tools, where, prompt=prompt)[0]

        built = skeleton.build(shape, render, self._control, where)
        self._shapes[key] = built
        if len(self._shapes) > _REMEMBERED:
            self._shapes.popitem(last=False)
        return built, False

    def _match(self, text: str, shape: Skeleton, messages: list[dict[str, Any]], where: str) -> Rendered:
        """Walk the text along the skeleton. What lies between two literals is a slot's; nothing is guessed."""
        at, floor = 0, 0
        trained: list[Span] = []
        floors: list[int] = []
        open_from: int | None = None  # start of the trained range being collected
        for run in shape.runs:
            slot = run.slot
            for literal in run.literals:
                if not text.startswith(literal.text, at):
                    raise _differs(text, literal.text, at, where)
                if literal.trained and open_from is None:
                    open_from = at
                    floors.append(floor)
                if not literal.trained and literal.text and open_from is not None:
                    trained.append((open_from, at))
                    open_from = None
                at += len(literal.text)
            if slot is None:
                continue
            if slot.trained and open_from is None:
                open_from = at
                floors.append(floor)
            elif not slot.trained and open_from is not None:
                trained.append((open_from, at))
                open_from = None
            end = self._slot_end(text, at, slot, run, messages[slot.turn], where)
            if not slot.trained:
                floor = end
            at = end
        if at != len(text):
            raise _differs(text, "", at, where)
        if open_from is not None:
            trained.append((open_from, at))
        trained_floor = list(zip(trained, floors, strict=True))
        starts = [start for (start, _), _ in trained_floor[1:]] + [len(text)]
        limits = [(low, max(end, high)) for ((_, end), low), high in zip(trained_floor, starts, strict=True)]
        return Rendered(text=text, trained=trained, limits=limits, endless=shape.endless > 0)

    def _slot_end(self, text: str, at: int, slot: Slot, run: Run, message: dict[str, Any], where: str) -> int:
        anchor, last = run.anchor, run.last
        for filled in _fillings(slot, message):
            end = at + len(filled)
            if text.startswith(filled, at) and text.startswith(anchor, end):
                if not last or end + len(anchor) == len(text):
                    return end
        field = f"messages[{slot.turn}].content"
        if self._control.special.search(anchor) is None:
            raise bad(where, "template", "the chat template rewrites this text and does not mark its end", at=field)
        # No text can hold an unmarked special token, so the first occurrence of the anchor is the template's.
        end = len(text) - len(anchor) if last else _find_template_s(text, anchor, at, self._control)
        if end < at or not text.startswith(anchor, end):
            raise _differs(text, anchor, at, where)
        if slot.trained and not any(part in text[at:end] for part in _kept(message)):
            raise bad(where, "template", "the assistant's text is not in what the chat template renders", at=field)
        return end

    def _tagged(self, messages: list[dict[str, Any]], tools: Any, where: str) -> Rendered:
        text, spans = self._template.render(messages, tools, where, spans=True)
        turns = [message for message in messages if message["role"] == "assistant"]
        if len(spans) < len(turns) or any(start >= end for start, end in spans):
            raise bad(
                where,
                "template",
                f"the chat template's generation tags mark {len(spans)} texts for {len(turns)} assistant turns",
                at="messages",
            )
        found = 0
        for message in turns:
            while found < len(spans) and not _says(text[slice(*spans[found])], message):
                found += 1
            if found == len(spans):
                raise bad(where, "template", "an assistant's text is outside the generation tags", at="messages")
            found += 1
        closing = self._closing(text, spans, messages, tools, where)
        closed = [(start, end + len(closing) if text.startswith(closing, end) else end) for start, end in spans]
        endless = not all(self._ended(text, span) for span in closed)
        return Rendered(text=text, trained=closed, limits=closed, endless=endless)

    def _closing(self, text: str, spans: list[Span], messages: list[dict[str, Any]], tools: Any, where: str) -> str:
        """The end-of-turn token, if the template writes it behind its tag: it must be learned all the same."""
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        if last + 1 < len(messages):  # what follows the tag must be this turn's, not the next one's beginning
            text, spans = self._template.render(messages[: last + 1], tools, where, spans=True)
        start, end = spans[-1]
        token = self._control.any.match(text, end)
        return "" if token is None or self._ended(text, (start, end)) else token[0]

    def _ended(self, text: str, span: Span) -> bool:
        """Whether the last thing in `span` is a control token."""
        start, end = span
        inside = [m.end() for m in self._control.any.finditer(text, start, end)]
        return bool(inside) and not text[inside[-1] : end].strip()


def _fillings(slot: Slot, message: dict[str, Any]) -> Iterator[str]:
    """What stands in the slot, most likely first: the text as it is, stripped, or as a JSON string."""
    for how in (_same, str.strip, _json, str.rstrip, str.lstrip):
        yield skeleton.fill(slot, message, how)


def _same(text: str) -> str:
    return text


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _kept(message: dict[str, Any]) -> Iterator[str]:
    """What must be left of an assistant's text: all of it, or what follows its thoughts."""
    content = message.get("content", "")
    if not content:
        yield ""
    for part in (content.strip(), content.rpartition("</think>")[2].strip()):
        if part:
            yield part


def _says(text: str, message: dict[str, Any]) -> bool:
    return any(part in text for part in _kept(message)) and not skeleton.missing_calls(text, message)


def _find_template_s(text: str, anchor: str, at: int, control: Control) -> int:
    """The first occurrence of `anchor` whose special tokens are not marked as somebody's text."""
    end = text.find(anchor, at)
    token = control.special.search(anchor)
    assert token is not None
    while end >= 0:
        begin, stop = end + token.start(), end + token.end()
        if not (text[begin - 1 : begin] == CONTROL_OPEN and text[stop : stop + 1] == CONTROL_CLOSE):
            return end
        end = text.find(anchor, end + 1)
    return -1


def _differs(text: str, wanted: str, at: int, where: str) -> SampleError:
    return bad(
        where,
        "template",
        f"the chat template writes this conversation unlike others of its shape: {text[at : at + 40]!r} stands where "
        f"{wanted[:40]!r} was expected; give a template with {{% generation %}} tags (data.template)",
        at="messages",
    )
