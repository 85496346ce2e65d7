"""From a conversation to its rendered text and the ranges of it that are trained."""

import bisect
import operator
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from treering.data.chat.control_tokens import ControlTokens
from treering.data.chat.conversation import TOOLS, Conversation, Span, TextPiece, forms, left_out, trace
from treering.data.chat.messages import THOUGHTS
from treering.data.chat.template import REFUSED, RenderedText, Template
from treering.data.chat.traced_parts import TextSource
from treering.data.chat.turns import Turn, Turns
from treering.data.formats import Sample
from treering.data.sources.records import SampleError, bad

_THOUGHT = re.compile(r"\s*<think>.*</think>", re.DOTALL)  # a thought in the content
_end = operator.attrgetter("end")
_TAG = re.compile(r"</?think>")


class Rendered(NamedTuple):
    """A rendered conversation. `trained` are ranges of `text`, `pieces` are the texts of the data in it.

    A token that reaches beyond its range is trained only if it is inside of the range's `limits`, which are the borders
    of other texts of the data.
    """

    text: str
    trained: list[Span]
    limits: list[Span]
    pieces: list[TextPiece]
    writers: list[bool]  # of each piece: whether the assistant wrote it
    endless: bool  # some assistant turn has no end-of-turn token
    unprompted: bool  # some assistant turn does not begin with the full generation prompt
    thoughts: int  # of earlier turns, which the template leaves out
    without_tools: bool  # the sample has tools, of which the template writes nothing


class Chat:
    """Renders conversations with one template."""

    def __init__(self, template: Template, control: ControlTokens):
        self._template, self._control = template, control
        self._turns = Turns(control)

    def render(self, sample: Sample) -> Rendered:
        """Return the rendered conversation of a sample. Raise SampleError if it is not certain what is trained."""
        assert sample.messages is not None
        if not self._template.knows_thoughts:
            self._check_thoughts(sample.messages, sample.where)
        errors: list[SampleError] = []
        for messages in forms(sample.messages):
            try:
                return self._render(trace(messages, sample.tools), sample.where)
            except SampleError as refused:
                errors.append(refused)
        # A text that is left out explains more than an error of the template's code in another form.
        error = next((error for error in errors if error.kind != REFUSED), errors[0])
        if len(errors) > 1 and error.kind == REFUSED:
            forms_tried = "tool calls were tried with arguments as an object and as JSON, and with and without content"
            raise SampleError(f"{error}; {forms_tried}", kind=error.kind)
        raise error

    def _check_thoughts(self, messages: Sequence[dict[str, Any]], where: str) -> None:
        """Refuse thoughts: this template reads no field of thoughts, so even the last turn's would be left out."""
        for i, message in enumerate(messages):
            thoughts = [field for field in THOUGHTS if field in message]
            if field := next((field for field in thoughts if (message[field] or "").strip()), None):
                raise bad(where, "template", "the chat template has no place for it", at=f"messages[{i}].{field}")

    def _render(self, conversation: Conversation, where: str) -> Rendered:
        rendered = self._template.render(conversation.messages, conversation.tools, where)
        turns = self._tagged(rendered, conversation, where) if self._template.tagged else None
        if turns is None:

            def render(messages: Sequence[dict[str, Any]], prompt: bool) -> RenderedText:
                return self._template.render(messages, conversation.tools, where, prompt=prompt)

            turns = self._turns.find(rendered, conversation, render, where)
        spans: dict[int, list[Span]] = {}
        for turn in turns:
            spans.setdefault(turn.message, []).append((turn.start, turn.end))
        complete = _are_complete(conversation.sources, rendered.pieces, spans)
        thoughts = 0 if complete else _check_complete(conversation, rendered.pieces, spans, where)
        pieces = rendered.visible
        self._check_mixed(rendered.text, pieces, where)
        assistant = [message["role"] == "assistant" for message in conversation.messages]
        assistant.append(False)  # TOOLS
        trained = [(turn.start, turn.end) for turn in turns]
        return Rendered(
            text=rendered.text,
            trained=trained,
            limits=[(turn.low, turn.high) for turn in turns],
            pieces=pieces,
            writers=[assistant[piece.source.turn] for piece in pieces],
            endless=any(turn.endless for turn in turns),
            unprompted=any(turn.unprompted for turn in turns),
            thoughts=thoughts,
            without_tools=bool(conversation.tools) and not any(piece.source.turn == TOOLS for piece in pieces),
        )

    def _check_mixed(self, text: str, pieces: Sequence[TextPiece], where: str) -> None:
        for piece in pieces:
            if piece.mixed and self._control.any.search(text, piece.begin, piece.end):
                raise bad(
                    where,
                    "template",
                    "the chat template puts a text and control tokens through one filter, so it is unknown "
                    "which wrote the tokens",
                    at="tools" if piece.source.turn == TOOLS else f"messages[{piece.source.turn}]",
                )

    def _tagged(self, rendered: RenderedText, conversation: Conversation, where: str) -> list[Turn]:
        """Return the turns that the template's generation tags mark, each with its end-of-turn token."""
        text, tags = rendered.text, [(start, end) for start, end in rendered.tags if start < end]
        indices = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        owners: list[int] = []
        for tag in tags:
            inside = {piece.source.turn for piece in _overlapping(rendered, tag)}
            foreign = next((turn for turn in inside if turn not in indices), None)
            if foreign is not None or len(inside) > 1:
                at = "tools" if foreign == TOOLS else f"messages[{max(inside) if foreign is None else foreign}]"
                raise bad(
                    where, "template", "the chat template's generation tags contain text of another message", at=at
                )
            owners.append(inside.pop() if inside else owners[-1] if owners else indices[0])
        if missing := [i for i in indices if i not in owners]:
            raise bad(
                where,
                "template",
                "the chat template's generation tags do not contain the text of this turn",
                at=f"messages[{missing[0]}]",
            )
        closing = self._closing(rendered, tags, conversation, where)
        turns = []
        for (start, end), owner in zip(tags, owners, strict=True):
            stop = end + len(closing) if text.startswith(closing, end) else end
            turns.append(Turn(owner, start, stop, start, stop, not self._ended(rendered, (start, stop)), False))
        return turns

    def _closing(self, rendered: RenderedText, tags: list[Span], conversation: Conversation, where: str) -> str:
        """Return the end-of-turn token if the template writes it behind its tag, so that it can be trained; else ""."""
        messages = conversation.messages
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        if last + 1 < len(messages):  # what follows the tag must belong to this turn, not to the next one
            rendered = self._template.render(messages[: last + 1], conversation.tools, where)
            tags = [(start, end) for start, end in rendered.tags if start < end]
        if not tags:
            return ""
        token = self._control.any.match(rendered.text, tags[-1][1])
        return "" if token is None or self._ended(rendered, tags[-1]) else token[0]

    def _ended(self, rendered: RenderedText, span: Span) -> bool:
        """Whether `span` ends with a control token of the template."""
        start, end = span
        inside = _overlapping(rendered, span)
        return self._control.closes(rendered.text[min(inside[-1].end, end) if inside else start : end])


