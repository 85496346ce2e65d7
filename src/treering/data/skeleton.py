"""Which parts of a rendered conversation the assistant says, learned from a rendering whose texts are placeholders.

The skeleton of a conversation is the template applied to the same roles with every text replaced by a slot. In it

    start of turn k   what the generation prompt ends with: the common beginning with messages[:k] + prompt
    end of turn k     the end-of-turn token that messages[:k+1] ends with, found again behind the text of turn k

so the literal text between slots falls into what the assistant is given and what it has to write. The template's
habits with earlier turns (Qwen3 drops their thoughts, gpt-oss ends them with another token) need no special case,
because start and end are looked up in the skeleton of the whole conversation.
"""

import json
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from treering.data.control import Control
from treering.data.messages import THOUGHTS
from treering.data.records import SampleError, bad
from treering.data.strings import SLOT_CLOSE, SLOT_OPEN

_SLOT = re.compile(f"{SLOT_OPEN}(\\d+)([ct]){SLOT_CLOSE}")
Render = Callable[[Sequence[dict[str, Any]], bool], str]  # (messages, with generation prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Literal:
    """Text that every conversation of this shape has here."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The text of message `turn`. For an assistant's turn `text` is all it says up to the end-of-turn token."""

    turn: int
    text: str
    trained: bool
    plain: bool  # `text` is the place of the message's content and nothing else


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Literals and the slot that follows them, none at the end. `anchor` is the literal text behind the slot."""

    literals: tuple[Literal, ...]
    slot: Slot | None
    anchor: str
    last: bool  # no slot follows the anchor


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    pieces: tuple[Literal | Slot, ...]
    endless: int  # assistant turns after which the template writes no end-of-turn token

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        literals: list[list[Literal]] = [[]]
        slots: list[Slot | None] = []
        for piece in self.pieces:
            if isinstance(piece, Literal):
                literals[-1].append(piece)
            else:
                slots.append(piece)
                literals.append([])
        slots.append(None)
        anchors = ["".join(literal.text for literal in group) for group in literals[1:]] + [""]
        return tuple(
            Run(literals=tuple(group), slot=slot, anchor=anchor, last=i + 2 == len(slots))
            for i, (group, slot, anchor) in enumerate(zip(literals, slots, anchors, strict=True))
        )


def shape_of(messages: Sequence[dict[str, Any]], tools: Any) -> Hashable:
    """What conversations with the same skeleton share: all but their texts. Cheap, because every sample is asked."""
    return (
        "" if tools is None else json.dumps(tools, sort_keys=True),
        *(
            (message["role"], bool(message["content"]))
            if len(message) == 2 and "content" in message
            else json.dumps(placeholders([message]), sort_keys=True)
            for message in messages
        ),
    )


def placeholders(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with every text replaced by a slot; what is no plain text (tool calls) stays."""
    replaced = []
    for i, message in enumerate(messages):
        copy = dict(message)
        for field in ("content", *THOUGHTS):
            if copy.get(field):
                copy[field] = f"{SLOT_OPEN}{i}{'c' if field == 'content' else 't'}{SLOT_CLOSE}"
        replaced.append(copy)
    return replaced


def build(messages: Sequence[dict[str, Any]], render: Render, control: Control, where: str) -> Skeleton:
    """`messages` are placeholders. Raises SampleError where the template makes the turns impossible to tell apart."""
    return _Builder(messages, render, control, where).build()


def fill(slot: Slot, message: dict[str, Any], how: Callable[[str], str]) -> str:
    """The slot's text with its places filled from the message."""
    content = message.get("content", "")
    if slot.plain:
        return how(content)
    thought = next((message[field] for field in THOUGHTS if field in message), "")
    return _SLOT.sub(lambda match: how(content if match[2] == "c" else thought), slot.text)


def missing_calls(text: str, message: dict[str, Any]) -> str:
    """The name of the first tool call of `message` that is not in its rendered `text`."""
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in text:
            return name
    return ""


def _slot(turn: int, text: str, *, trained: bool) -> Slot:
    return Slot(turn=turn, text=text, trained=trained, plain=text == f"{SLOT_OPEN}{turn}c{SLOT_CLOSE}")


def _shared(a: str, b: str) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


class _Builder:
    def __init__(self, messages: Sequence[dict[str, Any]], render: Render, control: Control, where: str):
        self.messages, self.render, self.where = messages, render, where
        self.control, self.special = control.any, control.special
        self.text = render(messages, False)
        self.slots = [(m.start(), m.end(), int(m[1])) for m in _SLOT.finditer(self.text)]
        self.known: dict[tuple[str, str, bool], tuple[int, int]] = {}
        self.endless = 0

    def build(self) -> Skeleton:
        self._check_present()
        pieces: list[Literal | Slot] = []
        at, next_slot = 0, 0
        for turn, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            # Slots of earlier messages, then those of this turn.
            own = next_slot
            while own < len(self.slots) and self.slots[own][2] < turn:
                own += 1
            after = own
            while after < len(self.slots) and self.slots[after][2] == turn:
                after += 1
            floor = max(at, self.slots[own - 1][1] if own else 0)
            start, end = self._turn(turn, floor, self.slots[own:after], self._slot_start(after))
            if missing := missing_calls(self.text[start:end], message):
                raise self._bad(turn, f"the chat template leaves out the tool call {missing!r}")
            at = self._untrained(pieces, at, start, self.slots[next_slot:own])
            if after > own:
                body = self.slots[after - 1][1]
                pieces.append(_slot(turn, self.text[start:body], trained=True))
                pieces.append(Literal(text=self.text[body:end], trained=True))
            else:
                pieces.append(Literal(text=self.text[start:end], trained=True))
            at, next_slot = end, after
        self._untrained(pieces, at, len(self.text), self.slots[next_slot:])
        return Skeleton(pieces=tuple(pieces), endless=self.endless)

    def _check_present(self) -> None:
        shown = {turn for _, _, turn in self.slots}
        for turn, message in enumerate(self.messages):
            if message.get("content") and turn not in shown:
                raise self._bad(turn, f"the chat template leaves out this message (role {message['role']})")
        turns = [turn for _, _, turn in self.slots]
        if turns != sorted(turns):
            raise self._bad(0, "the chat template writes the messages in another order")

    def _slot_start(self, index: int) -> int:
        return self.slots[index][0] if index < len(self.slots) else len(self.text)

    def _untrained(self, pieces: list[Literal | Slot], at: int, stop: int, slots: list[tuple[int, int, int]]) -> int:
        for begin, end, turn in slots:
            pieces.append(Literal(text=self.text[at:begin], trained=False))
            pieces.append(_slot(turn, self.text[begin:end], trained=False))
            at = end
        pieces.append(Literal(text=self.text[at:stop], trained=False))
        return stop

    def _turn(self, turn: int, floor: int, own: list[tuple[int, int, int]], limit: int) -> tuple[int, int]:
        """Where turn `turn` starts and ends. Turns between the same literals are the same: long chats stay linear."""
        if not own:
            start = self._start(turn, floor, limit, None)
            return start, self._end(turn, start, limit, whole=True)
        first, body = own[0][0], own[-1][1]
        key = (self.text[floor:first], self.text[body:limit], turn == len(self.messages) - 1)
        if key not in self.known:
            start = self._start(turn, floor, first, first)
            self.known[key] = (start - floor, self._end(turn, body, limit, whole=False) - body)
        before, after = self.known[key]
        return floor + before, body + after

    def _start(self, turn: int, floor: int, limit: int, first: int | None) -> int:
        prompt, given = self.render(self.messages[:turn], True), self.render(self.messages[:turn], False)
        if prompt == given:  # the template knows no generation prompt: all that is sure is the text itself
            if first is None:
                raise self._bad(turn, "the chat template has no generation prompt, so its tool call has no beginning")
            return first
        common = self._common(prompt, self.text)
        if floor <= common <= limit and common > _shared(given, self.text):
            return common
        header = prompt[len(given) :] if prompt.startswith(given) else ""
        found = self.text.find(header, floor, limit) if header else -1
        if found < 0:
            raise self._bad(
                turn,
                f"the chat template's generation prompt {header or prompt[-40:]!r} is not what this turn begins with; "
                "give a template with {% generation %} tags (data.template)",
            )
        return found + len(header)

    def _end(self, turn: int, begin: int, limit: int, *, whole: bool) -> int:
        """The end of turn `turn`, whose text ends at `begin` (or starts there: `whole`)."""
        last = self.render(self.messages[: turn + 1], False)
        here = self.text[begin:limit]
        if whole:
            tail = last[begin:] if last[:begin] == self.text[:begin] else last
        else:
            tail = last[max(m.end() for m in _SLOT.finditer(last)) :]
        tokens = list(self.control.finditer(tail))
        common = self._common(tail, here)
        inside = [m.end() for m in tokens if m.end() <= common]
        closing = bool(tokens) and not tail[tokens[-1].end() :].strip()
        closed = [m.end() for m in self.special.finditer(tail, 0, common)]
        complete = bool(inside) and inside[-1] == tokens[-1].end()
        if complete or (closed and not whole):
            close = inside[-1] if complete else closed[-1]
            return begin + (close if not tail[close:common].strip() else common)
        other = self.control.match(here, common)
        if closing and tokens[-1].start() == common and other:
            return begin + other.end()  # the last turn of a conversation ends with another token than earlier ones
        if closing and (found := self.text.find(tokens[-1][0], begin, limit)) >= 0:
            return found + len(tokens[-1][0])
        if whole or tokens:
            raise self._bad(turn, f"no end of turn: the chat template ends it with {tail[-40:]!r} only when it is last")
        self.endless += 0 if here[:common] else 1
        return begin + common

    def _common(self, a: str, b: str) -> int:
        """Length of the common beginning, without the first half of a control token."""
        length = _shared(a, b)
        for text in (a, b):
            near = max(0, length - 64)
            for token in self.control.finditer(text, near, length + 64):
                if token.start() < length < token.end():
                    length = token.start()
        return length

    def _bad(self, turn: int, message: str) -> SampleError:
        return bad(self.where, "template", message, at=f"messages[{turn}]")