def _overlapping(rendered: RenderedText, span: Span) -> list[TextPiece]:
    """Return the pieces, in order, that have a character in `span`."""
    start, end = span
    pieces = rendered.visible
    first = stop = bisect.bisect_right(pieces, start, key=_end)
    while stop < len(pieces) and pieces[stop].begin < end:
        stop += 1
    return pieces[first:stop]


def _are_complete(sources: list[TextSource], pieces: list[TextPiece], spans: dict[int, list[Span]]) -> bool:
    """Whether each required text is one piece, and the assistant's is trained: the fast test for most samples."""
    complete = set()
    for begin, end, source, start, stop, _ in pieces:
        if stop - start == len(source.text):
            ranges = spans.get(source.turn)
            if ranges is None or any(low <= begin and end <= high for low, high in ranges):
                complete.add(id(source))
    return all(not source.required or id(source) in complete for source in sources)


def _check_complete(
    conversation: Conversation, pieces: list[TextPiece], spans: dict[int, list[Span]], where: str
) -> int:
    """Return the number of thoughts of earlier turns that the rendering leaves out, as some templates do on purpose.

    Raise SampleError if another text is left out, or if a text of the assistant is outside of its turn's `spans`.
    """
    shown = [
        piece
        for piece in pieces
        if piece.source.turn not in spans
        or any(start <= piece.begin and piece.end <= end for start, end in spans[piece.source.turn])
    ]
    last = max(spans)
    thoughts: set[int] = set()
    for source, missing in left_out(conversation.sources, shown):
        at = _place(source)
        if source.turn in spans and not (missing := _without_tags(source, missing)):
            continue  # the template writes the tags of a thought itself
        if source.turn in spans and _is_thought(source, missing):
            if source.turn == last:
                raise bad(
                    where,
                    "template",
                    "the chat template leaves out the thought of the last turn, so the model would learn not to think; "
                    "give a template that keeps it (data.template), or take the thoughts out of the data",
                    at=at,
                )
            thoughts.add(source.turn)
            continue
        role = conversation.messages[source.turn]["role"]
        raise bad(where, "template", f"the chat template leaves out {_description(source, missing[0], role)}", at=at)
    return len(thoughts)


def _is_thought(source: TextSource, missing: list[Span]) -> bool:
    if source.path[0] in THOUGHTS:
        return True
    if source.path != ("content",):
        return False
    thought = _THOUGHT.match(source.text)
    return all(stop <= (thought.end() if thought else 0) for _, stop in missing)


def _without_tags(source: TextSource, missing: list[Span]) -> list[Span]:
    return [(start, stop) for start, stop in missing if _TAG.sub("", source.text[start:stop]).strip()]


def _description(source: TextSource, missing: Span, role: str) -> str:
    text = source.text[slice(*missing)].strip()
    shown = repr(text if len(text) <= 40 else text[:40] + "…")
    is_all = text == source.text.strip()
    if source.path[-1] == "name":
        return f"the tool call {shown}"
    if source.path[0] == "tool_calls":
        return f"{shown} of a tool call"
    if is_all and role == "developer":
        return "this message (role developer); if it means the same to this model, write system"
    return f"this message (role {role})" if is_all else f"{shown} of this message (role {role})"


def _place(source: TextSource) -> str:
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in source.path if step != "key")
    return f"messages[{source.turn}]{path}"
